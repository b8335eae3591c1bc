"""Exact resume: a loader that starts where training stands, and counters that fit another number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_dpo.pairs import PairBatch


class ResumableLoader(DataLoader[PairBatch]):
    """A loader of training batches that begins at the batch which the Trainer needs next.

    The position is read from the Trainer's own progress when the first batch is asked for: by then Lightning has
    restored it, whatever hook of the user's made it set up the loader early. The sampler has to have ``set_epoch``,
    and ``start`` to say how many batches of the epoch to leave out.

    Attributes:
        trainer: Whose progress to follow; ``None`` starts at the beginning.
    """

    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
        trainer, sampler = self.trainer, self.sampler
        if trainer is not None and trainer.training:
            done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
            epoch, start = divmod(done, int(trainer.num_training_batches))
            sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            sampler.start = start  # type: ignore[attr-defined]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it tells Lightning that this loader resumes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing; see `state_dict`."""


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Random numbers that depend on these numbers alone; the generators outside stay as they are."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rescale(loops: dict[str, Any], old: dict[str, int], new: dict[str, int]) -> None:
    """Turn the counters of batches in a checkpoint into those of a run that cuts optimizer steps differently.

    Args:
        loops: ``checkpoint["loops"]``, changed in place.
        old: ``pairs_per_step``, ``accumulate`` (batches a step) and ``batches`` (an epoch) of the run that saved.
        new: The same of this run.

    Raises:
        ValueError: An optimizer step would hold another number of pairs, so that no order of rows could be kept.
    """
    if old["pairs_per_step"] != new["pairs_per_step"]:
        raise ValueError(
            f"The checkpoint was made with {old['pairs_per_step']} pairs an optimizer step and this run has "
            f"{new['pairs_per_step']}: change `batch_size` or `accumulate_grad_batches` so that batch size times "
            "processes times accumulation is the same."
        )
    if old == new:
        return
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]

    def converted(ready: int) -> int:
        epochs, rest = divmod(ready, old["batches"])
        steps = -(-rest // old["accumulate"])
        return epochs * new["batches"] + min(steps * new["accumulate"], new["batches"])

    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        counts.update({name: converted(ready) - (ready - value) for name, value in counts.items()})
