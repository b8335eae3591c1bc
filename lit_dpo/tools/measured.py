"""A few steps of a fit at learning rate 0 and a few checkpoints, timed; and what a whole run takes by them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_dpo.callbacks.last_checkpoint import save_last
from lit_dpo.checkpoints.io import make_durable
from lit_dpo.data import PreferenceDataModule
from lit_dpo.losses import per_pair
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Reference
from lit_dpo.scoring.score import Scorer
from lit_dpo.tools.memory import Memory, size
from lit_dpo.tools.plan import Plan, computed_tokens

_SIZES = 6  # lengths of batches that are timed
_PASSES = 12  # over these lengths
_ENOUGH = 20.0  # seconds after which no length is timed a third time: the speed of a machine swings for seconds
_SECONDS = 60.0  # after which none is timed a second time
_SAVES = 8  # checkpoints at most, the first two apart
_SAVING = 2.0  # seconds after which no fifth is written
_WHOLE = 1 << 30  # bytes; of a larger checkpoint a part is written


@dataclass(eq=False)
class StartReference(Reference):
    """What a cached reference gives before the first step, scored on the spot; the seconds are counted.

    Args:
        of: The reference whose values are to be cached; `None` is the policy.
    """

    of: Reference | None = None
    seconds: float = field(default=0.0, init=False)
    tokens: int = field(default=0, init=False)

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """Log-probs of a batch."""
        began = _clock(batch.input_ids.device)
        found = scorer(policy, batch) if self.of is None else self.of.score(policy, batch, scorer)
        self.seconds += _clock(batch.input_ids.device) - began
        self.tokens += computed_tokens([slice(None)], batch.lengths, scorer.form == "padded")[0]
        return found


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TooLargeError(Exception):
    """A batch was left out, because it would take more memory than there is."""


class Measuring(Callback):
    """Times batches of several lengths at learning rate 0, the shortest first, and compares policy and reference.

    Args:
        plan: What the run will do.
        accumulate: Batches of an optimizer step here: 1, or 2 where the run accumulates gradients.
        memory: Measures memory.
        room: The most bytes to take; batches that would take more are left out.
        folder: Where checkpoints may be tried, in a folder of their own that is removed; `None` tries none.

    Attributes:
        interval: Steps between two that the fit logs; the first one is logged in any case.
        times: Tokens of a batch -> its seconds each time, without the optimizer.
        evaluated: The same of validation.
        updates: Seconds of each optimizer step.
        first: Seconds of the first step.
        reference_pass: Seconds that the pass of a cached reference takes, if nothing is cached yet.
        saves: Seconds of the first checkpoint, of one in a new place, and of each that follows there.
        peak: The most bytes that were taken.
        extrapolated: What the longest batch would take, if it was left out.
        gap: Largest difference of policy and reference before the first step, in nats; `None` without a reference.
        losses: Mean loss of the first batch, and what it is where policy and reference are one.
        drawn: Whether scoring in training mode draws random numbers.
        rate: Learning rate of the run.
        parts: Bytes of `weights`, `reference`, `gradients` and `optimizer`.
    """

    def __init__(self, plan: Plan, accumulate: int, memory: Memory, room: int | None, folder: Path | None) -> None:
        self.plan, self.accumulate, self.memory, self.room, self.folder = plan, accumulate, memory, room, folder
        self.interval = 1
        self.chosen: list[Any] = []
        self.tokens: list[int] = []
        self.planned: list[int] = []
        self.held_out: list[Any] = []
        self.held_out_tokens: list[int] = []
        self.times: dict[int, list[float]] = {}
        self.evaluated: list[tuple[int, float]] = []
        self.updates: list[float] = []
        self.first, self.reference_pass, self.saves = 0.0, 0.0, [0.0] * 3
        self.peak, self.extrapolated = memory.peak, 0
        self.gap: float | None = None
        self.losses: tuple[float, float] | None = None
        self.drawn, self.rate, self.norm = False, 0.0, 0.0
        self.parts: dict[str, int] = {}
        self._began = self._end = self._updating = self._skipped = 0.0
        self._peaks: list[tuple[int, int]] = []

    def loaders(self, data: PreferenceDataModule) -> tuple[DataLoader[PairBatch], Any]:
        """Loaders of the batches to train on, and of those to validate on."""
        self._choose(data)
        own = data.training.validation or data.training.train
        validating: Any = DataLoader(own, batch_size=None, sampler=self.held_out) if self.held_out else []
        return DataLoader(data.training.dataset, batch_size=None, sampler=self.chosen), validating

    def _choose(self, data: PreferenceDataModule, padded: bool = False) -> None:
        """Find the batches to time, by what a forward pass computes; the loaders see them change."""
        plan, own = self.plan, data.training.validation or data.training.train
        self.planned = computed_tokens([p.rows for p in plan.batches], data.training.dataset.lengths, padded)
        self.held_out_tokens = computed_tokens([p.rows for p in plan.evaluated], own.lengths, padded)
        rising, held_out = _spread(self.planned, _SIZES), _spread(self.held_out_tokens, _SIZES)
        chosen = [number for number in [rising[0], *rising * _PASSES] for _ in range(self.accumulate)]
        self.chosen[:] = [plan.batches[number] for number in chosen]
        self.tokens = [self.planned[number] for number in chosen]
        self.once = self.accumulate * (1 + len(rising))  # batches after which every length was seen
        again = _SIZES // max(1, len(held_out))
        self.held_out[:] = [plan.evaluated[number] for number in held_out * again]
        self.evaluated_tokens = [self.held_out_tokens[number] for number in held_out * again]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the batches once more if they turn out to be padded, note the learning rate and start the clock."""
        if pl_module.scorer.form == "padded":
            self._choose(trainer.datamodule, padded=True)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        self._began = self._end = _clock(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PairBatch, batch_idx: int) -> None:
        """Compare policy and reference before the first step; raises `TooLargeError` where memory would not do."""
        if batch_idx == 0:
            self._compare(trainer, pl_module, batch)
            self._end = _clock(pl_module.device)
            self._skipped = getattr(pl_module.reference, "seconds", 0.0)
        elif self.room is not None and self.accumulate <= batch_idx < self.once:
            wanted = self._expected(self.tokens[batch_idx])
            if wanted > self.room:
                self.extrapolated = self._expected(self.tokens[-1])
                raise TooLargeError
        self.memory.restart()

    def _expected(self, tokens: int) -> int:
        """Bytes that a batch is going to take, by those before it."""
        known = sorted(set(self._peaks))
        (few, low), (many, high) = known[0], known[-1]
        slope = (high - low) / (many - few) if many > few else 0.0
        return int(high + max(0.0, slope) * max(0, tokens - many))

    @torch.no_grad()
    def _compare(self, trainer: Trainer, module: Any, batch: PairBatch) -> None:
        before = torch.get_rng_state()
        with trainer.precision_plugin.forward_context():
            policy, reference = module(batch)
        self.drawn = not torch.equal(before, torch.get_rng_state())
        real = slice(None) if batch.weights is None else batch.weights != 0
        if module.reference is not None:
            gaps = torch.stack([policy.chosen - reference.chosen, policy.rejected - reference.rejected]).abs()
            self.gap = float(gaps[:, real].max())
            at_start = per_pair(module.loss, reference, reference)[real].mean()
            self.losses = float(per_pair(module.loss, policy, reference)[real].mean()), float(at_start)
        else:
            value = float(per_pair(module.loss, policy, reference)[real].mean())
            self.losses = value, value

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Change no weight."""
        self._updating = _clock(pl_module.device)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Note the time and the memory of a batch."""
        now = _clock(pl_module.device)
        stepped = (batch_idx + 1) % self.accumulate == 0
        update = now - self._updating if stepped else 0.0
        waited = getattr(pl_module.reference, "seconds", 0.0)
        took = now - self._end - update - (waited - self._skipped)
        self._end, self._skipped = now, waited
        self.peak = max(self.peak, self.memory.peak)
        if stepped and not self.parts:
            self.parts = _parts(pl_module, trainer)
            trainer.log_every_n_steps = self.interval  # type: ignore[attr-defined]  # from here on as in the fit
        if batch_idx >= self.accumulate:  # the first step makes what the others find made
            self.times.setdefault(self.tokens[batch_idx], []).append(took)
            self._peaks.append((self.tokens[batch_idx], self.memory.peak))
            if stepped:
                self.updates.append(update)
        else:
            self._peaks = [(self.tokens[batch_idx], self.memory.peak)]
            self.first += took + update
        twice = batch_idx + 1 >= 2 * self.once - self.accumulate
        if batch_idx + 1 >= self.once and now - self._began > (_ENOUGH if twice else _SECONDS):
            trainer.should_stop = True

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Start the clock."""
        self._end = _clock(pl_module.device) - getattr(pl_module.reference, "seconds", 0.0)
        self.memory.restart()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PairBatch, batch_idx: int, *args: Any
    ) -> None:
        """Note the time of a batch."""
        now = _clock(pl_module.device) - getattr(pl_module.reference, "seconds", 0.0)
        self.evaluated.append((self.evaluated_tokens[batch_idx], now - self._end))
        self.peak = max(self.peak, self.memory.peak)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the reference's pass, and checkpoints."""
        self._time_pass(trainer, pl_module)
        self._time_saves(trainer, pl_module)

    @torch.no_grad()
    def _time_pass(self, trainer: Any, module: Any) -> None:
        """Score some of the batches of the pass, the longest among them."""
        reference, whole = module.reference, 0
        if not isinstance(reference, StartReference):
            return
        reference.seconds, reference.tokens = 0.0, 0
        self.memory.restart()
        for number, (dataset, rows, loader) in enumerate(trainer.datamodule.reference_sets("fit")):
            plans = list(loader(rows).sampler)
            tokens = computed_tokens([p.rows for p in plans], dataset.lengths, module.scorer.form == "padded")
            whole += sum(tokens) * (len(self.plan.pairs) if number else 1)  # validation rows are scored in each fit
            some: Any = [plans[number] for number in _spread(tokens, _SIZES)]
            for batch in DataLoader(dataset, batch_size=None, sampler=some):
                with trainer.precision_plugin.forward_context():
                    reference.score(module.policy, trainer.strategy.batch_to_device(batch), module.scorer)
        self.peak = max(self.peak, self.memory.peak)
        self.reference_pass = reference.seconds / reference.tokens * whole

    def _time_saves(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Some, being unlike: the process's first, one alone, one beside another, and those beside two others."""
        size_of = self.parts.get("weights", 0) + self.parts.get("optimizer", 0)
        folder = self.folder
        if not folder or not size_of or shutil.disk_usage(folder).free < 4 * min(size_of, _WHOLE):
            return
        make_durable(trainer)
        with tempfile.TemporaryDirectory(prefix=".lit-dpo-check-", dir=folder) as made:
            saves: list[float] = []
            start = _clock(pl_module.device)
            while len(saves) < 4 or (len(saves) < _SAVES and _clock(pl_module.device) - start < _SAVING):
                began = _clock(pl_module.device)
                where = Path(made, "second" if saves else "first")
                save_last(trainer, where, None if size_of <= _WHOLE else partial(_save_a_part, trainer))
                saves.append((_clock(pl_module.device) - began) * max(1.0, size_of / _WHOLE))
            self.saves = saves

    # -- what follows -------------------------------------------------------------------------------------------------

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of all training steps of the run, of its validations, and of its checkpoints."""
        if not self.updates:
            return 0.0, 0.0, 0.0
        known = sorted((tokens, float(np.mean(_later(times)))) for tokens, times in self.times.items())
        sizes, times = [float(tokens) for tokens, _ in known], [mean for _, mean in known]
        passes = float(np.dot(np.interp(self.planned, sizes, times), self.plan.epochs))
        update = float(np.mean(self.updates))
        # The first pass over the lengths grows the memory, and so do the first steps of a fit.
        growth = max(0.0, sum(seconds[0] - float(np.mean(_later(seconds))) for seconds in self.times.values()))
        first = max(0.0, self.first - self.accumulate * times[0] - update)
        training = passes + self.plan.steps * update + first + growth
        speed = sum(s for _, s in self.evaluated) / max(1, sum(n for n, _ in self.evaluated))
        first_save, alone, second, *others = self.saves
        later = float(np.mean(others or second))
        last = sum([first_save, second][: self.plan.last]) + later * max(0, self.plan.last - 2)
        before = sum(self.held_out_tokens[: self.plan.before]) * len(self.plan.pairs)
        evaluated = sum(self.held_out_tokens) * self.plan.validations + before
        return training, speed * evaluated, last + alone * self.plan.best

    @property
    def swing(self) -> float | None:
        """Largest part by which a pass over the same batches was slower or faster than the mean of those counted."""
        counted = [_later(times) for times in self.times.values()]
        passes = np.array([times[-min(map(len, counted)) :] for times in counted]).sum(0)
        return float(abs(passes / passes.mean() - 1).max()) if len(passes) > 1 else None


def _later(times: list[float]) -> list[float]:
    """Those that count: the first half grows the memory step by step, and warms up what is kept."""
    return times[len(times) // 2 :]


def _spread(tokens: Sequence[int], most: int) -> list[int]:
    """Numbers of batches from the shortest to the longest, evenly among all in the order of their tokens."""
    order = np.argsort(tokens, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [int(order[place]) for place in places]


def _save_a_part(trainer: Trainer, path: Path) -> None:
    """Write zeros of the size of `_WHOLE` as a checkpoint is written."""
    trainer.strategy.checkpoint_io.save_checkpoint({"part": torch.zeros(_WHOLE, dtype=torch.uint8)}, path)


def _parts(module: Any, trainer: Trainer) -> dict[str, int]:
    policy, reference = list(module.policy.parameters()), module.reference
    states = [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    return {
        "weights": size(policy),
        "reference": 0 if reference is None else sum(size(list(model.parameters())) for model in reference.models()),
        "gradients": size([parameter for parameter in policy if parameter.requires_grad]),
        "optimizer": size([value for value in states if isinstance(value, Tensor)]),
    }
