"""Fully sharded data parallel training, as `--trainer.strategy fsdp2`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lit_dpo.scoring import SHARDED_METHOD, completion_sums, decoder_parts


class FSDP2Strategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state over all processes with PyTorch's ``fully_shard``.

    Runs on GPUs, and on CPUs for tests.

    Args:
        save_distributed_checkpoint: Write checkpoints as a folder of shards, faster for large models, instead of one
            file that any other strategy can read.
        process_group_backend: ``nccl``, ``gloo``, or ``None`` to pick by device.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend)

    def setup_environment(self) -> None:
        """Let the data-parallel group span all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(model: nn.Module, mesh: DeviceMesh, precision: Any) -> None:
    """Shard a model in place: one group a decoder block, and one for the rest.

    Args:
        model: Policy or reference, the same on every process.
        mesh: The one-dimensional data-parallel mesh.
        precision: The Trainer's; with ``bf16-mixed`` weights are gathered in bfloat16 and gradients reduced in float32.
    """
    mixed = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*decoder_parts(model).blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    setattr(model, SHARDED_METHOD, partial(completion_sums, model))
    register_fsdp_forward_method(model, SHARDED_METHOD)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel over all processes")
