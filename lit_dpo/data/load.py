"""Data sets to encoded rows, with an account of every row: kept + skipped == read, always."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from lit_dpo.data.encode import Encoded
from lit_dpo.data.read import MAX_LINE_BYTES, read_rows, source_name
from lit_dpo.data.report import LoadReport
from lit_dpo.data.rows import Arranged, LayoutError, NoPreferenceError, Pair, Reading, RowError, arrange, pairs_of
from lit_dpo.data.token_blocks import enough
from lit_dpo.data.values import with_values

OnBadRow = Literal["error", "warn", "skip"]


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


@dataclass(frozen=True, slots=True)
class _Item:
    """Rows, mostly one, and the pairs that they make, each with the locations of its rows; or what is wrong."""

    rows: tuple[str, ...]
    pairs: Sequence[tuple[Pair, tuple[str, ...]]] = ()
    problem: RowError | None = None


def load_pairs(
    specs: Sequence[str | Rows],
    encoder: Encoder,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
    values: Sequence[str] = (),
    reading: Reading | None = None,
    max_bad_share: float = 1.0,
    into: RowSink | None = None,
) -> tuple[list[EncodedRow], LoadReport]:
    """Read, parse and encode data sets, in the order given.

    Args:
        specs: Data sets, as `read_rows` takes them, or rows in memory.
        encoder: A `PairEncoder`, or a `TokenCache` around one.
        columns: Our column name -> the files', for names that are not known.
        on_bad_row: `error` raises the first bad row, and says how many more there are; `skip` and `warn` count them
            and go on.
        max_line_bytes: See `read_rows`.
        values: The files' names of columns of numbers to keep, which every row must have.
        reading: How rows are read besides that; see `Reading`.
        max_bad_share: Most malformed rows to go on with, as a share of the rows read.
        into: Takes the rows in the place of the list that is returned, which then stays empty.

    Raises:
        RowError: A row must not be trained on, and `on_bad_row` is `error`; or a file is damaged.
        LayoutError: The same for unknown columns and missing `values`; with `skip` too, if no row of a data set has
            what is needed.
        ValueError: No row is left to train on, or too many are malformed.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise ValueError(f"`on_bad_row` must be `error`, `warn` or `skip`, got `{on_bad_row}`.")
    reading = reading or Reading()
    reading = replace(reading, columns=columns) if columns else reading
    reading = replace(reading, ignored_columns=[*reading.ignored_columns, *values])  # which are read as numbers
    rows: list[EncodedRow] = []
    load = _Load(encoder, reading, values, rows if into is None else into)
    try:
        for spec in specs:
            load.source(spec, max_line_bytes)
    except (ValueError, OSError) as error:
        if on_bad_row == "error" and load.first is not None and error is not load.first:
            raise load.first.with_others(load.report.others(load.first)) from error
        raise
    report = load.report
    if on_bad_row == "error" and load.first is not None:
        raise load.first.with_others(report.others(load.first))
    if not report.kept:
        raise ValueError(
            f"No row to train on in {', '.join(map(str, specs)) or 'an empty list'}; correct the data. {report}."
        )
    if report.bad.total() > max_bad_share * report.read:
        raise ValueError(
            f"{report.bad.total()} of {report.read} rows are malformed, more than the share of {max_bad_share:g} that "
            f"`max_bad_share` allows: correct the data, or raise it. {report}."
        )
    return rows, report


class _Load:
    """One load as it goes on."""

    def __init__(self, encoder: Encoder, reading: Reading, values: Sequence[str], into: RowSink) -> None:
        self.encoder, self.reading, self.values, self.rows = encoder, reading, values, into
        self.report = LoadReport()
        self.first: RowError | None = None
        self._seen: set[bytes] = set()
        self._items: list[_Item] = []

    def source(self, spec: str | Rows, max_line_bytes: int) -> None:
        """Take in all rows of a data set."""
        source = spec.name if isinstance(spec, Rows) else source_name(spec)
        unknown: LayoutError | None = None
        known = False
        groups: dict[str, list[Arranged]] = {}  # of layouts with one answer a row, by prompt
        try:
            found = spec if isinstance(spec, Rows) else read_rows(spec, self._refuse, max_line_bytes)
            for where, row in found:
                try:
                    arranged = arrange(row, where, self.reading)
                    if arranged.layout.grouped:
                        groups.setdefault(repr(arranged.answers.prompt), []).append(arranged)
                    else:
                        self._items.append(self._item([arranged], source))
                    known = True
                except LayoutError as error:
                    unknown = unknown or error
                    self._refuse(error)
                except RowError as error:
                    known = True
                    self._refuse(error)
                if len(self._items) >= enough(self.report.read):
                    self._settle()
            for group in groups.values():
                self._items.append(self._group(group, source))
                if len(self._items) >= enough(self.report.read):
                    self._settle()
        finally:  # an error of the reader does not go before those of earlier rows
            self._settle()
        if unknown and not known:
            raise unknown

    def _refuse(self, error: RowError) -> None:
        self._items.append(_Item((error.where,), problem=error))

    def _item(self, rows: Sequence[Arranged], source: str) -> _Item:
        made = []
        for pair, better, worse in pairs_of(rows, source, self.reading):
            where = dict.fromkeys((better.cells.where, worse.cells.where))
            made.append((with_values(pair, better.row, self.values), tuple(where)))
        return _Item(tuple(row.cells.where for row in rows), made)

    def _group(self, rows: Sequence[Arranged], source: str) -> _Item:
        try:
            return self._item(rows, source)
        except RowError as error:
            return _Item(tuple(row.cells.where for row in rows), problem=error)

    def _settle(self) -> None:
        """Encode what was read, and account for each row in the order of the rows."""
        items, self._items = self._items, []
        try:
            encoded = iter(self.encoder.many([pair for item in items for pair, _ in item.pairs]))
        except ValueError:
            bad = [item.problem for item in items if item.problem and not isinstance(item.problem, NoPreferenceError)]
            self.first = self.first or (bad[0] if bad else None)
            raise
        for item in items:
            self._account(item, [(pair, rows, next(encoded)) for pair, rows in item.pairs])

    def _account(self, item: _Item, results: Sequence[tuple[Pair, tuple[str, ...], Encoded | RowError]]) -> None:
        used = {row for _, rows, result in results if isinstance(result, Encoded) for row in rows}
        problem = item.problem
        for pair, _, result in results:
            if isinstance(result, Encoded):
                self.rows.append(EncodedRow(result, pair.source, pair.row, pair.values))
                self.report.keep(pair, result)
                self._compare(result, pair.row)
            elif used:
                self.report.lost[result.reason] += 1
            else:
                problem = problem or result
        rest = NoPreferenceError(item.rows[0], None, "in no pair of the policy", "see `pairs`")
        for row in item.rows:
            self.report.read += 1
            if row in used:
                self.report.kept += 1
            else:
                self.report.skip(problem or rest, row)
        if problem and not used and not isinstance(problem, NoPreferenceError):
            self.first = self.first or problem

    def _compare(self, encoded: Encoded, row: str) -> None:
        key = _digest(encoded.prompt, encoded.chosen, encoded.rejected)
        if key in self._seen:
            self.report.repeat(row, swapped=False)
        elif _digest(encoded.prompt, encoded.rejected, encoded.chosen) in self._seen:
            self.report.repeat(row, swapped=True)
        self._seen.add(key)


def _digest(*ids: list[int]) -> bytes:
    found = hashlib.blake2b(repr([len(part) for part in ids]).encode(), digest_size=16)
    for part in ids:
        found.update(array("q", part))
    return found.digest()
