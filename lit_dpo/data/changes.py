"""Whether the rows of a resumed run are those that it began with, and which are not."""

from __future__ import annotations

import base64
import binascii
import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.data.dataset import DIGEST, PairDataset

_EXAMPLES = 5


@dataclass(frozen=True)
class Changes:
    """What differs between two orders of rows; numbers count rows from 0.

    Args:
        added: Rows that are new, by their number now.
        removed: Rows that are gone, by their number then.
        moved: The fewest rows that must have moved for the others to stand in their old order, by number now.
        swapped: Rows whose chosen and rejected completions changed places, by number now.
        changed: Rows that stand where another stood, by number now.
    """

    added: list[int]
    removed: list[int]
    moved: list[int]
    swapped: list[int]
    changed: list[int]

    def __str__(self) -> str:
        parts = [f"{len(rows)} {kind}" for kind, rows in vars(self).items() if rows]
        return ", ".join(parts) or "none"


def compare(old: Sequence[bytes], new: Sequence[bytes], swapped: Mapping[int, bytes] | None = None) -> Changes:
    """What became of rows, given a hash of each.

    Equal rows are told apart by their order: the n-th of them then is the n-th of them now.

    Args:
        old: Hashes then, in order.
        new: Hashes now, in order.
        swapped: Row number now -> its hash if its completions changed places, for rows that are not in `old`; without
            it swapped rows count as changed.
    """
    left: defaultdict[bytes, list[int]] = defaultdict(list)
    for number in reversed(range(len(old))):
        left[old[number]].append(number)
    origin = {row: left[key].pop() for row, key in enumerate(new) if left[key]}
    stay = _longest_rise(list(origin.values()))
    moved = [row for row, number in origin.items() if number not in stay]
    fresh = [row for row in range(len(new)) if row not in origin]
    turned = [row for row in fresh if swapped and row in swapped and _take(left[swapped[row]])]
    gone = sorted(number for numbers in left.values() for number in numbers)
    fresh = sorted({*fresh} - {*turned})
    # A row is a changed one if it stands between the same unchanged neighbours as one that is gone.
    then, now = sorted(stay), sorted(row for row, number in origin.items() if number in stay)
    gaps: defaultdict[int, list[int]] = defaultdict(list)
    for number in reversed(gone):
        gaps[bisect_left(then, number)].append(number)
    changed = {row: gaps[gap].pop() for row in fresh if gaps[gap := bisect_left(now, row)]}
    added = [row for row in fresh if row not in changed]
    return Changes(added, sorted({*gone} - {*changed.values()}), moved, turned, list(changed))


def _take(numbers: list[int]) -> bool:
    """Take one away, if there is any."""
    if numbers:
        numbers.pop()
        return True
    return False


def _longest_rise(numbers: Sequence[int]) -> set[int]:
    """The members of a longest rising subsequence of distinct numbers."""
    tails: list[int] = []  # the smallest last number of a rise of each length
    before: dict[int, int | None] = {}
    for number in numbers:
        place = bisect_left(tails, number)
        before[number] = tails[place - 1] if place else None
        tails[place : place + 1] = [number]
    found: set[int] = set()
    last = tails[-1] if tails else None
    while last is not None:
        found.add(last)
        last = before[last]
    return found


def record(
    train: PairDataset, validation: PairDataset | None, drawn: Tensor, seed: int, pairs: PairDataset | None = None
) -> dict[str, str]:
    """What a checkpoint keeps of the data: a hash of every row, and one of which rows are trained on.

    Args:
        train: The training set, held-out rows included.
        validation: A validation set of its own, if there is one.
        drawn: Row numbers that are trained on, in order, int64.
        seed: Seed of the order of the epochs.
        pairs: New pairs of a step, which it trains on in the place of rows of the training set.

    Returns:
        Text alone, of 22 characters a row, to be stored in a checkpoint or as JSON.
    """
    order = hashlib.blake2b(drawn.numpy().tobytes() + str(seed).encode(), digest_size=DIGEST).hexdigest()
    sets = {"train": train, "validation": validation, "pairs": pairs}
    return {"order": order} | {n: base64.b64encode(s.digest_bytes()).decode() for n, s in sets.items() if s}


def refuse_changes(
    saved: object,
    train: PairDataset,
    validation: PairDataset | None,
    order: str | None,
    where: str,
    allowed: bool,
    pairs: PairDataset | None = None,
) -> str | None:
    """Compare the data with what was recorded of them, and show what differs.

    Args:
        saved: What `record` gave then.
        train: The training set now.
        validation: The validation set now, if it is one of its own; changes of it are shown, never refused.
        order: `record(...)["order"]` now; `None` leaves it out.
        where: What the record is kept in, for the message.
        allowed: Go on with changed training data.
        pairs: New pairs of a step now, if it trains on such.

    Returns:
        What to say where the training data differ and that is allowed.

    Raises:
        ValueError: The training data differ and that was not allowed, or the record does not read.
    """
    saved = saved if isinstance(saved, Mapping) else {}  # which does not read, as is said below
    if validation is not None and "validation" in saved:
        _show("validation", saved, validation, where)
    changes = _show("train", saved, train, where)
    if pairs is not None:
        changes = _show("pairs", saved, pairs, where) or changes
    if changes is None and order is not None and order != saved.get("order"):
        text = "other rows are held out, or the seed or the partition differ"
    elif changes is not None:
        text = str(changes)
    else:
        return None
    if not allowed:
        raise ValueError(
            f"The training data differ from those of {where} ({text}): restore them, or add --allow-changes (in "
            "Python: `datamodule.allow_changes = True`)."
        )
    return f"Going on with training data that differ from those of {where}: {text}."


def _show(name: str, saved: Mapping[str, object], dataset: PairDataset, where: str) -> Changes | None:
    """What differs in a set, shown as a table; None if nothing does."""
    try:
        content = base64.b64decode(str(saved[name]).encode(), validate=True)
    except (KeyError, binascii.Error) as error:
        raise ValueError(f"What {where} keeps of its rows does not read: resume from another checkpoint.") from error
    if content == (now := dataset.digest_bytes()):
        return None
    old, new = ([part[i : i + DIGEST] for i in range(0, len(part), DIGEST)] for part in (content, now))
    known = {*old}
    changes = compare(old, new, {row: dataset.swapped_digest(row) for row, key in enumerate(new) if key not in known})
    if is_first():
        _print(name, changes, dataset, where)
    return changes


def _print(name: str, changes: Changes, dataset: PairDataset, where: str) -> None:
    table = Table("what", "rows", Column("which", overflow="fold"), title=f"{name}: rows changed since {where}")
    for kind, rows in vars(changes).items():
        if rows:
            # Of a row that is gone, only its number is known.
            places = [f"row {r + 1} then" if kind == "removed" else dataset.origins[r] for r in rows[:_EXAMPLES]]
            table.add_row(kind, str(len(rows)), "\n".join([*places, *(["..."] if len(rows) > _EXAMPLES else [])]))
    Console().print(table)
