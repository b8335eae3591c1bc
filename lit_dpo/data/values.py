"""Numbers of the rows: columns that travel with their pairs to the loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

from lit_dpo.data.rows import LayoutError, Pair, RowError

_WEIGHT = "weight"  # multiplies the loss of its pair


def with_values(pair: Pair, row: Mapping[str, object], names: Sequence[str]) -> Pair:
    """The pair of a row with the row's numbers.

    Args:
        pair: What was made of the row.
        row: Column name -> cell.
        names: The columns to keep.

    Raises:
        LayoutError: The row does not have one of them.
        RowError: A cell is no finite number, or a weight is below 0.

    >>> pair = Pair("2+2=", "4", "5", "sums", "sums.jsonl:1")
    >>> with_values(pair, {"margin": 0.5}, ["margin"]).values
    {'margin': 0.5}
    """
    if not names:
        return pair
    if missing := [f"`{name}`" for name in names if name not in row]:
        reason = f"`values` names {', '.join(missing)}, which is not there"
        raise LayoutError(pair.row, None, reason, f"the row has {', '.join(f'`{name}`' for name in row)}")
    return replace(pair, values={name: _number(row[name], name, pair.row) for name in names})


def _number(cell: object, column: str, where: str) -> float:
    """The cell as a finite number; text that spells one counts, since CSV knows nothing else."""
    try:
        number = math.nan if isinstance(cell, bool) or not isinstance(cell, Real | str) else float(cell)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(where, column, "not a finite number", f"write a number instead of {cell!r:.40}")
    if column == _WEIGHT and number < 0:
        raise RowError(where, column, "a weight below 0", "write 0 to leave the pair out of the loss, or more")
    return number
