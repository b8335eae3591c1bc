"""Some rows of a data set, or all the others, as a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lit_dpo.data.load import Rows
from lit_dpo.data.read import read_rows, source_name


@dataclass(frozen=True)
class SelectedRows(Rows):
    """What `select_rows` gives.

    Args:
        keep: Row numbers, or a function of a row.
        complement: Give the other rows.
        file: The source, unless its rows are in memory.
    """

    keep: frozenset[int] | Callable[[Mapping[str, object]], object] = frozenset()
    complement: bool = False
    file: str | None = None

    def __str__(self) -> str:
        which = f"{len(self.keep)} rows by number" if isinstance(self.keep, frozenset) else "rows that a function keeps"
        return f"{self.file or self.name}: {'all but the ' if self.complement else ''}{which}"

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Every row that was asked for, with its location, in the order of the source."""
        number = -1
        for number, (where, row) in enumerate(super().__iter__() if self.file is None else read_rows(self.file)):
            found = number in self.keep if isinstance(self.keep, frozenset) else bool(self.keep(row))
            if found != self.complement:
                yield where, row
        if isinstance(self.keep, frozenset) and max(self.keep, default=-1) > number:
            raise ValueError(
                f"`select_rows` was asked for row {max(self.keep)} of `{self.file or self.name}`, which has "
                f"{number + 1} rows: give numbers from 0 to {number}."
            )


def select_rows(
    source: str | Iterable[Mapping[str, object]],
    keep: Iterable[int] | Callable[[Mapping[str, object]], object],
    complement: bool = False,
    name: str | None = None,
) -> SelectedRows:
    """Some rows of a data set, or with `complement` all the others: a source for any option of the data module.

    The two together hold every row once, in the order of the source, each under its own location. A resumed run must
    find the same rows, as with any source.

    >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
    >>> [where for where, _ in select_rows(rows, [1], name="sums")]
    ['sums, row 2']
    >>> [where for where, _ in select_rows(rows, lambda row: row["chosen"] == "2", complement=True, name="sums")]
    ['sums, row 1']

    Args:
        source: A file, folder or hub name, or rows in memory.
        keep: Row numbers from 0, in the order of reading, which is that of the lines of a file; or a function that says
            of a row, with the columns of the source, whether to keep it.
        complement: Give the rows that `keep` leaves out.
        name: What to call the source; `None` is the name of the file, or `rows`.

    Raises:
        ValueError: A number is negative or given twice. When the rows are read: a number is too large, or a line of a
            file cannot be read, whatever `on_bad_row` says, because the rows behind it would get other numbers.
    """
    numbers: frozenset[int] | Callable[[Mapping[str, object]], object]
    if callable(keep):
        numbers = keep
    else:
        given = [int(number) for number in keep]
        numbers = frozenset(given)
        if len(numbers) < len(given) or min(given, default=0) < 0:
            raise ValueError("`select_rows` takes row numbers from 0, each once: remove those that are not.")
    if isinstance(source, str):
        return SelectedRows((), name or source_name(source), numbers, complement, source)
    return SelectedRows(source, name or "rows", numbers, complement)
