"""Training rows whose label is probably wrong, by what training itself saw of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from lit_dpo.data.rows import Pair
from lit_dpo.plain_text import plain
from lit_dpo.tools import page
from lit_dpo.tools.runs import FinishedRun, config_of, find_run, pairs_at, read_lines, shown

RECORDED = "margins.jsonl"
LIMITS = (
    "The list holds rows against the majority's tendency: where length alone tells chosen from rejected, it says "
    "little more than length. Where the list is as long as there are wrong labels, about half of its rows are good. "
    "Read them; nothing is dropped, and training without them was seldom better than plain DPO. Three epochs or more "
    "tell most."
)
_HIGH = 0.7  # rank correlation from which the list is mostly one of lengths
_MOSTLY_LENGTH = ", so that this list is mostly one of lengths"
_SHOWN = 10  # rows in the terminal
_CUT = 300  # characters of a text in the terminal


@dataclass(frozen=True)
class Suspect:
    """A row, with what training saw of it.

    Args:
        row: Its place, `file:line`.
        area: Mean over epochs of the policy's margin minus the reference's, in nats; the lower, the more suspicious.
        margins: The policy's margin in each epoch, in nats; of predictions the implicit reward's, once.
        reference_margin: The reference's, in nats; `None` if it was not recorded.
        length_difference: Tokens of the chosen completion minus those of the rejected one, if known.
    """

    row: str
    area: float
    margins: tuple[float, ...]
    reference_margin: float | None = None
    length_difference: int | None = None


def audit_run(
    run: str, predictions: str | None = None, rows: int = 100, output: str | None = None, overwrite: bool = False
) -> None:
    """List the training rows whose label is probably wrong, most suspicious first, with the pairs themselves.

    A row is suspicious if the mean over epochs of `(log pi_w - log pi_l) - (log ref_w - log ref_l)`, as training saw
    it before each update, is low. The run must have been trained with `--trainer.callbacks+=RecordMargins`; for one
    that was not, `lit-dpo predict --data.predict train` with the run's configuration and checkpoint writes a file to
    give as `predictions`, which after few epochs is nearly as good.

    On four small sets of 200 to 600 rows with 10 or 20 % flipped labels this found them with an AUROC of .76 to 1.
    Rows that only go against the majority's tendency are found too, about half of the suspects are good rows, and
    dropping them seldom helped: read the list, and mend what is wrong.

    Args:
        run: The folder of a run, or `last` for the newest.
        predictions: What `predict` wrote for the training rows, in place of recorded margins.
        rows: How many rows to list.
        output: A file to write them to: `.html` for people, `.jsonl` for programs; none is only printed.
        overwrite: Replace that file.

    Raises:
        FileNotFoundError: There is no such run, or nothing was recorded.
        ValueError: An option is out of its range, or a file holds something else.
        FileExistsError: `output` exists already.
    """
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}.")
    if output is not None:
        page.refuse_taken(output, overwrite, endings=(".html", ".jsonl"))
    found = find_run(run)
    everything = recorded(found) if predictions is None else predicted(Path(predictions))
    suspects = sorted(everything, key=lambda suspect: suspect.area)[:rows]
    pairs = pairs_at(config_of(found)["data"], [suspect.row for suspect in suspects])
    _print(suspects, pairs, everything)
    if output is None:
        return
    text = _lines(suspects, pairs) if output.endswith(".jsonl") else _html(run, suspects, pairs, everything)
    print(f"Wrote {len(suspects)} rows to {page.write(output, text, overwrite)}")


def recorded(run: FinishedRun) -> list[Suspect]:
    """Every row that a run has recorded margins of.

    Raises:
        FileNotFoundError: None were recorded.
        ValueError: A file holds something else.
    """
    files = [part / RECORDED for part in run.parts if (part / RECORDED).exists()]
    if not files:
        raise FileNotFoundError(
            f"`{run.folder}` has no `{RECORDED}`: train with `--trainer.callbacks+=RecordMargins`, let a stopped run "
            "reach the end of its first epoch, or give `--predictions` of the training rows."
        )
    names = ("row", "margins", "reference_margin", "length_difference")
    lines = [line for file in files for line in read_lines(file, names, "recorded margins")]
    return [_suspect(line) for line in lines]


def _suspect(line: dict[str, Any]) -> Suspect:
    try:
        margins, reference = tuple(float(value) for value in line["margins"]), float(line["reference_margin"])
        area = sum(margins) / len(margins) - reference
        return Suspect(str(line["row"]), area, margins, reference, int(line["length_difference"]))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"The recorded margins of {line['row']} are no numbers: restore the run's `{RECORDED}`."
        ) from error


def predicted(path: Path) -> list[Suspect]:
    """Every row of a file that `lit-dpo predict` wrote, by the margin of its implicit rewards.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else.
    """
    lines = read_lines(path, ("row", "margin"), "predictions of `lit-dpo predict`")
    found = []
    for line in lines:
        try:
            margin = float(line["margin"])
            lengths = [int(line[name]) for name in ("chosen_tokens", "rejected_tokens") if name in line]
        except (TypeError, ValueError) as error:
            raise ValueError(f"The margin of {line['row']} in `{path}` is no number: predict again.") from error
        longer = lengths[0] - lengths[1] if len(lengths) == 2 else None
        found.append(Suspect(str(line["row"]), margin, (margin,), None, longer))
    return found


# -- showing ----------------------------------------------------------------------------------------------------------


def _facts(suspect: Suspect) -> str:
    parts = [f"area {suspect.area:+.1f}", f"margins {' '.join(f'{margin:.1f}' for margin in suspect.margins)}"]
    if suspect.reference_margin is None:
        parts = [f"margin {suspect.area:+.3g}"]
    else:
        parts.append(f"reference {suspect.reference_margin:.1f}")
    if suspect.length_difference is not None:
        parts.append(f"chosen {suspect.length_difference:+d} tokens")
    return ", ".join(parts)


def _head(count: int, everything: Sequence[Suspect]) -> str:
    """What the list is of, how often its rows were seen, and how much of it is length."""
    most = f"The {count:,} most suspicious of {len(everything):,} rows"
    if everything[0].reference_margin is None:
        said = f"{most}, by the margins of implicit rewards in the predictions."
    else:
        epochs = sorted({len(suspect.margins) for suspect in everything})
        times = " to ".join(str(n) for n in dict.fromkeys((epochs[0], epochs[-1])))
        said = f"{most}, each seen {times} time{'s' * (epochs[-1] > 1)} in training; area and margins in nats."
    known = [(s.area, s.length_difference) for s in everything if s.length_difference is not None]
    correlation = _rank_correlation(*np.array(known).T) if len(known) > 2 else None
    if correlation is None:
        return said
    return (
        f"{said} Rank correlation of {'area' if everything[0].reference_margin is not None else 'margin'} and length "
        f"difference: {correlation:+.2f}{_MOSTLY_LENGTH if abs(correlation) >= _HIGH else ''}."
    )


def _rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Spearman's, where equal values have the mean of their ranks; nothing where all values are equal.

    >>> _rank_correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0]))
    0.8
    """
    ranks = []
    for values in (first, second):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 12)


def _print(suspects: Sequence[Suspect], pairs: dict[str, Pair], everything: Sequence[Suspect]) -> None:
    console = page.terminal()
    console.print(f"{_head(min(_SHOWN, len(suspects)), everything)}\n")
    for number, suspect in enumerate(suspects[:_SHOWN], 1):
        console.print(Text(f"{number}. {plain(suspect.row)}", style="bold"))
        console.print(f"   {_facts(suspect)}")
        pair = pairs.get(suspect.row)
        texts = {} if pair is None else {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        styles = {"prompt": "dim", "chosen": "green", "rejected": "red"}
        for name, content in texts.items():
            text = plain(shown(content))
            text = f"...{text[-_CUT:]}" if name == "prompt" and len(text) > _CUT else text
            text = f"{text[:_CUT]}..." if len(text) > _CUT + 3 else text
            for line in Text.assemble((f"{name}: ", styles[name]), text).wrap(console, console.width - 3):
                line.rstrip()
                console.print(Text("   ") + line)
        console.print("")
    console.print(_missing(suspects, pairs) + LIMITS)


def _missing(suspects: Sequence[Suspect], pairs: dict[str, Pair]) -> str:
    lost = sum(suspect.row not in pairs for suspect in suspects)
    return f"{lost} of the rows are not where they were trained from, so their text is not shown. " if lost else ""


def _lines(suspects: Sequence[Suspect], pairs: dict[str, Pair]) -> str:
    lines = []
    for suspect in suspects:
        pair = pairs.get(suspect.row)
        line: dict[str, Any] = {
            "row": suspect.row,
            "area": suspect.area,
            "margins": list(suspect.margins),
            "reference_margin": suspect.reference_margin,
            "length_difference": suspect.length_difference,
        }
        if pair is not None:
            line |= {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _html(run: str, suspects: Sequence[Suspect], pairs: dict[str, Pair], everything: Sequence[Suspect]) -> str:
    parts = [
        page.paragraph(f"Run: {run}. {_head(len(suspects), everything)}"),
        page.paragraph(_missing(suspects, pairs) + LIMITS),
    ]
    for number, suspect in enumerate(suspects, 1):
        parts += [page.heading(f"{number}. {suspect.row}"), page.paragraph(_facts(suspect))]
        if pair := pairs.get(suspect.row):
            parts += [
                page.block(shown(pair.prompt), "prompt", "prompt"),
                page.block(shown(pair.chosen), "chosen", "chosen"),
                page.block(shown(pair.rejected), "rejected", "rejected"),
            ]
    return page.page("Rows whose label is probably wrong", parts)
