"""The learning-rate schedule of preference tuning."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupDecay(LRScheduler):
    """Rise linearly from zero over a warm-up, then fall along a cosine or a line, or stay.

    Args:
        optimizer: Its learning rates are the peak.
        warmup: Length of the warm-up: a share of all steps below 1, or a number of steps.
        decay: `cosine`, `linear`, or `constant` for no fall.
        final: Where the fall ends, as a share of the peak, in [0, 1].
        total_steps: Optimizer steps in all; the training module fills it in when left out.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.1,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        final: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if warmup < 0:
            raise ValueError(f"`warmup` must be at least 0, got {warmup}: a share of all steps, or a number of steps.")
        if not 0 <= final <= 1:
            raise ValueError(f"`final` must be in [0, 1], got {final}: it is a share of the peak learning rate.")
        if decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"`decay` must be `cosine`, `linear` or `constant`, got {decay!r}.")
        self.warmup, self.decay, self.final, self.total_steps = warmup, decay, final, total_steps
        super().__init__(optimizer)

    def bind(self, total_steps: int) -> None:
        """Fix the number of optimizer steps, once it is known."""
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def factor(self, step: int) -> float:
        """Learning rate at a step, counted from 0, as a share of the peak."""
        total = max(self.total_steps or 1, 1)
        warmup = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        shape = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * shape

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at the current step."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


def bind(schedule: object, trainer: Trainer) -> WarmupDecay | None:
    """Fix a schedule's length to that of a run, if it is one of ours and has none of its own, and return it then.

    Raises:
        ValueError: The run has no end that is known.
    """
    if not isinstance(schedule, WarmupDecay) or schedule.total_steps is not None:
        return None
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ValueError(
            "`lr_scheduler` cannot know when training ends: set the Trainer's `max_epochs` or `max_steps`, or "
            "`lr_scheduler.total_steps`."
        )
    schedule.bind(int(steps))
    return schedule


def rebind(schedule: WarmupDecay, trainer: Trainer) -> None:
    """Fit a schedule that a checkpoint has restored to the length of this run, and say so if that is another."""
    before = schedule.total_steps
    if before != (steps := int(trainer.estimated_stepping_batches)):
        rank_zero_info(f"The schedule of the checkpoint, of {before} steps, now has {steps}.")
        schedule.bind(steps)
