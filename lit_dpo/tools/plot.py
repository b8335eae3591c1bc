"""What runs have logged, as pictures: one page for people, one file of pictures, or a few lines of a terminal."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_dpo.plain_text import plain
from lit_dpo.tools import page
from lit_dpo.tools.runs import Series, find_run, metrics

_STAGES = {"train": ":", "val": "-"}  # and the style of their lines
_BARS = "▁▂▃▄▅▆▇█"
_LENGTHS = ("longer", "shorter")


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: What it shows, with the unit.
        names: Metrics without their stage; those that were not logged are left out.
    """

    title: str
    names: tuple[str, ...]


PANELS = (
    Panel("loss", ("loss",)),
    Panel("reward margin", ("rewards/margins",)),
    Panel("reward accuracy", ("rewards/accuracies",)),
    Panel("accuracy by length of chosen", tuple(f"accuracy, chosen {length}" for length in _LENGTHS)),
    Panel("log-prob of chosen and rejected (nats)", ("logps/chosen", "logps/rejected")),
    Panel("displacement (share of pairs)", ("displacement",)),
    Panel("gradient norm", ("grad_norm",)),
    Panel("learning rate", ("lr",)),
)


def plot_runs(
    runs: list[str] = [],  # noqa: B006 - read only
    output: str | None = None,
    watch: float = 0,
    overwrite: bool = False,
) -> None:
    """Show the curves of one run or several: loss, margins, accuracies, log-probs, displacement, gradient, rate.

    On the terminal a line each, with the first and the last value. A file gets the pictures; they need the package's
    extra `tools`.

    Args:
        runs: Folders of runs, or `last` for the newest.
        output: A file to write: `.html`, one page that needs nothing else, or `.png`; none is only printed.
        watch: Seconds after which to draw again what has changed, until Ctrl-C; 0 draws once. Until then a page reads
            itself again.
        overwrite: Replace that file.

    Raises:
        FileNotFoundError: There is no such run, or it has logged nothing yet.
        ValueError: An option is out of its range.
        FileExistsError: `output` exists already.
        ImportError: `output` is given and matplotlib is not installed.
    """
    if not runs:
        raise ValueError("No run is given: name the folder of a run, or `last` for the newest.")
    if watch < 0:
        raise ValueError(f"`watch` must be 0 or more seconds, got {watch}.")
    if output is not None:
        page.refuse_taken(output, overwrite, endings=(".html", ".png"))
        _matplotlib()
    # Told apart by as much of their paths as the user gave; a newer run does not take the place of one that is watched.
    folders = {name: find_run(name).folder for name in runs}
    shown: dict[str, dict[str, Series]] = {}
    said = ""
    try:
        while True:
            found, lacking = _found(folders)
            if lacking and not watch:
                raise FileNotFoundError(lacking)
            if lacking and lacking != said:
                print(lacking, flush=True)
                said = lacking
            if found and found != shown:
                _print(found, alone=bool(watch))
                if output is not None:
                    page.write(output, _file(found, output, watch), overwrite)
                    overwrite = True  # from now on it is ours
                    print(f"Wrote {output}", flush=True)
                shown = found
            if not watch:
                return
            time.sleep(watch)
    except KeyboardInterrupt:
        if output is not None and shown:
            page.write(output, _file(shown, output, 0), overwrite)  # which no longer reads itself again
        raise


def _found(folders: Mapping[str, Path]) -> tuple[dict[str, dict[str, Series]], str]:
    """What the runs have logged by now; or nothing, and the sentence that one has not begun to."""
    runs = {name: find_run(folder) for name, folder in folders.items()}
    try:
        return {name: with_lengths(metrics(run)) for name, run in runs.items()}, ""
    except FileNotFoundError as error:
        return {}, str(error)


def with_lengths(found: Mapping[str, Series]) -> dict[str, Series]:
    """The same metrics, and the accuracies among pairs whose chosen completion is longer, or shorter."""
    more: dict[str, Series] = dict(found)
    for stage in _STAGES:
        for length in _LENGTHS:
            shares = dict(found.get(f"{stage}/length/{length}", []))
            won = found.get(f"{stage}/length/{length}_won", [])
            series = [(step, value / shares[step]) for step, value in won if shares.get(step)]
            if series:
                more[f"{stage}/accuracy, chosen {length}"] = series
    return more


def _full(stage: str, name: str) -> str:
    """The name that a metric is logged by."""
    return name if name == "lr" else f"{stage}/{name}"


def _of(found: Mapping[str, Series], name: str) -> dict[str, Series]:
    """The series of a metric by stage; the learning rate has none."""
    names = {"train": name} if name in found else {stage: f"{stage}/{name}" for stage in _STAGES}
    return {stage: found[full] for stage, full in names.items() if full in found}


# -- terminal ---------------------------------------------------------------------------------------------------------


def _print(found: Mapping[str, Mapping[str, Series]], alone: bool = False) -> None:
    console = page.terminal()
    if alone and console.is_terminal:
        console.clear()
    width = max(8, min(40, console.width - 60))  # of a curve
    for run, values in found.items():
        steps = [series[place][0] for series in values.values() for place in (0, -1)]
        title = f"{plain(run)}, steps {min(steps):,} to {max(steps):,}"
        table = Table("metric", "curve", "first", "last", title=title, title_justify="left", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for panel in PANELS:
            for name in panel.names:
                for stage, series in _of(values, name).items():
                    first, last = (page.number(series[place][1]) for place in (0, -1))
                    table.add_row(_full(stage, name), curve(series, width), first, last)
        console.print(table)


def curve(series: Series, width: int) -> str:
    """A series in one line of text: means over equal shares of the steps, from its lowest bar to its highest.

    >>> curve([(0, 1.0), (1, 2.0), (2, 3.0), (3, 8.0)], 4)
    '▁▂▃█'
    """
    values = [value for _, value in series if value == value and abs(value) != float("inf")]
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * n // width for n in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


# -- pictures ---------------------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: `pip install 'lit-dpo[tools]'` gets it, or leave "
            "`output` out for curves in the terminal."
        ) from error
    return matplotlib


def _file(found: Mapping[str, Mapping[str, Series]], output: str, watch: float) -> str | bytes:
    panels = [panel for panel in PANELS if any(_of(values, name) for values in found.values() for name in panel.names)]
    if output.endswith(".png"):
        return draw(found, panels)
    drawn = [(panel.title, draw(found, [panel]), draw(found, [panel], dark=True)) for panel in panels]
    rows = [
        (run, _full(stage, name), series[0][1], series[-1][1], series[-1][0])
        for run, values in found.items()
        for panel in panels
        for name in panel.names
        for stage, series in _of(values, name).items()
    ]
    table = page.table(("run", "metric", "first", "last", "at step"), rows)
    parts = [page.pictures(drawn), page.heading("Values"), table]
    return page.page(", ".join(found), parts, refresh=max(1, round(watch)) if watch else 0)


def draw(found: Mapping[str, Mapping[str, Series]], panels: Sequence[Panel], dark: bool = False) -> bytes:
    """A PNG file with a panel each: training dotted, validation solid, a colour a run and metric."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    text, back = ("#e6edf3", "#0d1117") if dark else ("#1f2328", "#ffffff")
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    look = {**dict.fromkeys(keys, text), "axes.facecolor": back, "legend.facecolor": back, "font.size": 9}
    look["text.parse_math"] = False  # a `$` in a name is one
    colours = matplotlib.colormaps["tab10"].colors
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.0 * columns, 3.2 * lines), dpi=120, facecolor=back, layout="constrained")
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, number + 1, title=panel.title, xlabel="step")
            axes.locator_params(axis="x", integer=True)
            stages = {stage for values in found.values() for name in panel.names for stage in _of(values, name)}
            drawn = 0
            for run, values in found.items():
                for name in panel.names:
                    series = _of(values, name)
                    for stage, points in series.items():
                        label = ", ".join(
                            [
                                *([run] if len(found) > 1 else []),
                                *([name.rpartition("/")[2].removeprefix("accuracy, ")] if len(panel.names) > 1 else []),
                                *([stage] if len(stages) > 1 else []),
                            ]
                        )
                        style = _STAGES[stage] if len(points) > 1 else "."
                        style = "-" if len(stages) == 1 and len(points) > 1 else style
                        colour = colours[drawn % len(colours)]
                        axes.plot(*zip(*points, strict=True), style, color=colour, label=label or None)
                    drawn += 1
            axes.grid(alpha=0.25)
            if axes.get_legend_handles_labels()[0]:
                many = len(axes.get_legend_handles_labels()[0]) > 4  # too many to stand among the curves
                place = (
                    {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2} if many else {"framealpha": 0.6}
                )
                axes.legend(fontsize=7 - many, **place)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
