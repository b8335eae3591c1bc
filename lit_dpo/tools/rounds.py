"""What each round of a run did, from the records that it left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_dpo.checkpoints.claim import number_of
from lit_dpo.files import read_json
from lit_dpo.plain_text import plain
from lit_dpo.rounds.base import RECORD
from lit_dpo.rounds.measured import got_worse
from lit_dpo.stepwise import DONE
from lit_dpo.tools import page
from lit_dpo.tools.runs import FinishedRun, find_run, metrics

_NAMES = {
    "prompts": "prompts",
    "mixed": "prompts whose scores differ",
    "pairs": "pairs",
    "completions": "completions",
    "finished": "completions with an end",
    "empty": "empty completions",
    "duplicates": "duplicate completions",
    "no_opinion": "completions without an opinion",
    "agreement": "learned judge agrees with gold",
    "agreement_of": "gold labels that this is of",
}
_SHARES = {"mixed", "finished", "agreement"}
_MEASURED = {"greedy", "greedy_after", "trusted", "round", "seconds", "without_pair"}
_WIDEST = 34  # columns of a terminal for what a line is about
_COLUMN = 12  # the same for a round

Lines = dict[str, list[str]]


def show_rounds(run: str, output: str | None = None, overwrite: bool = False) -> None:
    """Show what each round of a run did: prompts, pairs, duplicates, the judge, greedy answers, and the time.

    Args:
        run: The folder of a run whose steps made their pairs themselves, or `last` for the newest run.
        output: A page to write, `.html`; none is only printed.
        overwrite: Replace that file.

    Raises:
        FileNotFoundError: There is no such run, or it has no rounds.
        ValueError: A record is damaged, or `output` is of another kind.
        FileExistsError: `output` exists already.
    """
    if output is not None:
        page.refuse_taken(output, overwrite, endings=[".html"])
    folder, records = read_rounds(run)
    numbers = [f"round {record['round']}" for record in records]
    try:
        lines, said = lines_of(records), list(sentences(records))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"A `{RECORD}` in `{folder}` is no record of a round: restore it.") from error
    console = page.terminal()
    at_once = max(1, (console.width - _WIDEST) // _COLUMN)
    for first in range(0, len(numbers), at_once):
        some = slice(first, first + at_once)
        table = Table("", title=plain(run), title_justify="left", box=None, pad_edge=False)
        for name in numbers[some]:
            table.add_column(name, justify="right", max_width=_COLUMN, overflow="fold")
        for name, values in lines.items():
            table.add_row(plain(name), *values[some])
        console.print(table)
        console.print()
    for sentence in said:
        console.print(sentence)
    if output is not None:
        rows = [(name, *values) for name, values in lines.items()]
        parts = [*map(page.paragraph, said), page.table(("", *numbers), rows)]
        page.write(output, page.page(f"Rounds of {folder}", parts), overwrite)
        print(f"Wrote {output}", flush=True)


def read_rounds(run: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run, and the record of each round with what its training left.

    Raises:
        FileNotFoundError: There is no such run, or it has no rounds.
        ValueError: A record is damaged.
    """
    folder = Path(run)
    if not any(folder.glob(f"partition_*/{RECORD}")):
        folder = find_run(run).folder
    roots = sorted((path.parent for path in folder.glob(f"partition_*/{RECORD}")), key=_number)
    if not roots:
        raise FileNotFoundError(
            f"`{folder}` has no rounds: give a run whose partition makes its pairs itself, such as `OnPolicy`."
        )
    return folder, [_read(root) for root in roots]


def _read(root: Path) -> dict[str, Any]:
    path = root / RECORD
    record = read_json(path)
    if not isinstance(record.get("round"), int) or not isinstance(record.setdefault("seconds", {}), dict):
        raise ValueError(f"`{path}` is no record of a round: restore it.")
    if (root / DONE).exists() and isinstance(seconds := read_json(root / DONE).get("seconds"), int | float):
        record["seconds"]["training"] = seconds
    try:
        found = metrics(FinishedRun(root, tuple(sorted(root.glob("version_*"), key=number_of)[-1:])))
    except FileNotFoundError:
        found = {}
    if series := found.get("val/displacement"):
        record["displacement"] = series[-1][1]
    return record


def _number(root: Path) -> int:
    return number_of(root, "partition")


def lines_of(records: list[dict[str, Any]]) -> Lines:
    """What to show: for each line what it is about, and a value a round."""
    found: dict[str, dict[int, str]] = {name: {} for name in _NAMES.values()}

    def note(number: int, name: str, text: str) -> None:
        found.setdefault(name, {})[number] = text

    for number, record in enumerate(records):
        for key, value in record.items():
            counted = isinstance(value, int | float) and not isinstance(value, bool)
            if key not in _MEASURED and key != "displacement" and counted:
                text = f"{value:.1%}" if key in _SHARES else page.number(value)
                note(number, _NAMES.get(key, key.replace("_", " ")), text)
    for number, record in enumerate(records):
        for reason, count in record.get("without_pair", {}).items():
            note(number, f"no pair: {reason}", page.number(count))
    for number, record in enumerate(records):
        if "trusted" in record:
            note(number, "judge agrees with trusted pairs", _with_error(record["trusted"], "share"))
    for number, record in enumerate(records):
        for name, key in {"greedy, judged, at the start": "greedy", "the same after the round": "greedy_after"}.items():
            after = record.get(key) or (key == "greedy_after" and _next(records, number).get("greedy"))
            if after:
                note(number, name, _with_error(after, "score"))
    for number, record in enumerate(records):
        if "displacement" in record:
            note(number, "displacement in validation", f"{record['displacement']:.3f}")
    for number, record in enumerate(records):
        for stage, seconds in record.get("seconds", {}).items():
            note(number, f"seconds of {stage}", f"{seconds:,.1f}")
    return {name: [values.get(n, "") for n in range(len(records))] for name, values in found.items() if values}


def sentences(records: list[dict[str, Any]]) -> Iterator[str]:
    """What the numbers are, and what a person should not overlook."""
    if any(key in record for record in records for key in ("trusted", "greedy", "greedy_after")):
        yield "± is half of a 95 % interval."
    for before, now in pairwise(records):
        if "trusted" in before and "trusted" in now and got_worse(before["trusted"], now["trusted"]):
            shares = [f"{one['trusted']['share']:.0%}" for one in (before, now)]
            yield (
                f"The judge got worse in round {now['round']}: it agrees with {shares[1]} of the trusted pairs, and "
                f"did with {shares[0]} before."
            )


def _next(records: list[dict[str, Any]], number: int) -> Mapping[str, Any]:
    return records[number + 1] if number + 1 < len(records) else {}


def _with_error(value: Mapping[str, Any], name: str) -> str:
    return f"{value[name]:.3f} ±{value['error']:.3f}"
