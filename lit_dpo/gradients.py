"""The gradient of an optimizer step: its norm, whether it is finite, and clipping, alike under every strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import get_total_norm

from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class SeenPairs:
    """What a batch gave, kept until its optimizer step to tell which pair spoiled it.

    Args:
        rows: Row numbers, shape ``(batch,)``.
        losses: Shape ``(batch,)``.
        policy: Log-probs under the policy, without a graph.
        reference: Log-probs under the reference.
    """

    rows: Tensor
    losses: Tensor
    policy: PairLogps
    reference: PairLogps

    def values(self) -> dict[str, Tensor]:
        """Everything that has to be finite, under the name to report it by, each of shape ``(batch,)``."""
        return {
            "policy's log-prob of chosen": self.policy.chosen,
            "policy's log-prob of rejected": self.policy.rejected,
            "reference's log-prob of chosen": self.reference.chosen,
            "reference's log-prob of rejected": self.reference.rejected,
            "loss": self.losses,
        }


def gradient_norm(policy: nn.Module | None, optimizer: torch.optim.Optimizer) -> Tensor:
    """Euclidean norm of the whole gradient over all processes, 0-dimensional.

    Args:
        policy: Asked only if FSDP1 has wrapped it, whose gradients are plain tensors of a process's share.
        optimizer: Of the policy's parameters.
    """
    if isinstance(policy, FullyShardedDataParallel):
        norm: Tensor = policy.clip_grad_norm_(float("inf"))  # which clips nothing
        return norm
    norm = get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded by FSDP2


def clip_to_norm(optimizer: torch.optim.Optimizer, norm: Tensor, most: float) -> None:
    """Scale the gradient, whose norm is known, down to the norm `most` if it is longer."""
    factor = most / (float(norm) + 1e-6)
    if factor < 1:
        for parameter in _parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def refuse_nonfinite(trainer: Trainer, seen: Sequence[SeenPairs], norm: Tensor | None) -> None:
    """Stop training before a NaN or an infinity reaches the weights.

    Waits for the device, once an optimizer step.

    Raises:
        FloatingPointError: Names step, process, rows with their files, and what of theirs was not finite.
    """
    flags = [value.isfinite().all() for pairs in seen for value in pairs.values().values()]
    flags += [] if norm is None else [norm.isfinite()]
    if not flags or bool(torch.stack(flags).all()):
        return
    where = f"optimizer step {trainer.global_step + 1}, process {trainer.global_rank}"
    raise FloatingPointError(
        f"Training stopped before {where}: {_culprits(trainer, seen)} No weight has changed. Look at these rows, lower "
        "the learning rate, or resume from the last checkpoint with other options."
    )


def _culprits(trainer: Trainer, seen: Sequence[SeenPairs]) -> str:
    """Sentences that name the rows whose values are not finite, or all rows of the step if only the gradient is."""
    found = []
    for pairs in seen:
        values = pairs.values()
        for place, row in enumerate(pairs.rows.tolist()):
            bad = [f"{name} {float(value[place])}" for name, value in values.items() if not value[place].isfinite()]
            if bad:
                found.append(f"{_origin(trainer, [row])[0]} (row {row}): {', '.join(bad)}.")
    if found:
        return " ".join(found)
    rows = [row for pairs in seen for row in pairs.rows.tolist()]
    named = ", ".join(f"{origin} (row {row})" for origin, row in zip(_origin(trainer, rows), rows, strict=True))
    return f"the gradient is not finite, though every loss of this process is; its rows were {named}."


def _origin(trainer: Trainer, rows: Sequence[int]) -> list[str]:
    origin = getattr(getattr(trainer, "datamodule", None), "origin", None)
    return ["a pair"] * len(rows) if origin is None else origin(rows, training=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
