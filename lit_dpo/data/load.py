"""Data sets to encoded rows, with an account of every row: kept + skipped == read, always."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lit_dpo.data.encode import Encoded
from lit_dpo.data.read import MAX_LINE_BYTES, read_rows, source_name
from lit_dpo.data.rows import LayoutError, Pair, RowError, parse_row
from lit_dpo.data.token_store import enough
from lit_dpo.data.values import with_values

OnBadRow = Literal["error", "skip"]
_EXAMPLES = 3


class Encoder(Protocol):
    """What `load_pairs` needs of a `PairEncoder`."""

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """Token ids of each pair, or why it was refused."""


@dataclass(frozen=True)
class Rows:
    """A source of rows that are in memory already.

    Args:
        rows: A list of dictionaries, a `datasets.Dataset`, or anything else that gives its rows whenever it is asked.
        name: What to call the source.

    Raises:
        ValueError: It gives no rows, or gives them only once.
    """

    rows: Iterable[Mapping[str, object]]
    name: str

    def __post_init__(self) -> None:
        if isinstance(self.rows, Mapping | Iterator) or not isinstance(self.rows, Iterable):
            raise ValueError(
                f"`{self.name}` must be a data set, got a {type(self.rows).__name__}: give a list of dictionaries, a "
                "`datasets.Dataset` (of a `DatasetDict`, one of its splits), or the name of a file."
            )

    def __str__(self) -> str:
        count = f"{len(self.rows)} rows" if isinstance(self.rows, Sized) else "rows"
        return f"{self.name}: {count} in memory ({type(self.rows).__name__})"

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Every row with its location, as `read_rows`."""
        for index, row in enumerate(self.rows, start=1):
            where = f"{self.name}, row {index}"
            if not isinstance(row, Mapping):
                raise RowError(where, None, "the row has no columns", f"give a dictionary, not a {type(row).__name__}")
            yield where, row


def sources_of(given: object, name: str) -> list[str | Rows]:
    """What an option names, as a list: names as they are, rows in memory as `Rows`.

    Args:
        given: A name, rows in memory, a list of such, or `None`.
        name: The option.

    Raises:
        ValueError: It is none of these.
    """
    items: list[Any] = [] if given is None else [given]
    if isinstance(given, list | tuple) and not (given and isinstance(given[0], Mapping)):
        items = list(given)
    names = [f"{name} {number}" for number in range(1, len(items) + 1)] if len(items) > 1 else [name]
    return [item if isinstance(item, str | Rows) else Rows(item, of) for item, of in zip(items, names, strict=False)]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A pair's token ids, the name of the data set it is from, its location there, and its numbers by column name."""

    encoded: Encoded
    source: str
    row: str
    values: Mapping[str, float] = field(default_factory=dict)


class RowSink(Protocol):
    """What takes encoded rows one by one: a list, or what writes them to a file."""

    def append(self, row: EncodedRow, /) -> None:
        """Take one more row."""


@dataclass(slots=True)
class LoadReport:
    """What became of the rows of one load. All numbers count rows.

    Args:
        read: Rows found.
        kept: Rows returned.
        skipped: Reason -> rows refused for it.
        examples: Reason -> locations of the first few.
        truncated: Kept rows that were cut to the length limit.
        healed: Kept rows whose prompt gave its last token to the completions.
        control_text: Kept rows of text that spells a special token, encoded as ordinary characters.
        duplicates: Kept rows with the same tokens as an earlier one. Legal: they weigh double.
        contradictory: Kept rows with the tokens of an earlier one, but chosen and rejected swapped.
    """

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    healed: int = 0
    control_text: int = 0
    duplicates: int = 0
    contradictory: int = 0

    def __str__(self) -> str:
        notable = {
            "truncated": self.truncated,
            "healed at the prompt's end": self.healed,
            "with special tokens spelled out as text": self.control_text,
            "exact duplicates": self.duplicates,
            "contradicting an earlier row": self.contradictory,
        }
        counts = [f"{self.read} rows read", f"{self.kept} kept", f"{self.skipped.total()} skipped"]
        lines = [", ".join(counts + [f"{n} {what}" for what, n in notable.items() if n])]
        if self.skipped:
            reasons = (
                f"{n}x {reason} ({', '.join(self.examples[reason])})" for reason, n in self.skipped.most_common()
            )
            lines.append("skipped: " + "; ".join(reasons))
        return "\n".join(lines)

    def skip(self, error: RowError) -> None:
        """Count a refused row."""
        self.skipped[error.reason] += 1
        places = self.examples.setdefault(error.reason, [])
        if len(places) < _EXAMPLES:
            places.append(error.where)


def load_pairs(
    specs: Sequence[str | Rows],
    encoder: Encoder,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
    values: Sequence[str] = (),
    into: RowSink | None = None,
) -> tuple[list[EncodedRow], LoadReport]:
    """Read, parse and encode data sets, in the order given.

    Args:
        specs: Data sets, as `read_rows` takes them, or rows in memory.
        encoder: A `PairEncoder`, or a `TokenCache` around one.
        columns: Our column name -> the files', for names that are not known.
        on_bad_row: `error` raises on the first bad row, `skip` counts it and goes on.
        max_line_bytes: See `read_rows`.
        values: The files' names of columns of numbers to keep, which every row must have.
        into: Takes the rows in the place of the list that is returned, which then stays empty.

    Raises:
        RowError: A row must not be trained on, and `on_bad_row` is `error`; or a file is damaged.
        LayoutError: The same for unknown columns and missing `values`; with `skip` too, if no row of a data set has
            what is needed.
        ValueError: No row is left to train on.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"`on_bad_row` must be `error` or `skip`, got `{on_bad_row}`.")
    rows: list[EncodedRow] = []
    report = LoadReport()
    seen: set[bytes] = set()

    def settle(source: str, chunk: list[Pair | RowError]) -> None:
        """Encode a chunk, and account for each of its rows in their order."""
        items, chunk[:] = list(chunk), []
        if on_bad_row == "error":  # nothing behind the first bad row matters
            bad = next((i for i, item in enumerate(items) if not isinstance(item, Pair)), len(items))
            items = items[: bad + 1]
        encoded = iter(encoder.many([item for item in items if isinstance(item, Pair)]))
        for item in items:
            report.read += 1
            result = next(encoded) if isinstance(item, Pair) else item
            if isinstance(item, Pair) and isinstance(result, Encoded):
                report.kept += 1
                (rows if into is None else into).append(EncodedRow(result, source, item.row, item.values))
                _note(result, report, seen)
            elif isinstance(result, RowError):
                if on_bad_row == "error":
                    raise result
                report.skip(result)

    for spec in specs:
        source = spec.name if isinstance(spec, Rows) else source_name(spec)
        unknown: LayoutError | None = None
        known = False
        chunk: list[Pair | RowError] = []
        try:
            found = spec if isinstance(spec, Rows) else read_rows(spec, chunk.append, max_line_bytes)
            for where, row in found:
                try:
                    chunk.append(with_values(parse_row(row, source, where, columns), row, values))
                    known = True
                except LayoutError as error:
                    unknown = unknown or error
                    chunk.append(error)
                except RowError as error:
                    known = True
                    chunk.append(error)
                if len(chunk) >= enough(report.read):
                    settle(source, chunk)
        except (ValueError, OSError):
            settle(source, chunk)  # an error of the reader does not go before those of earlier rows
            raise
        settle(source, chunk)
        if unknown and not known:
            raise unknown
    if not report.kept:
        raise ValueError(
            f"No row to train on in {', '.join(map(str, specs)) or 'an empty list'}; correct the data. {report}."
        )
    return rows, report


def _note(encoded: Encoded, report: LoadReport, seen: set[bytes]) -> None:
    report.truncated += encoded.truncated
    report.healed += encoded.healed
    report.control_text += encoded.control_text
    key = _digest(encoded.prompt, encoded.chosen, encoded.rejected)
    if key in seen:
        report.duplicates += 1
    elif _digest(encoded.prompt, encoded.rejected, encoded.chosen) in seen:
        report.contradictory += 1
    seen.add(key)


def _digest(*ids: list[int]) -> bytes:
    found = hashlib.blake2b(repr([len(part) for part in ids]).encode(), digest_size=16)
    for part in ids:
        found.update(array("q", part))
    return found.digest()
