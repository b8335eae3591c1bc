"""Prompts of a data set for a round, and rows of a data file out of judged completions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from lit_dpo.data.pair import RowError
from lit_dpo.data.partition import Prompt
from lit_dpo.data.prompts import read_prompts
from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import parse_row
from lit_dpo.data.streams import Each, Streamed, different
from lit_dpo.rounds.pickers import Candidate, Picker

Row = dict[str, object]
_Pairs = list[tuple[Candidate, Candidate]]


def prompts_of(
    source: str, step: int, count: int | None, chosen: bool = False
) -> tuple[Sequence[Prompt], Sequence[str]]:
    """The prompts of a round, in the order of their file; each round begins where the one before ended.

    Args:
        source: A data set of pairs, or of rows with a `prompt` alone, or a `.txt` file. A prompt counts once.
        step: Number of the round.
        count: Prompts of a round; `None` for all of them in each.
        chosen: Read their chosen answers too; then rows must be pairs.

    Returns:
        The prompts, and their chosen answers if these are asked for.

    Raises:
        ValueError: There are fewer.
    """
    found = different(_read(source, chosen), key=lambda row: row[0])
    count = len(found) if count is None else count
    if not found or count > len(found):
        raise ValueError(
            f"`{source}` holds {len(found)} different prompts, and a round takes {count or 'at least 1'}: give more, "
            "or lower `prompts_per_round`."
        )
    first = step * count
    prompts: Sequence[Prompt] = Each(count, lambda number: found[(first + number) % len(found)][0])
    answers: Sequence[str] = Each(count if chosen else 0, lambda number: found[(first + number) % len(found)][1])
    return prompts, answers


def _read(source: str, chosen: bool) -> Iterator[tuple[Prompt, str | None]]:
    if not chosen:
        yield from ((prompt.content, None) for prompt in read_prompts(source))  # type: ignore[misc]
        return
    for where, row in read_rows(source):
        pair = parse_row(row, source, where)
        yield pair.prompt, answer_of(pair.chosen, where)  # type: ignore[misc]


def answer_of(said: str | Sequence[Mapping[str, Any]], where: str, side: str = "chosen") -> str:
    """A completion of a data set as the text of one turn.

    Raises:
        RowError: It has several turns.
    """
    text = said if isinstance(said, str) else said[-1].get("content")
    if text is None or (not isinstance(said, str) and len(said) > 1):
        remedy = "leave the row out, or use rounds that judge samples alone"
        raise RowError(where, side, f"a {side} answer of several turns cannot be judged", remedy)
    return str(text)


def digest_of(*values: Any) -> str:
    """SHA-256 of plain values, such as the prompts of a round."""
    digest = sha256()
    for value in values:
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for one in value if several else [value]:
            digest.update(json.dumps(one).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def said_of(completions: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Sequence[list[str]], dict[str, Any]]:
    """What is judged of each prompt: completions with an end, not empty, all different; and counts of the others."""
    total = finished = empty = duplicates = 0
    for found in completions:
        ended = [one["text"] for one in found if one["finished"]]
        said = [text for text in ended if text.strip()]
        total, finished = total + len(found), finished + len(ended)
        empty, duplicates = empty + len(ended) - len(said), duplicates + len(said) - len({*said})
    share = finished / total if total else 0.0
    texts = Each(len(completions), lambda number: _said(completions[number]))
    return texts, {"completions": total, "finished": share, "empty": empty, "duplicates": duplicates}


def _said(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(one["text"] for one in found if one["finished"] and one["text"].strip()))


def picked(
    picker: Picker,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float | None]],
    chosen: bool = False,
) -> tuple[Sequence[Row], dict[str, Any]]:
    """Pairs of judged completions as rows of a data file, and what is to be counted of them.

    Args:
        picker: What pairs them.
        prompts: The prompts.
        texts: The completions of each.
        scores: Their scores.
        chosen: The last of each prompt's is the chosen answer of the data set.
    """
    reasons: Counter[str] = Counter()
    count = mixed = silent = 0

    def each() -> Iterator[tuple[Prompt, Sequence[float | None], list[Candidate], _Pairs | str]]:
        for prompt, said, given in zip(prompts, texts, scores, strict=True):
            judged = [
                None if score is None else Candidate(text, score) for text, score in zip(said, given, strict=True)
            ]
            gold = judged.pop() if chosen else None
            candidates = [one for one in judged if one is not None]
            yield prompt, given, candidates, picker.pick(candidates, gold)

    def rows() -> Iterator[Row]:
        for prompt, _, _, pairs in each():
            if not isinstance(pairs, str):
                yield from (row_of(prompt, better.text, worse.text) for better, worse in pairs)

    for _, given, candidates, pairs in each():
        silent += sum(score is None for score in given)
        mixed += len({one.score for one in candidates}) > 1
        if isinstance(pairs, str):
            reasons[pairs] += 1
        else:
            count += len(pairs)
    counts = {"no_opinion": silent, "mixed": mixed / len(prompts), "without_pair": dict(sorted(reasons.items()))}
    return Streamed(count, rows), counts


def row_of(prompt: Prompt, better: str, worse: str) -> Row:
    """A pair as a row of a data file."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": better, "rejected": worse}
    sides = {"chosen": better, "rejected": worse}
    return {name: [*prompt, {"role": "assistant", "content": text}] for name, text in sides.items()}
