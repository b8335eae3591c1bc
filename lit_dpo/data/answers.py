"""Prompts with an answer to learn from: rows of pairs, whose chosen answer it is, or of supervised data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_dpo.data.pair import LayoutError, NoPreferenceError, Pair, RowError
from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import parse_row

_NAMES = ("chosen", "completion", "messages", "conversations")


def read_answers(source: str) -> Iterator[Pair]:
    """Yield the rows of a data set as pairs whose chosen side is the answer; the rejected side does not matter.

    Args:
        source: What `read_rows` reads, with rows that are pairs, or have a `prompt` and a `completion` or a `chosen`
            answer alone, or `messages` that end with the assistant's.

    Raises:
        RowError: A row has no answer, or one of several turns.
    """
    for where, row in read_rows(source):
        pair = _pair_of(row, source, where)
        if not isinstance(pair.chosen, str) and (len(pair.chosen) > 1 or not pair.chosen[0].get("content")):
            remedy = "leave the row out, or let the last turns before it belong to the prompt"
            raise RowError(where, "chosen", "an answer of several turns, or without text, cannot be cut", remedy)
        yield pair


def _pair_of(row: Mapping[str, object], source: str, where: str) -> Pair:
    try:
        return parse_row(row, source, where)
    except (LayoutError, NoPreferenceError):
        given = next((name for name in _NAMES if row.get(name) is not None), None)
        if row.get("rejected") is not None:
            raise
    if given is None or _asks(row[given]):
        remedy = "add the column `completion`, or `messages` that end with the assistant's"
        raise RowError(where, "completion", "the row has no answer", remedy)
    kept = {name: value for name, value in row.items() if name != given}
    return parse_row({**kept, "chosen": row[given], "rejected": _another(row[given])}, source, where)


def _asks(turns: Any) -> bool:
    """Whether a conversation ends before the assistant answers."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, Mapping) and last.get("role", last.get("from")) in ("user", "human", "system", "tool")


def _another(answer: Any) -> Any:
    """An answer that is no matter, so that the other one is checked as in training."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        turn = {name: f"{text}." if name in ("content", "value") else text for name, text in answer[-1].items()}
        return [*answer[:-1], turn]
    return f"{answer}." if isinstance(answer, str) else answer
