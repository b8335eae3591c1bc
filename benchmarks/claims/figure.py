"""How figures look: large enough to read at a width of 600 pixels, in colours that colour-blind people tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
"""Okabe and Ito's."""
SIZE = (7.2, 4.2)  # inches; 1080 pixels wide at 150 a inch, so 11 points are 13 pixels at a width of 600


def new() -> Figure:
    """An empty figure."""
    return Figure(figsize=SIZE, dpi=150, layout="constrained")


def label(axes: Any, x: str, y: str, title: str = "") -> None:
    """Name the axes, in letters of a size that can be read."""
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def band(axes: Any, x: Sequence[float], rows: Any, colour: str, name: str) -> None:
    """The median with a band from the 10th to the 90th percentile, of values of shape `(points, len(x))`."""
    low, middle, high = np.percentile(np.asarray(rows, dtype=float), [10, 50, 90], axis=0)
    axes.plot(x, middle, color=colour, label=name, linewidth=2)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without anything that another run would write otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
