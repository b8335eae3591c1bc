"""Fully sharded data parallel training, as `--trainer.strategy fsdp2`."""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lit_dpo.checkpoints.content import check_content
from lit_dpo.checkpoints.shards import check_index
from lit_dpo.checkpoints.verify import verify
from lit_dpo.scoring.decoder import decoder_parts, own_tensors
from lit_dpo.scoring.score import SHARDED_METHOD, completion_logps


class FSDP2Strategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state over all processes with PyTorch's `fully_shard`.

    Runs on GPUs, and on CPUs for tests.

    Args:
        save_distributed_checkpoint: Write checkpoints as a folder of shards, faster for large models, instead of one
            file that any other strategy can read.
        process_group_backend: `nccl`, `gloo`, or `None` to pick by device.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend)

    def setup_environment(self) -> None:
        """Let the data-parallel group span all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Check a checkpoint, then load it, as plain values and tensors alone; see `verify`."""
        path = Path(self.broadcast(checkpoint_path))
        verify(path)
        if path.is_dir():
            check_index(path)
        content = super().load_checkpoint(path, weights_only=True)
        check_content(content, path, weights=False)  # the model has them already
        return content


def shard(model: nn.Module, mesh: DeviceMesh, precision: Any) -> None:
    """Shard a model in place: one group a decoder block, and one for the rest.

    Args:
        model: Policy or reference, the same on every process.
        mesh: The one-dimensional data-parallel mesh.
        precision: The Trainer's; with `bf16-mixed` weights are gathered in bfloat16 and gradients reduced in float32.
    """
    mixed = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*decoder_parts(model).blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    setattr(model, SHARDED_METHOD, partial(completion_logps, model))
    register_fsdp_forward_method(model, SHARDED_METHOD)


def leave_batches(strategy: Strategy) -> None:
    """Keep FSDP1's precision plugin from converting batches, which are token ids.

    It would rebuild the frozen dataclass that they come in, and fail.
    """
    if isinstance(strategy, FSDPStrategy):
        setattr(strategy.precision_plugin, "convert_input", lambda batch: batch)  # noqa: B010


def wrap(model: nn.Module, strategy: FSDPStrategy, precision: Any) -> nn.Module:
    """Wrap a model for Lightning's own `FSDPStrategy` (FSDP1), one unit a decoder block; Lightning then wraps no more.

    Args:
        model: Policy or reference, the same on every process.
        strategy: Its options, such as CPU offload, sharding strategy and mixed precision, are kept.
        precision: The Trainer's; with `bf16-mixed` weights and gradients travel in bfloat16, and buffers, such as
            rotary positions, stay as they are (Lightning would round them).
    """
    mixed = strategy.mixed_precision
    if mixed is None and precision == "bf16-mixed":
        mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = {type(block) for block in decoder_parts(model).blocks}
    original = model.forward

    @wraps(original)
    def forward(*args: Any, completions: tuple[Any, ...] | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if completions is None else completion_logps(model, *completions)

    model.forward = forward  # FSDP1 gathers weights around `forward` alone
    options = {key: value for key, value in strategy.kwargs.items() if key != "auto_wrap_policy"}
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(blocks),
        cpu_offload=strategy.cpu_offload,
        mixed_precision=mixed,
        sharding_strategy=strategy.sharding_strategy,
        device_id=strategy.root_device,
        **options,
    )
    object.__setattr__(wrapped, SHARDED_METHOD, lambda *completions: wrapped(completions=completions))
    return wrapped


def fill(model: nn.Module, full: nn.Module | None, device: torch.device) -> None:
    """Give a sharded model on the meta device its memory, and the weights that the first process has.

    Every process calls it and receives its own share; none but the first ever holds a whole copy.

    Args:
        model: Sharded, every tensor on the meta device.
        full: The same model with weights, on the first process; `None` on the others.
        device: Where the shards go.
    """
    materialize(model, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if full is None else full.state_dict(), options=options)
    ready = {} if full is None else dict(full.named_buffers())
    for name, buffer in model.named_buffers():  # those outside the state, as of rotary positions, too
        if full is not None:
            buffer.copy_(ready[name])
        torch.distributed.broadcast(buffer, src=0)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a sharded model on the meta device its memory, with nothing in it yet."""
    model.to_empty(device=device)
    decoder_parts(model).model.tie_weights()  # `to_empty` makes tied weights two


def copy_shards(source: nn.Module, target: nn.Module, device: torch.device) -> None:
    """Fill a sharded model on the meta device with another's own shards: nothing is read, gathered or sent.

    Args:
        source: A sharded model, with adapters or without.
        target: The same model without adapters.
        device: Where the shards go.
    """
    materialize(target, device)
    held = dict(own_tensors(source))
    with torch.no_grad():
        for name, tensor in own_tensors(target):
            tensor.copy_(held[name])


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel over all processes")
