"""The pairs of a training run: the pool, what is held out of it, and what the step under way trains on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_dpo.data.changes import record, refuse_changes
from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.shares import drawn
from lit_dpo.data.validation import held_out, overlap


class TrainingPairs:
    """The training set, divided once, and the choice of a step from it.

    Args:
        train: The training set.
        validation: A validation set of its own, which leaves the whole training set for training.
        fraction: Share of the training pairs to hold out without one, in [0, 1).
        seed: Seed of these draws and of the order of pairs.
        weights: Source -> how often its pairs are seen in an epoch; see `drawn`.
        most: Most pairs of a source.

    Attributes:
        pool: Row numbers of the training set that are trained on, ascending, int64; with weights some come twice.
        held_out: Those that are held out.
        said: What there is to say about the division, a line each.

    Raises:
        ValueError: All pairs share one prompt, so that none can be held out.
    """

    def __init__(
        self,
        train: PairDataset,
        validation: PairDataset | None,
        fraction: float,
        seed: int,
        weights: Mapping[str, float] | None = None,
        most: int | None = None,
    ) -> None:
        self.train, self.validation, self.seed = train, validation, seed
        self.pool, self.held_out = torch.arange(len(train)), torch.arange(0)
        said: str | None = f"none, as `validation_fraction` is 0; all {len(train)} pairs are trained on"
        if validation is not None:
            said = overlap(train, validation)
        elif fraction:
            chosen = held_out(train, fraction, seed)
            self.pool, self.held_out = self.pool[~chosen], self.pool[chosen]
            said = f"{int(chosen.sum())} pairs held out of {len(train)}"
        self.said = [f"validation: {said}"] if said else []
        if weights or most is not None:
            self.pool = drawn(self.pool, train.sources, weights, most, seed)
            self.said.append(f"train: {len(self.pool)} pairs an epoch, by `weights` and `max_per_source`")
        self.dataset, self.rows = train, self.pool
        self.chosen = False

    @property
    def pool_sources(self) -> list[str]:
        """Name of the data source of each pair of the pool."""
        return [self.train.sources[row] for row in self.pool.tolist()]

    def use_rows(self, rows: Tensor) -> None:
        """Train on these rows of the pool.

        Raises:
            ValueError: They are no row numbers of the pool.
        """
        numbers = rows.dim() == 1 and len(rows) > 0 and not rows.is_floating_point() and rows.dtype != torch.bool
        if not numbers or not 0 <= int(rows.min()) <= int(rows.max()) < len(self.pool):
            raise ValueError(
                f"A step trains on at least one row number of the pool, from 0 to {len(self.pool) - 1}, and got a "
                f"tensor of {rows.dtype} and shape {tuple(rows.shape)}: in the place of a mask give "
                "`mask.nonzero().flatten()`, and `None` when there are no more steps."
            )
        self.dataset, self.rows, self.chosen = self.train, self.pool[rows.cpu()], True

    def use_pairs(self, pairs: PairDataset) -> None:
        """Train on all of these new pairs."""
        self.dataset, self.rows, self.chosen = pairs, torch.arange(len(pairs)), True

    def record(self) -> dict[str, str]:
        """A hash of every row and of which are trained on, as text; see `lit_dpo.data.changes.record`."""
        return record(self.train, self.validation, self.rows, self.seed, self._new)

    def refuse_changes(self, saved: object, order: str | None, where: str, allowed: bool) -> str | None:
        """Compare the rows with an earlier `record`; see `lit_dpo.data.changes.refuse_changes`."""
        return refuse_changes(saved, self.train, self.validation, order, where, allowed, self._new)

    @property
    def _new(self) -> PairDataset | None:
        return None if self.dataset is self.train else self.dataset
