"""`lit-dpo evaluate`: how often a model prefers the right answer, compared with its reference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import nn

from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.encode import PairEncoder, Truncation
from lit_dpo.data.load import OnBadRow, Rows, load_pairs
from lit_dpo.data.read import read_rows, source_name
from lit_dpo.models import Dtype
from lit_dpo.plain_text import plain
from lit_dpo.scoring.decoder import adapters_off
from lit_dpo.scoring.score import Scorer
from lit_dpo.tools import page
from lit_dpo.tools.intervals import Array, share
from lit_dpo.tools.opened import Opened, open_model, open_start, positions

_BUCKETS = (32, 64, 128, 256, 512, 1024)  # tokens of the longer completion


def evaluate_models(
    models: list[str] = [],  # noqa: B006
    data: list[str] = [],  # noqa: B006
    reference: str | None = None,
    max_length: int | None = None,
    truncation: Truncation = "keep_start",
    on_bad_row: OnBadRow = "error",
    batch_size: int = 16,
    dtype: Dtype = "float32",
    output: str | None = None,
    html: str | None = None,
    overwrite: bool = False,
) -> None:
    """Measure how often a model, compared with its reference, prefers the chosen completion.

    Args:
        models: Runs' folders, for the best checkpoint or else the last; `.ckpt` files; `last` for the newest run;
            or folders and hub names that transformers loads, which need a `reference`.
        data: Sets of pairs, in any form that training takes; or rows with lists of chosen and rejected texts, as
            RewardBench 2 has them, of which the best must be a chosen one.
        reference: The model that rewards are measured from, with the same tokenizer; `none` compares log-probs
            alone. By default the one that a run names, or else the model that it started from.
        max_length: Most tokens of prompt and one completion together; by default 2048, or fewer where the model has
            fewer positions.
        truncation: `keep_start` cuts completions' ends and refuses longer prompts; `keep_end` cuts prompts' starts
            first.
        on_bad_row: `error` stops at the first malformed row, `skip` leaves them out and says how many.
        batch_size: Pairs scored at once; it does not change them.
        dtype: Of the weights.
        output: A JSON file to write.
        html: A page to write.
        overwrite: Replace these files.

    Raises:
        ValueError: No model or no data are given, a row is malformed, or a model cannot be used.
        OSError: A file is missing, or in the way.
    """
    if not models or not data:
        raise ValueError("`lit-dpo evaluate MODEL... --data FILE...` needs at least one model and one file of pairs.")
    page.refuse_any_taken((output, html), overwrite)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    results = []
    for given in models:
        opened = open_model(given, dtype)
        most = min(2048, positions(opened.model) or 2048) if max_length is None else max_length
        loaded = _load(data, opened, PairEncoder(opened.tokenizer, most, truncation), on_bad_row)
        start = _reference_of(opened, reference, dtype)
        margins, name = _margins(opened, start, loaded.pairs, batch_size)
        results.append(Result(given, name, loaded.account, _estimates(loaded, margins)))
        _show(page.terminal(), results[-1])
        del opened, start
    page.terminal().print(f"\n{_NOTE}")
    if output is not None:
        text = json.dumps([asdict(result) for result in results], indent=1) + "\n"
        print(f"Wrote {page.write(output, text, overwrite)}")
    if html is not None:
        print(f"Wrote {page.write(html, _page(results), overwrite)}")


@dataclass(frozen=True)
class Estimate:
    """What was measured of some rows.

    Args:
        name: Of the rows.
        rows: How many.
        prompts: Different prompts among them.
        accuracy: Share of rows whose chosen completion has the higher reward; a tie counts one half. In [0, 1].
        low: Lower end of its 95 % interval.
        high: Upper end.
        ties: Share of ties.
        margin: Mean difference of the rewards of chosen and rejected, in nats (beta is 1).
    """

    name: str
    rows: int
    prompts: int
    accuracy: float
    low: float
    high: float
    ties: float
    margin: float


@dataclass(frozen=True)
class Result:
    """What was measured of a model: its name, that of its reference, the account of rows, and the estimates."""

    model: str
    reference: str
    account: str
    estimates: list[Estimate]


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source(Rows):
    """A set of pairs; a row with lists of texts becomes a pair for every two of them, and is noted in `several`."""

    path: str = ""
    chat: bool = False
    several: dict[tuple[str, str], str] = field(default_factory=dict)  # source and location -> name of the subset

    def __str__(self) -> str:
        return self.path

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        for where, row in read_rows(self.path):
            chosen, rejected = _texts(row.get("chosen")), _texts(row.get("rejected"))
            if not (chosen and rejected):
                yield where, row
                continue
            subset = row.get("subset")
            self.several[self.name, where] = f"{self.name} {subset}" if isinstance(subset, str) else self.name
            for good in chosen:
                for bad in rejected:
                    sides = {"chosen": self._reply(good), "rejected": self._reply(bad)}
                    yield where, {"prompt": self._prompt(row), **sides}

    def _prompt(self, row: Mapping[str, object]) -> object:
        text = row.get("prompt")
        return [{"role": "user", "content": text}] if self.chat and isinstance(text, str) else text

    def _reply(self, text: str) -> object:
        return [{"role": "assistant", "content": text}] if self.chat else text


def _texts(cell: object) -> list[str]:
    """A cell's texts, if it is a list of nothing else."""
    return [*cell] if isinstance(cell, list) and cell and all(isinstance(item, str) for item in cell) else []


@dataclass(frozen=True)
class _Loaded:
    """Encoded pairs, and the rows that they make up: of most one pair, of a best-of row several.

    Args:
        pairs: The pairs.
        of: The row of each pair, shape `(pairs,)`.
        best: Whether each row is one of several completions, shape `(rows,)`.
        sources: The name of each row's set.
        prompts: A number for each row's prompt, equal where the prompts are, shape `(rows,)`.
        account: What became of the rows that were read.
    """

    pairs: PairDataset
    of: Array
    best: Array
    sources: list[str]
    prompts: Array
    account: str


def _load(data: Sequence[str], opened: Opened, encoder: PairEncoder, on_bad_row: OnBadRow) -> _Loaded:
    several: dict[tuple[str, str], str] = {}
    chat = encoder.chat_template is not None
    specs = [_Source((), source_name(path), path, chat, several) for path in data]
    rows, report = load_pairs(specs, encoder, on_bad_row=on_bad_row)
    numbers: dict[object, int] = {}
    of = []
    for number, row in enumerate(rows):
        known = (row.source, row.row) in several
        of.append(numbers.setdefault((row.source, row.row) if known else number, len(numbers)))
    first = np.unique(of, return_index=True)[1]
    keys = [(rows[i].source, rows[i].row) for i in first]
    prompts: dict[bytes, int] = {}
    return _Loaded(
        PairDataset(rows),
        np.array(of),
        np.array([key in several for key in keys]),
        [several.get(key, key[0]) for key in keys],
        np.array([prompts.setdefault(rows[i].encoded.prompt_key, len(prompts)) for i in first]),
        str(report),
    )


# -- scores -----------------------------------------------------------------------------------------------------------


def _reference_of(opened: Opened, given: str | None, dtype: Dtype) -> Opened | None:
    """What rewards are measured from; the policy itself where its adapters are to be switched off for that."""
    if given == "none":
        return None
    if given is None:
        if not opened.options:
            raise ValueError(
                f"`{opened.name}` is a model and not a run, so its reference is not known: add `--reference MODEL`, or "
                "`--reference none` to compare log-probs alone."
            )
        given = _other_reference(opened.options)
        if given is None:
            return opened if hasattr(opened.model, "peft_config") else open_start(opened, dtype)
    other = open_model(given, dtype)
    if other.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
        raise ValueError(
            f"`{given}` has another tokenizer than `{opened.name}`, so their log-probs cannot be compared: give a "
            "reference that shares it."
        )
    return other


def _other_reference(options: Mapping[str, Any]) -> str | None:
    """The model that a run measured its rewards from, if it was another one than it started from."""
    reference = options.get("reference")
    found = reference.get("init_args", {}).get("model") if isinstance(reference, Mapping) else None
    return found if isinstance(found, str) else None


def _margins(opened: Opened, start: Opened | None, pairs: PairDataset, batch_size: int) -> tuple[Array, str]:
    """Log-ratio of chosen minus that of rejected of each pair, in nats, and the name of the reference."""
    margins = _scored(opened.model, opened.name, pairs, batch_size)
    if start is None:
        return margins, "none"
    with adapters_off(start.model) if start is opened else nullcontext():
        below = _scored(start.model, start.name, pairs, batch_size)
    return margins - below, f"{start.name} without its adapters" if start is opened else start.name


@torch.no_grad()
def _scored(model: nn.Module, name: str, pairs: PairDataset, batch_size: int) -> Array:
    """Log-prob of chosen minus that of rejected of each pair, shape `(pairs,)`, float64, in nats."""
    longest = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1).values
    most = positions(model)
    if most and int(longest.max()) > most:
        raise ValueError(
            f"A pair of {int(longest.max())} tokens exceeds the {most} positions of `{name}`: set "
            f"`--max_length {most}` or less."
        )
    order = longest.argsort(stable=True)
    found = torch.empty(len(pairs), dtype=torch.float64)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, device = bar.add_task(name, total=len(pairs)), next(model.parameters()).device
        for batch in pairs.plain_batches(order, batch_size):
            logps = Scorer()(model, batch.to(device))
            found[batch.row_ids] = (logps.chosen.double() - logps.rejected.double()).cpu()
            bar.advance(task, len(batch))
    if not found.isfinite().all():
        raise ValueError(f"`{name}` gives log-probs that are not finite: its weights are broken, give another model.")
    return found.numpy()


# -- estimates --------------------------------------------------------------------------------------------------------


def _estimates(loaded: _Loaded, margins: Array) -> list[Estimate]:
    rows = len(loaded.sources)
    lowest = np.full(rows, np.inf)
    np.minimum.at(lowest, loaded.of, margins)  # the closest rejected one decides
    sizes = np.bincount(loaded.of)
    lengths = loaded.pairs.lengths.numpy()
    chosen, rejected = (np.bincount(loaded.of, lengths[:, side]) / sizes for side in (1, 2))
    longer = np.zeros(rows)
    np.maximum.at(longer, loaded.of, lengths[:, 1:].max(1))
    wins = (np.sign(lowest) + 1) / 2
    bucket = np.searchsorted(_BUCKETS, longer)
    sources, names = np.array(loaded.sources), [*dict.fromkeys(loaded.sources)]

    def of(name: str, kept: Array, strata: Array | None = None) -> list[Estimate]:
        if not kept.any():
            return []
        found = share(wins[kept], loaded.prompts[kept], None if strata is None else strata[kept])
        prompts, ties = len(set(loaded.prompts[kept].tolist())), float((lowest[kept] == 0).mean())
        groups = [kept] if strata is None else [kept & (strata == group) for group in np.unique(strata[kept])]
        margin = float(np.mean([lowest[group].mean() for group in groups]))
        return [Estimate(name, int(kept.sum()), prompts, found.value, found.low, found.high, ties, margin)]

    kinds = [("all pairs", ~loaded.best), ("all best-of rows", loaded.best)]
    found = [estimate for name, kept in kinds for estimate in of(name, kept)]
    if len(names) > 1:
        found += [estimate for name in names for estimate in of(f"source {name}", sources == name)]
    for number in sorted(set(bucket.tolist())):
        limit = f"to {_BUCKETS[number]} tokens" if number < len(_BUCKETS) else f"above {_BUCKETS[-1]} tokens"
        found += of(f"length {limit}", bucket == number)
    found += of("chosen is longer", chosen > rejected) + of("chosen is shorter", chosen < rejected)
    for name, kept in kinds:
        kept = kept & (chosen != rejected)
        if len({*(chosen > rejected)[kept].tolist()}) == 2:
            found += of(f"length-controlled {name.removeprefix('all ')}", kept, chosen > rejected)
    return found


# -- output -----------------------------------------------------------------------------------------------------------

_HEAD = ("rows", "number", "accuracy", "95 % interval", "ties", "margin")
_NOTE = (
    "Accuracy: share of rows whose chosen completion has the higher implicit reward; a tie counts one half. Margins "
    "are in nats. Length-controlled: the mean of the accuracies where the chosen completion is longer and where it is "
    "shorter, which is one half for a preference of length alone; the same for the margin."
)


def _cells(one: Estimate) -> list[str]:
    interval = f"{one.low:.3f} to {one.high:.3f}"
    return [one.name, f"{one.rows:,}", f"{one.accuracy:.3f}", interval, f"{one.ties:.3f}", f"{one.margin:+.3f}"]


def _show(console: Console, result: Result) -> None:
    console.print(Text(f"\n{result.model}, reference: {result.reference}", style="bold"))
    console.print(Text(result.account, style="dim"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in _HEAD:
        table.add_column(name, justify="left" if name == "rows" else "right", overflow="fold")
    for estimate in result.estimates:
        table.add_row(*(Text(plain(cell)) for cell in _cells(estimate)))
    console.print(table)


def _page(results: Sequence[Result]) -> str:
    parts = [page.paragraph(_NOTE)]
    for result in results:
        parts += [page.heading(f"{result.model}, reference: {result.reference}"), page.block(result.account)]
        parts.append(page.table(_HEAD, [_cells(estimate) for estimate in result.estimates]))
    return page.page("Evaluation", parts)
