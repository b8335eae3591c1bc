"""A few steps of a fit at learning rate 0 and four checkpoints, timed; and what a whole run takes by them."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
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
from lit_dpo.tools.plan import Plan

_SIZES = 6  # lengths of batches that are timed
_PASSES = 12  # over these lengths
_ENOUGH = 10.0  # seconds after which no length is timed a third time
_SECONDS = 60.0  # after which none is timed a second time
_WHOLE = 1 << 30  # bytes; of a larger checkpoint a part is written


# -- memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """Memory of this process in bytes: on a GPU what is allocated there, else the resident set.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def now(self) -> int:
        """What is taken."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else _status("VmRSS")

    @property
    def peak(self) -> int:
        """The most since `restart`, or since the process began."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")

    def restart(self) -> None:
        """Measure the peak anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def room(self) -> int | None:
        """The most that this process may take; `None` where that cannot be told."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        with suppress(OSError):
            found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
            return None if found is None else self.now + 1024 * int(found[1])
        return None


def _status(name: str) -> int:
    with suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return 1024 * int(found[1])
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- measuring --------------------------------------------------------------------------------------------------------


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
        self.tokens += len(batch.input_ids)
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
        times: Tokens of a batch -> its seconds, without the optimizer.
        evaluated: The same of validation.
        updates: Seconds of each optimizer step.
        first: Seconds that the first step took more than a later one of the same batches.
        reference_pass: Seconds that the pass of a cached reference takes, if nothing is cached yet.
        saves: Seconds of the first checkpoint, of one in a new place, and of the second and third there.
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
        rising = _spread(plan.tokens, _SIZES)
        chosen = [rising[0], *rising * _PASSES]
        self.chosen = [plan.batches[number] for number in chosen for _ in range(accumulate)]
        self.tokens = [plan.tokens[number] for number in chosen for _ in range(accumulate)]
        self.once = accumulate * (1 + len(rising))  # batches after which every length was seen
        self.held_out = [plan.evaluated[number] for number in _spread(plan.evaluated_tokens, _SIZES)]
        self.times: dict[int, list[float]] = {}
        self.evaluated: list[tuple[int, float]] = []
        self.updates: list[float] = []
        self.first, self.reference_pass, self.saves = 0.0, 0.0, [0.0] * 4
        self.peak, self.extrapolated = memory.peak, 0
        self.gap: float | None = None
        self.losses: tuple[float, float] | None = None
        self.drawn, self.rate, self.norm = False, 0.0, 0.0
        self.parts: dict[str, int] = {}
        self._began = self._end = self._updating = self._skipped = 0.0
        self._peaks: list[tuple[int, int]] = []

    def loaders(self, data: PreferenceDataModule) -> tuple[DataLoader[PairBatch], Any]:
        """Loaders of the batches to train on, and of those to validate on."""
        own = data.training.validation or data.training.train
        validating: Any = DataLoader(own, batch_size=None, sampler=self.held_out) if self.held_out else []
        return DataLoader(data.training.dataset, batch_size=None, sampler=self.chosen), validating

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the learning rate and start the clock."""
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
        self.evaluated.append((sum(map(sum, batch.shape)), now - self._end))
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
        for dataset, rows, loader in trainer.datamodule.reference_sets("fit"):
            plans, lengths = list(loader(rows).sampler), dataset.lengths.sum(1)
            tokens = [int(lengths[plan.rows].sum()) for plan in plans]
            whole += sum(tokens)
            some: Any = [plans[number] for number in _spread(tokens, _SIZES)]
            for batch in DataLoader(dataset, batch_size=None, sampler=some):
                with trainer.precision_plugin.forward_context():
                    reference.score(module.policy, trainer.strategy.batch_to_device(batch), module.scorer)
        self.peak = max(self.peak, self.memory.peak)
        self.reference_pass = reference.seconds / reference.tokens * whole

    def _time_saves(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Four, being unlike: the process's first, one alone, one beside another, one beside two others."""
        size_of = self.parts.get("weights", 0) + self.parts.get("optimizer", 0)
        folder = self.folder
        if not folder or not size_of or shutil.disk_usage(folder).free < 4 * min(size_of, _WHOLE):
            return
        make_durable(trainer)
        with tempfile.TemporaryDirectory(prefix=".lit-dpo-check-", dir=folder) as made:
            for number in range(len(self.saves)):
                began = _clock(pl_module.device)
                where = Path(made, "first" if number == 0 else "second")
                save_last(trainer, where, None if size_of <= _WHOLE else partial(_save_a_part, trainer))
                self.saves[number] = (_clock(pl_module.device) - began) * max(1.0, size_of / _WHOLE)

    # -- what follows -------------------------------------------------------------------------------------------------

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of all training steps of the run, of its validations, and of its checkpoints."""
        # The first pass over the lengths grows the memory, step by step, which a fit does once.
        known = sorted((tokens, float(np.mean(times[len(times) // 2 :]))) for tokens, times in self.times.items())
        if not known:
            return 0.0, 0.0, 0.0
        sizes, times = [float(tokens) for tokens, _ in known], [mean for _, mean in known]
        epoch, update = float(np.interp(self.plan.tokens, sizes, times).sum()), float(np.mean(self.updates))
        first = max(0.0, self.first - self.accumulate * times[0] - update)
        training = self.plan.epochs * epoch + self.plan.steps * update + first
        speed = sum(s for _, s in self.evaluated) / max(1, sum(n for n, _ in self.evaluated))
        first_save, alone, second, later = self.saves
        last = sum([first_save, second][: self.plan.last]) + later * max(0, self.plan.last - 2)
        validating = speed * sum(self.plan.evaluated_tokens) * self.plan.validations
        return training, validating, last + alone * self.plan.best


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
