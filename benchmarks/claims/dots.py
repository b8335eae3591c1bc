"""Arms below each other, a dot a seed, with the mean and its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claim import Mean
from figure import COLOURS, label


def dots(axes: Any, values: Mapping[str, Sequence[float]], x: str, title: str = "", line: float | None = None) -> None:
    """Draw one value a seed for each arm, the first arm on top.

    Args:
        axes: Of matplotlib.
        values: By the name of the arm.
        x: What the values are.
        title: Above.
        line: Where a vertical line stands, such as at zero.
    """
    for place, of in enumerate(values.values()):
        mean = Mean.of(of)
        half = mean.half if len(of) > 1 else 0.0
        axes.errorbar(mean.value, place, xerr=half, fmt="o", color=COLOURS[0], markersize=8, capsize=4, linewidth=2)
        axes.scatter(of, [place + 0.22] * len(of), s=14, color=COLOURS[1], zorder=3)
    if line is not None:
        axes.axvline(line, color="#555555", linestyle="--", linewidth=1)
    label(axes, x, "", title)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
