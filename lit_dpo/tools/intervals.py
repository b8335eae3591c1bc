"""Shares with 95 % intervals that know of prompts which stand in several rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_Z = 1.959964  # of the normal distribution at 97.5 %


@dataclass(frozen=True)
class Share:
    """A share and its 95 % interval.

    Args:
        value: In [0, 1].
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def share(values: Array, clusters: Array, strata: Array | None = None) -> Share:
    """The mean of values in [0, 1], and the range that holds the true one in 95 of 100 data sets.

    Wilson's interval, with the number of independent values in the place of the number of rows, and Student's
    distribution in the place of the normal one. Rows of one cluster may agree with each other in any way: the variance
    is that of the sums over clusters. With values that are all alike, each cluster counts as one value.

    Source: Wilson, Probable inference, 1927; Korn and Graubard, Confidence intervals for proportions with small
    expected number of positive counts estimated from survey data, 1998.

    Args:
        values: Shape `(rows,)`; 0 and 1, and one half for a tie.
        clusters: Which rows belong together, such as those of one prompt; whole numbers, shape `(rows,)`.
        strata: Take the mean of the means of these groups, however many rows each has; shape `(rows,)`.

    >>> found = share(np.array([1.0] * 8 + [0.0] * 2), np.arange(10))
    >>> found.value, round(found.low, 2), round(found.high, 2)
    (0.8, 0.43, 0.96)
    """
    groups = np.zeros(len(values), dtype=int) if strata is None else np.unique(strata, return_inverse=True)[1]
    sizes = np.bincount(groups)
    means = np.bincount(groups, values) / sizes
    value = float(means.mean())
    residuals = (values - means[groups]) / (sizes[groups] * len(sizes))
    _, of = np.unique(clusters, return_inverse=True)
    count = int(of.max()) + 1
    if count < 2:
        return Share(value, 0.0, 1.0)
    variance = float((np.bincount(of, residuals) ** 2).sum()) * count / (count - 1)
    spread = value * (1 - value)
    alone = [len(np.unique(clusters[groups == group])) for group in range(len(sizes))]
    alike = variance == 0 or spread == 0
    counts = np.array(alone) if alike else sizes
    near = (means * counts + 2) / (counts + 4)  # of means of 0 and 1, something between
    # What tells the groups apart is no chance.
    within = float((near * (1 - near) / counts).sum()) / len(counts) ** 2
    most = max(_worth(counts), spread / within)
    size = most if alike else min(spread / variance, most)
    z = _student(count - 1)
    middle = (value + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(spread / size + z * z / (4 * size * size))
    return Share(
        value, min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half))
    )  # whatever the rounding


def _worth(counts: Iterable[int]) -> float:
    """How many independent values the mean of the means of groups is worth; of one group, as many as it has."""
    shares = [1 / count for count in counts]
    return len(shares) ** 2 / sum(shares)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, by its expansion around the normal one."""
    if freedom < 3:
        return {1: 12.7062, 2: 4.302653}[freedom]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
