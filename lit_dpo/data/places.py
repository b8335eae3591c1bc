"""Where rows come from, as numbers: of a million locations few texts differ but in their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"0|[1-9]\d{0,17}")  # that `str(int(...))` gives back


def split_place(place: str) -> tuple[tuple[str, ...], list[int]]:
    """A location as the text around its last two numbers, and these numbers: so that few texts serve all rows.

    >>> split_place("data/part2.jsonl:17")
    (('data/part', '.jsonl:', ''), [2, 17])
    >>> split_place("data/part002.jsonl:17")
    (('data/part002.jsonl:', ''), [17, 0])
    """
    parts: list[str] = [place]
    numbers: list[int] = []
    while len(numbers) < 2:
        found = [match for match in re.finditer(r"\d+", parts[0]) if _NUMBER.fullmatch(match[0])]
        if not found:
            break
        last = found[-1]
        if numbers and re.search(r"\d", parts[0][last.end() :]):
            break  # another number, which cannot be kept as one, stands between
        numbers.insert(0, int(last[0]))
        parts[0:1] = [place[: last.start()], parts[0][last.end() :]]
    return tuple(parts), [*numbers, 0, 0][:2]


def join_place(parts: Sequence[str], numbers: Sequence[int]) -> str:
    """What `split_place` has split."""
    filled = zip(parts, [*map(str, numbers[: len(parts) - 1]), ""], strict=True)
    return "".join(text + number for text, number in filled)
