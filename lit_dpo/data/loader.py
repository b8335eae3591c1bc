"""A loader that starts where training stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
