"""What must be finite in training: gradients before a step, weights and optimizer states after it; and clipping."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad_value_, get_total_norm

from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.checkpoints.shards import shard_tensors
from lit_dpo.checkpoints.verify import is_sound
from lit_dpo.pair_data import pair_data
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class SeenPairs:
    """What a batch gave, kept until its optimizer step to tell which pair spoiled it.

    Args:
        rows: Row numbers, shape `(batch,)`.
        losses: Shape `(batch,)`.
        policy: Log-probs under the policy, without a graph.
        reference: Log-probs under the reference.
    """

    rows: Tensor
    losses: Tensor
    policy: PairLogps
    reference: PairLogps

    def values(self) -> dict[str, Tensor]:
        """Everything that has to be finite, under the name to report it by, each of shape `(batch,)`."""
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
        optimizer: The optimizer of the policy's parameters.
    """
    if isinstance(policy, FullyShardedDataParallel):
        norm: Tensor = policy.clip_grad_norm_(float("inf"))  # which clips nothing
        return norm
    norm = get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded by FSDP2


def clip(optimizer: torch.optim.Optimizer, norm: Tensor, most: float, algorithm: str | None, precision: object) -> None:
    """Clip the gradient, whose norm is known, to the norm `most`, or each of its values to `most`.

    Args:
        optimizer: Of the policy's parameters.
        norm: Of the whole gradient, 0-dimensional.
        most: What is let through, above 0.
        algorithm: `value` clips each value, anything else the norm.
        precision: The Trainer's.

    Raises:
        ValueError: The optimizer is fused and gradients are scaled float16.
    """
    if precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "A fused optimizer unscales float16 gradients only after clipping: set its `fused: false`, or use "
            "`precision: bf16-mixed`."
        )
    if algorithm == "value":
        clip_grad_value_(_parameters(optimizer), most)
    else:
        clip_to_norm(optimizer, norm, most)


def clip_to_norm(optimizer: torch.optim.Optimizer, norm: Tensor, most: float) -> None:
    """Scale the gradient, whose norm is known, down to the norm `most` if it is longer."""
    factor = most / (float(norm) + 1e-6)
    if factor < 1:
        for parameter in _parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def refuse_nonfinite(
    trainer: Trainer, policy: nn.Module | None, seen: Sequence[SeenPairs], norm: Tensor | None
) -> None:
    """Stop training before a NaN or an infinity reaches the weights.

    Waits for the device, once an optimizer step.

    Raises:
        FloatingPointError: Names step, process, rows with their files, and what of theirs was not finite; or else the
            weight or optimizer state that was not before; and a checkpoint that is finite.
    """
    flags = [value.isfinite().all() for pairs in seen for value in pairs.values().values()]
    flags += [] if norm is None else [norm.isfinite()]
    if not flags or bool(torch.stack(flags).all()):
        return
    where = f"optimizer step {trainer.global_step + 1}, process {trainer.global_rank}"
    if broken := first_nonfinite(_state(trainer, policy)):
        raise FloatingPointError(
            f"Training stopped before {where}: {broken} is not finite since an earlier step. Lower the learning rate. "
            f"{_advice(trainer)}"
        )
    raise FloatingPointError(
        f"Training stopped before {where}: {_culprits(trainer, seen)} No weight has changed. Look at these rows, or "
        f"lower the learning rate. {_advice(trainer)}"
    )


def refuse_broken_state(trainer: Trainer, policy: nn.Module | None) -> None:
    """Refuse to go on with, or to save, weights or optimizer states that are not finite; every process calls it.

    Each process looks at what it holds, its own shards alone, and all of them learn of one that found something.

    Raises:
        FloatingPointError: Names the first tensor that is not finite, and a checkpoint that is.
    """
    broken = first_nonfinite(_state(trainer, policy))
    if trainer.strategy.reduce_boolean_decision(broken is not None, all=False):
        raise FloatingPointError(
            f"{broken or 'What another process holds'} is not finite after optimizer step {trainer.global_step}, and "
            f"nothing is saved of it. Lower the learning rate, or start from other weights. {_advice(trainer)}"
        )


def refuse_foreign_state(trainer: Trainer) -> None:
    """Refuse restored optimizer states of other shapes than their weights: a fused optimizer would read beyond them.

    Raises:
        ValueError: Names what does not fit.
    """
    for optimizer in trainer.optimizers:
        for weight, state in optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"):
                value = state.get(key) if isinstance(state, dict) else None
                if isinstance(value, Tensor) and value.shape != weight.shape:
                    raise ValueError(
                        f"The optimizer's `{key}` in the checkpoint has the shape {tuple(value.shape)} for a weight of "
                        f"{tuple(weight.shape)}: resume from a checkpoint of this very model and optimizer."
                    )


def _state(trainer: Trainer, policy: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """The weights, and what the optimizers keep for each, under names to report them by."""
    named: dict[str, Tensor] = dict(policy.named_parameters()) if policy is not None else {}
    for name, weight in named.items():
        yield f"The weight `{name}`", weight
    names = {id(weight): name for name, weight in named.items()}
    for optimizer in trainer.optimizers:
        for weight, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    yield f"The optimizer's `{key}` of `{names.get(id(weight), 'a weight')}`", value


def _advice(trainer: Trainer) -> str:
    """A sentence that names the newest checkpoint to resume from that is sound and finite; the first process looks."""
    if not trainer.is_global_zero:
        return ""
    folders = [getattr(c, "_folder", None) or getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks]
    given = [] if trainer.ckpt_path is None else [Path(trainer.ckpt_path)]
    found = _newest_finite([Path(folder) for folder in folders if folder], given)
    return f"Resume from `{found}`, which is finite." if found else "There is no finite checkpoint to resume from."


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
    data = pair_data(trainer)
    return ["a pair"] * len(rows) if data is None else data.origin(rows, training=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _newest_finite(folders: Iterable[Path], others: Iterable[Path] = ()) -> Path | None:
    """The newest checkpoint that is sound and whose weights and optimizer states are finite; all of it is read.

    Args:
        folders: Where to look.
        others: Checkpoints elsewhere.
    """
    found = {*others, *(path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt"))}
    local = [path for path in found if "://" not in str(path)]
    # `previous.ckpt` may be a second name of `last.ckpt`, until that is written over.
    age = lambda path: (path.stat().st_mtime, path.name != "previous.ckpt")  # noqa: E731
    for path in sorted(filter(Path.exists, local), key=age, reverse=True):
        if is_sound(path) and _is_finite(path):
            return path
    return None


def _is_finite(path: Path) -> bool:
    try:
        if path.is_dir():
            return all(first_nonfinite(group) is None for group in shard_tensors(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError):
        return False
    return isinstance(content, dict) and "optimizer_states" in content and first_nonfinite(_tensors(content)) is None


def _tensors(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the weights and optimizer states of a checkpoint."""
    rest: list[tuple[str, Any]] = [("", [content.get("state_dict"), content.get("optimizer_states")])]
    while rest:
        name, value = rest.pop()
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, dict | list):
            items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
            rest.extend(items)
