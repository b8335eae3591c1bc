"""How often the pairs of each source are seen in an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def drawn(
    rows: Tensor, sources: Sequence[str], weights: Mapping[str, float] | None, most: int | None, seed: int
) -> Tensor:
    """Row numbers to train on in an epoch, those of a source as often as its weight says.

    Args:
        rows: Row numbers, each once.
        sources: Source of every row of the data set.
        weights: Source -> how often each of its rows is seen: 2 is twice, 0.5 is half of them, 1 where none is given.
        most: Most rows of a source, before weights; `None` for all.
        seed: Of the draws.

    Raises:
        ValueError: A weight is below 0, is one of a source that is not there, or nothing is left.

    >>> drawn(torch.arange(3), ["a", "a", "b"], {"b": 2}, None, 0).tolist()
    [0, 1, 2, 2]
    """
    if not weights and most is None:
        return rows
    names = [sources[row] for row in rows.tolist()]
    for name, weight in (weights or {}).items():
        if name not in names:
            there = ", ".join(dict.fromkeys(names))
            raise ValueError(f"`weights` names `{name}`, which is no source of training pairs: name some of {there}.")
        if weight < 0:
            raise ValueError(f"A weight of a source must be at least 0, got {weight} for `{name}`.")
    found = []
    for number, name in enumerate(dict.fromkeys(names)):
        of = rows[torch.tensor([other == name for other in names])]
        generator = torch.Generator().manual_seed(seed + number)
        if most is not None:
            of = _some(of, most, generator)
        weight = (weights or {}).get(name, 1.0)
        whole = int(weight)
        found += [of] * whole + [_some(of, round((weight - whole) * len(of)), generator)]
    result = torch.cat(found).sort().values
    if not len(result):
        raise ValueError("`weights` leaves no pair to train on: give a source a weight above 0.")
    return result


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many rows, drawn at random, in their order."""
    if count >= len(rows):
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].sort().values]
