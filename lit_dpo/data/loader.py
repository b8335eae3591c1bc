"""Loaders of pairs; that of training starts where training stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.sampler import PairSampler
from lit_dpo.pairs import PairBatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ResumableLoader(DataLoader[PairBatch]):
    """A loader of training batches that begins at the batch which the Trainer needs next.

    The position is read from the Trainer's own progress when the first batch is asked for: by then Lightning has
    restored it, whatever hook of the user's made it set up the loader early. The sampler has to have `set_epoch`,
    and `start` to say how many batches of the epoch to leave out.

    Attributes:
        trainer: Whose progress to follow; `None` starts at the beginning.
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


def pair_loader(
    dataset: PairDataset,
    rows: Tensor,
    batch_size: int,
    trainer: Trainer | None,
    workers: int = 0,
    seed: int = 0,
    shuffle: bool = False,
) -> DataLoader[PairBatch]:
    """A loader of this process's share of some rows.

    Args:
        dataset: The pairs.
        rows: Row numbers.
        batch_size: Pairs of one process in one batch.
        trainer: Knows the processes, and where training stands; `None` is one process.
        workers: Processes that make batches.
        seed: Seed of the order.
        shuffle: For training: in random order, cut into the Trainer's optimizer steps; otherwise long pairs come first.

    Raises:
        ValueError: The Trainer would replace the sampler.
    """
    if trainer and trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ValueError(
            "`overfit_batches` is not supported, because Lightning would replace the sampler that makes the "
            "batches: give `train` a small file instead, or use `limit_train_batches`."
        )
    sampler = PairSampler(
        dataset,
        rows,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        accumulate=trainer.accumulate_grad_batches if trainer and shuffle else 1,
        **((trainer and trainer.distributed_sampler_kwargs) or {}),
    )
    # The sampler yields whole batches, so automatic batching is off.
    loader = (ResumableLoader if shuffle else DataLoader)(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals,
    )
    if isinstance(loader, ResumableLoader):
        loader.trainer, sampler.limit = trainer, _batches(trainer, len(loader))
    return loader


def step_layout(trainer: Trainer, batches: int, batch_size: int) -> dict[str, int]:
    """How optimizer steps are cut into batches: pairs a step, batches a step, batches an epoch.

    Args:
        trainer: Knows the processes and the accumulation.
        batches: Batches of a training loader.
        batch_size: Pairs of one process in one batch.
    """
    accumulate = trainer.accumulate_grad_batches
    pairs = batch_size * trainer.world_size * accumulate
    return {"pairs_per_step": pairs, "accumulate": accumulate, "batches": max(1, _batches(trainer, batches))}


def _batches(trainer: Trainer | None, batches: int) -> int:
    """How many of an epoch's batches the Trainer's `limit_train_batches` lets through."""
    limit = trainer.limit_train_batches if trainer else 1.0
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _leave_signals(worker: int) -> None:
    """Let the main process alone decide what a signal means: workers end when it does."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
