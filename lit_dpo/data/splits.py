"""Partitions of the training pairs themselves: all at once, by source, at random, by difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_dpo.data.partition import Partition, Pool


class OneShot(Partition):
    """Everything at once: plain training."""

    rows_alone: ClassVar[bool] = True

    def next(self, step: int, pool: Pool) -> Tensor | None:
        """All pairs in a single step."""
        return _nth([torch.arange(pool.rows)], step)


class BySource(Partition):
    """One step for each data source, as in the sDPO paper.

    Args:
        order: Names of the sources in training order; empty means the order in which they are given to the data
            module. Names are those that the load report prints.
    """

    rows_alone: ClassVar[bool] = True

    def __init__(self, order: Sequence[str] = ()) -> None:
        self.order = tuple(order)

    def next(self, step: int, pool: Pool) -> Tensor | None:
        """The pairs of one source.

        Raises:
            ValueError: `order` does not name every source once.
        """
        found = list(dict.fromkeys(pool.sources))
        if self.order and sorted(self.order) != sorted(found):
            raise ValueError(
                f"`order` names {', '.join(self.order)}, but the data have the sources {', '.join(found)}."
            )
        names = self.order or found
        return _rows_of(names[step], pool.sources) if step < len(names) else None


class RandomSplit(Partition):
    """Steps of equal size drawn at random: the sDPO paper's ablation.

    Args:
        parts: Number of steps, at least 1.
        seed: Seed of the random split.
    """

    rows_alone: ClassVar[bool] = True

    def __init__(self, parts: int = 2, seed: int = 0) -> None:
        self.parts, self.seed = _positive(parts), seed

    def next(self, step: int, pool: Pool) -> Tensor | None:
        """An equal share of the pairs; the first steps take the remainder.

        Raises:
            ValueError: There are fewer pairs than steps.
        """
        _refuse_empty(self.parts, pool)
        order = torch.randperm(pool.rows, generator=torch.Generator().manual_seed(self.seed))
        return _nth([rows.sort().values for rows in order.tensor_split(self.parts)], step)


class EasyToHard(Partition):
    """Steps ordered from what the first model already prefers to what it does not.

    Args:
        parts: `None` orders whole sources by the first model's accuracy, the share of pairs with a positive margin,
            as in the sDPO paper. A number cuts the pool into that many equal steps by margin, large to small, whatever
            the source; that form is ours.
    """

    def __init__(self, parts: int | None = None) -> None:
        self.parts = None if parts is None else _positive(parts)

    def next(self, step: int, pool: Pool) -> Tensor | None:
        """The easiest pairs that are left.

        Raises:
            ValueError: There are fewer pairs than steps, or no policy.
        """
        return _nth(_easy_to_hard(self.parts, pool), step)


class HardToEasy(Partition):
    """The steps of `EasyToHard` in the opposite order: first what the first model prefers least.

    Args:
        parts: As of `EasyToHard`: `None` orders whole sources, a number cuts the pool into that many equal steps.
    """

    def __init__(self, parts: int | None = None) -> None:
        self.parts = None if parts is None else _positive(parts)

    def next(self, step: int, pool: Pool) -> Tensor | None:
        """The hardest pairs that are left.

        Raises:
            ValueError: There are fewer pairs than steps, or no policy.
        """
        return _nth(_easy_to_hard(self.parts, pool)[::-1], step)


def _easy_to_hard(parts: int | None, pool: Pool) -> list[Tensor]:
    _refuse_empty(parts or 1, pool)
    margins = pool.margins(0)
    if parts is not None:
        order = margins.argsort(descending=True, stable=True)
        return [rows.sort().values for rows in order.tensor_split(parts)]
    by_source = [_rows_of(name, pool.sources) for name in dict.fromkeys(pool.sources)]
    return sorted(by_source, key=lambda rows: -(margins[rows] > 0).double().mean().item())


def _nth(steps: Sequence[Tensor], step: int) -> Tensor | None:
    return steps[step] if step < len(steps) else None


def _rows_of(name: str, sources: Sequence[str]) -> Tensor:
    return torch.tensor([i for i, source in enumerate(sources) if source == name])


def _refuse_empty(parts: int, pool: Pool) -> None:
    if parts > pool.rows:
        raise ValueError(f"`parts` is {parts}, but there are only {pool.rows} pairs to split.")


def _positive(parts: int) -> int:
    if parts < 1:
        raise ValueError(f"`parts` must be at least 1, got {parts}.")
    return parts
