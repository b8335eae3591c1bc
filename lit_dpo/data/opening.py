"""Answers cut at a token: their beginning for the policy to go on with, and what stands behind the segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_dpo.data.pair import Pair

if TYPE_CHECKING:
    from lit_dpo.data.encode import PairEncoder


@dataclass(frozen=True)
class Opening:
    """The beginning of an answer, which a policy is to go on with.

    Args:
        ids: Those of the training row, prompt and answer, up to the cut.
        said: The answer up to the cut.
        rest: The answer behind the segment that is written anew; empty if the segment reaches its end.
        name: Decides the random numbers of what is sampled here, besides round and seed.
    """

    ids: tuple[int, ...]
    said: str
    rest: str
    name: bytes


def open_answer(encoder: PairEncoder, pair: Pair, tokens: int, place: float, name: bytes) -> Opening | str:
    """Cut the chosen answer of a pair.

    A cut stands between two tokens of the row as it is trained on, and between two characters. Among the places in the
    answer behind which a whole segment and more stands, each is as likely; an answer without such a place is written
    anew from its beginning.

    Args:
        encoder: How rows become ids.
        pair: Text, or messages whose chosen answer is one turn; the rejected side does not matter.
        tokens: Of the segment, at least 1.
        place: In [0, 1): which of the places.
        name: See `Opening`.

    Returns:
        The opening; or why there is none, in words that are the same for every such row.

    Raises:
        RowError: The row cannot be encoded.
        ValueError: The tokenizer does not tell which characters a token stands for.
    """
    whole, ids, spans = encoder.spelled(pair)
    answer, start = answer_of(pair), len(whole.prompt)
    if whole.rendered:  # templates put words before an answer, or take white space off it
        start = whole.chosen.find(answer, start)
        if start < 0:
            answer = answer.strip()
            start = whole.chosen.find(answer, len(whole.prompt))
        if start < 0:
            return "the chat template rewrites the answer"
    stop = start + len(answer)
    # ends[n] is where a cut before id n stands; None where it would part a character, or reaches over the answer
    ends: list[int | None] = [None]
    for (_, end), (begin, _) in zip(spans, [*spans[1:], (len(whole.chosen),) * 2], strict=True):
        ends.append(end if start <= end <= begin else None)
    places = [n for n, end in enumerate(ends[: len(ids)]) if end is not None and end < stop]
    last = next((n for n, (begin, _) in enumerate(spans) if begin >= stop), len(ids))  # the first id behind the answer
    fitting = [n for n in places if n + tokens < last] or places[:1]
    fitting = [n for n in fitting if n + tokens <= encoder.max_length]
    if not fitting:
        return "`max_length` leaves no room for a segment" if places else "the answer has no place for a cut"
    cut = fitting[int(place * len(fitting))]
    behind = next((end for end in ends[cut + tokens :] if end is not None), stop)
    return Opening(tuple(ids[:cut]), answer[: (ends[cut] or 0) - start], answer[min(behind, stop) - start :], name)


def answer_of(pair: Pair) -> str:
    """The text of a chosen answer of one turn."""
    return pair.chosen if isinstance(pair.chosen, str) else pair.chosen[-1].get("content", "")
