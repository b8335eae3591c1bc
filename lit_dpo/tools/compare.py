"""Whether runs differ on the same rows: paired bootstrap intervals, corrected for the number of differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lit_dpo.plain_text import plain
from lit_dpo.tools import page
from lit_dpo.tools.runs import read_lines, source_of

Array = NDArray[np.float64]
Row = dict[str, float]
_RESAMPLES = 4000
_FEWEST = 10  # rows of a group that is looked at by itself
_CHUNK = 1 << 23  # numbers of a resampling in memory
_LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """How one setting differs from another in one respect.

    Args:
        first: The setting that is compared with.
        second: The one that is compared.
        what: The metric, and the rows it is taken over.
        rows: How many rows there are.
        values: Its mean under each.
        difference: Second minus first.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p: Two-sided, of no difference.
        corrected: The same after Holm's correction for all differences of the report.
    """

    first: str
    second: str
    what: str
    rows: int
    values: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float
    corrected: float = 1.0

    @property
    def found(self) -> bool:
        """Whether there is a difference at 95 %, all that were looked at together."""
        return self.corrected < _LEVEL

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.found:
            return "no difference"
        return "higher" if self.difference > 0 else "lower"


def read_predictions(path: Path) -> dict[str, Row]:
    """Values by row of a file that `lit-dpo predict` wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else.
    """
    lines = read_lines(path, ("row", "margin", "logp_chosen"), "predictions of `lit-dpo predict`")
    names = ("margin", "logp_chosen", "chosen_tokens", "rejected_tokens")
    try:
        return {str(line["row"]): {name: float(line[name]) for name in names if name in line} for line in lines}
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{path}` holds values that are no numbers: predict again.") from error


def compare(settings: Mapping[str, Sequence[Mapping[str, Row]]], seed: int = 0) -> list[Difference]:
    """All differences between settings, each setting compared with those before it.

    Rows are resampled, the same for both settings. If a setting has several runs, the n-th run of one is paired with
    the n-th of the other, and the intervals cover the spread between runs as well. With one run each, they are about
    these two runs alone: equal settings with another seed may differ by more.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Holm, Scand. J. Statist. 6, 1979.

    Args:
        settings: By name the runs of a setting, each with values by row.
        seed: Of the resampling.

    Raises:
        ValueError: Fewer than two settings, settings with different numbers of runs, or no row in common.
    """
    if len(settings) < 2:
        raise ValueError("To compare takes two runs or more: name another one.")
    found = []
    for (first, a), (second, b) in combinations(settings.items(), 2):
        if len(a) != len(b):
            raise ValueError(
                f"`{first}` has {len(a)} runs and `{second}` {len(b)}: give equally many, those of equal seeds in the "
                "same order."
            )
        pairs = list(zip(a, b, strict=True))
        common = [[row for row in x if row in y] for x, y in pairs]
        rows = sorted({row for each in common for row in each})
        if not all(common):
            raise ValueError(
                f"`{first}` and `{second}` have no validation row in common: compare runs with the same data."
            )
        for what, value, kept in _respects(rows, pairs):
            values = [_table(rows, [pair[side] for pair in pairs], common, value, kept) for side in (0, 1)]
            found.append(_difference(first, second, what, values[0], values[1], np.random.default_rng(seed)))
    return _holm(found)


def _respects(
    rows: Sequence[str], pairs: Sequence[tuple[Mapping[str, Row], Mapping[str, Row]]]
) -> list[tuple[str, Callable[[Row], float], set[str]]]:
    """What is looked at: a name, the value of a row, and the rows."""
    known = {row: values for pair in pairs for side in pair for row, values in side.items()}
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(f"source {source_of(row)}", set()).add(row)
    if len(groups) == 1:
        groups = {}
    if all("rejected_tokens" in known[row] for row in rows):
        for row in rows:
            difference = known[row]["chosen_tokens"] - known[row]["rejected_tokens"]
            length = "longer" if difference > 0 else "shorter" if difference < 0 else "as long"
            groups.setdefault(f"chosen {length}", set()).add(row)
    everything = set(rows)
    found: list[tuple[str, Callable[[Row], float], set[str]]] = [("accuracy", _won, everything)]
    if same_tokens(pairs):
        found.append(("log-prob chosen", lambda values: values["logp_chosen"], everything))
    return found + [(what, _won, kept) for what, kept in groups.items() if _FEWEST <= len(kept) < len(rows)]


def same_tokens(pairs: Sequence[tuple[Mapping[str, Row], Mapping[str, Row]]]) -> bool:
    """Whether both sides cut the rows into as many tokens, without which log-probs are not comparable."""
    return all(
        x[row].get(name) == y[row].get(name)
        for x, y in pairs
        for row in x
        if row in y
        for name in ("chosen_tokens", "rejected_tokens")
    )


def _won(values: Row) -> float:
    """1 for a pair whose chosen reward lies above, one half for a tie."""
    return (float(np.sign(values["margin"])) + 1) / 2


def _table(
    rows: Sequence[str],
    runs: Sequence[Mapping[str, Row]],
    common: Sequence[Sequence[str]],
    value: Callable[[Row], float],
    kept: set[str],
) -> Array:
    """Values of shape (runs, rows), NaN where a run does not have a row."""
    table = np.full((len(runs), len(rows)), np.nan)
    places = {row: place for place, row in enumerate(rows)}
    for number, (run, own) in enumerate(zip(runs, common, strict=True)):
        for row in own:
            if row in kept:
                table[number, places[row]] = value(run[row])
    return table[:, ~np.isnan(table).all(0)]


def _difference(first: str, second: str, what: str, a: Array, b: Array, rng: np.random.Generator) -> Difference:
    d = b - a  # (runs, rows)
    there = ~np.isnan(d)
    means = np.nan_to_num(d).sum(1) / np.maximum(there.sum(1), 1)
    samples = resampled(d, rng)
    # Of the two tails the smaller one; one resample more in each, so that no p is zero.
    tail = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    low, high = np.quantile(samples, [_LEVEL / 2, 1 - _LEVEL / 2])
    return Difference(
        first,
        second,
        what,
        d.shape[1],
        (float(np.nanmean(a)), float(np.nanmean(b))),
        float(means.mean()),
        float(low),
        float(high),
        min(1.0, 2 * (tail + 1) / (len(samples) + 1)),
    )


def resampled(differences: Array, rng: np.random.Generator) -> Array:
    """Means of differences over resampled rows, with the spread between runs where there are several, (resamples,).

    The spread of a resample of n is too small by the factor `sqrt((n - 1) / n)`, which is made good. Runs are too few
    to be resampled: 95 % intervals from 2 or 3 of equal settings would miss the truth in a fifth of all cases or more.
    Their spread is drawn from Student's t, with one degree of freedom less than there are runs.

    Args:
        differences: Shape (runs, rows), NaN where a run does not have a row.
        rng: Random numbers.
    """
    runs, rows = differences.shape
    there = (~np.isnan(differences)).astype(float)
    values = np.nan_to_num(differences)
    found = []
    for start in range(0, _RESAMPLES, size := max(1, _CHUNK // rows)):
        count = min(size, _RESAMPLES - start)
        drawn = rng.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(float)
        found.append((weights @ values.T) / np.maximum(weights @ there.T, 1.0))  # (count, runs)
    each = np.concatenate(found)
    centre = values.sum(1) / np.maximum(there.sum(1), 1)
    each = centre + (each - centre) * np.sqrt(rows / max(1, rows - 1))
    mean: Array = each.mean(1)
    if runs > 1:
        mean = mean + centre.std(ddof=1) / np.sqrt(runs) * rng.standard_t(runs - 1, len(each))
    return mean


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Holm's correction: the smallest p times the number of differences, the next times one less, never falling."""
    corrected, highest = list(found), 0.0
    for rank, place in enumerate(sorted(range(len(found)), key=lambda n: found[n].p)):
        highest = max(highest, min(1.0, found[place].p * (len(found) - rank)))
        corrected[place] = replace(found[place], corrected=highest)
    return corrected


# -- showing ----------------------------------------------------------------------------------------------------------


def sentences(found: Sequence[Difference], runs: int) -> list[str]:
    """What was found, a sentence a pair of settings, and what the intervals are about."""
    said = []
    for each in (each for each in found if each.what == "accuracy"):
        numbers = f"{each.values[1]:.3f} against {each.values[0]:.3f} over {each.rows:,} rows"
        interval = f"difference {each.difference:+.3f}, 95 % interval {each.low:+.3f} to {each.high:+.3f}"
        others = [d for d in found if (d.first, d.second) == (each.first, each.second) and d.found and d != each]
        named = "; ".join(f"{d.what} ({d.verdict})" for d in others)
        more = f" Differences in: {named}." if others else ""
        if each.found:
            better = "better" if each.difference > 0 else "worse"
            said.append(f"{each.second} is {better} than {each.first}: accuracy {numbers} ({interval}).{more}")
        else:
            said.append(f"{each.second} and {each.first}: no difference in accuracy, {numbers} ({interval}).{more}")
    about = (
        "The intervals cover the rows alone: they are about these very runs, and two runs of equal settings with other "
        "seeds may differ by more. To compare settings, train several seeds of each with `--train`."
        if runs == 1
        else f"The intervals are about the settings, with {runs} runs of each: they cover the rows and the seeds."
    )
    if all("log-prob" not in each.what for each in found):
        about = f"Log-probs are not compared, because the runs cut the rows into other tokens. {about}"
    about += " Accuracy is meant where a line says nothing else; log-probs are in nats, and p"
    return [*said, f"{about} is corrected for {len(found)} differences (Holm)."]


def show(found: Sequence[Difference], runs: int) -> None:
    """Print the table and the sentences."""
    console = page.terminal()
    for pair in dict.fromkeys((each.first, each.second) for each in found):
        table = Table("", "rows", "first", "second", "change", "95 % interval", "p", "", box=None, pad_edge=False)
        table.collapse_padding = True
        for column in table.columns[1:]:
            column.no_wrap = True
        for column in table.columns[1:7]:
            column.justify = "right"
        for each in (each for each in found if (each.first, each.second) == pair):
            table.add_row(plain(each.what), *map(str, _cells(each)), each.verdict)
        console.print(f"first: {pair[0]}\nsecond: {pair[1]}")
        console.print(table)
    for sentence in sentences(found, runs):
        console.print(plain(sentence))


def _cells(each: Difference) -> list[Any]:
    values = [f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in each.values]
    difference, low, high = (
        f"{value:+.3f}" if abs(value) < 1 else f"{value:+.2f}" for value in (each.difference, each.low, each.high)
    )
    return [each.rows, *values, difference, f"{low} {high}", f"{each.corrected:.2g}"]


def html(found: Sequence[Difference], runs: int) -> str:
    """The same as a page."""
    head = ("", "second is", "change", "95 % interval", "p", "rows", "first", "second")
    parts = [*map(page.paragraph, sentences(found, runs))]
    for first, second in dict.fromkeys((each.first, each.second) for each in found):
        mine = [(each, *_cells(each)) for each in found if (each.first, each.second) == (first, second)]
        rows = [(each.what, each.verdict, *cells[3:], *cells[:3]) for each, *cells in mine]
        parts += [page.heading(f"first: {first}, second: {second}"), page.table(head, rows)]
    return page.page("Comparison of runs", parts)
