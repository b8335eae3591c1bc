"""Ordered partitions of the training pairs, for stepwise DPO: every pair in exactly one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor


class Partition(ABC):
    """Splits the pool of training pairs into an ordered list of parts.

    With more than one part, training runs one part after the other, and the policy at the end of one is the reference
    of the next (stepwise DPO, https://arxiv.org/abs/2403.19270).
    """

    needs_margins: ClassVar[bool] = False

    @abstractmethod
    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """Row numbers of each part, in training order.

        Args:
            sources: Name of the data source of every pair of the pool.
            margins: For a partition that `needs_margins`: log-prob of chosen minus rejected under the starting model
                in nats, shape ``(pairs,)``.

        Returns:
            One int64 tensor a part, none empty, together every row number once.

        Raises:
            ValueError: The pool cannot be split this way.
        """


class OneShot(Partition):
    """Everything at once: plain training."""

    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """A single part."""
        return [torch.arange(len(sources))]


class BySource(Partition):
    """One part per data source, as in the sDPO paper.

    Args:
        order: Names of the sources in training order; empty means the order in which they are given to the data
            module. Names are those that the load report prints.
    """

    def __init__(self, order: Sequence[str] = ()) -> None:
        self.order = tuple(order)

    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """One part per source, in order."""
        found = list(dict.fromkeys(sources))
        if self.order and sorted(self.order) != sorted(found):
            raise ValueError(
                f"`order` names {', '.join(self.order)}, but the data have the sources {', '.join(found)}."
            )
        return [_rows_of(name, sources) for name in self.order or found]


class RandomSplit(Partition):
    """Parts of equal size drawn at random: the sDPO paper's ablation.

    Args:
        parts: Number of parts, at least 1.
        seed: Of the draw.
    """

    def __init__(self, parts: int = 2, seed: int = 0) -> None:
        self.parts, self.seed = _positive(parts), seed

    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """Equal random parts; the first ones take the remainder."""
        order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(self.seed))
        return [part.sort().values for part in _equal(order, self.parts)]


class EasyToHard(Partition):
    """Parts ordered from what the starting model already prefers to what it does not.

    Args:
        parts: ``None`` orders whole sources by the starting model's accuracy, the share of pairs with a positive
            margin, as in the sDPO paper. A number cuts the pool into that many equal parts by margin, large to small,
            whatever the source; that form is ours.
    """

    needs_margins = True

    def __init__(self, parts: int | None = None) -> None:
        self.parts = None if parts is None else _positive(parts)

    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """Easy parts first."""
        if margins is None:
            raise ValueError("`EasyToHard` needs the starting model's margins: run it through `fit_stepwise`.")
        if self.parts is not None:
            order = margins.argsort(descending=True, stable=True)
            return [part.sort().values for part in _equal(order, self.parts)]
        by_source = [_rows_of(name, sources) for name in dict.fromkeys(sources)]
        return sorted(by_source, key=lambda rows: -(margins[rows] > 0).double().mean().item())


class HardToEasy(Partition):
    """The parts of `EasyToHard` in the opposite order: first what the starting model prefers least.

    Args:
        parts: As of `EasyToHard`: ``None`` orders whole sources, a number cuts the pool into that many equal parts.
    """

    needs_margins = True

    def __init__(self, parts: int | None = None) -> None:
        self.parts = None if parts is None else _positive(parts)

    def split(self, sources: Sequence[str], margins: Tensor | None = None) -> list[Tensor]:
        """Hard parts first."""
        if margins is None:
            raise ValueError("`HardToEasy` needs the starting model's margins: run it through `fit_stepwise`.")
        return EasyToHard(self.parts).split(sources, margins)[::-1]


def _rows_of(name: str, sources: Sequence[str]) -> Tensor:
    return torch.tensor([i for i, source in enumerate(sources) if source == name])


def _equal(order: Tensor, parts: int) -> list[Tensor]:
    if parts > len(order):
        raise ValueError(f"`parts` is {parts}, but there are only {len(order)} pairs to split.")
    return list(order.tensor_split(parts))


def _positive(parts: int) -> int:
    if parts < 1:
        raise ValueError(f"`parts` must be at least 1, got {parts}.")
    return parts
