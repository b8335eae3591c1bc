"""What is measured in every round beside its pairs: greedy answers to fixed prompts, and a judge on trusted pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_dpo.data.partition import Pool
from lit_dpo.data.prompts import read_prompts
from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import parse_row
from lit_dpo.rounds.rows import answer_of, digest_of
from lit_dpo.sampling import Sampler

if TYPE_CHECKING:
    from lit_dpo.rounds.base import Rounds

_Z = 1.959964  # of the normal distribution at 97.5 %


@dataclass(frozen=True)
class Fixed:
    """What is measured on: prompts, and pairs with their two answers."""

    prompts: list[Any]
    pairs: list[tuple[Any, list[str]]]

    @classmethod
    def read(cls, prompts: str | None, pairs: str | None) -> Fixed:
        """From the data sets that the options name.

        Args:
            prompts: A data set of prompts, as for sampling; `None` for none.
            pairs: A data set of pairs; `None` for none.

        Raises:
            ValueError: One cannot be read, or is empty.
        """
        found: list[Any] = [] if prompts is None else [prompt.content for prompt in read_prompts(prompts)]
        if prompts is not None and not found:
            raise ValueError(f"`greedy_prompts`: `{prompts}` holds no prompt: give some, or leave the option out.")
        rows = [] if pairs is None else [parse_row(row, pairs, where) for where, row in read_rows(pairs)]
        if pairs is not None and not rows:
            raise ValueError(f"`trusted`: `{pairs}` holds no pair: give some, or leave the option out.")
        answers = [[answer_of(getattr(row, side), str(pairs), side) for side in ("chosen", "rejected")] for row in rows]
        return cls(found, [(row.prompt, texts) for row, texts in zip(rows, answers, strict=True)])


def greedy(rounds: Rounds, step: int, pool: Pool, prompts: list[Any]) -> dict[str, Any]:
    """What the first judge says of the likeliest completions of fixed prompts by the policy that starts a step.

    Args:
        rounds: The partition, whose journals keep completions and scores.
        step: Whose starting policy answers.
        pool: Its folder keeps them.
        prompts: The prompts.

    Returns:
        `prompts`, `score` (the mean), `error` (half of its 95 % interval), `finished` (share), and `no_opinion`.
    """
    judge, sampler = rounds.judges[0], rounds.sampler
    key = digest_of(step, prompts, judge.identity())[:8]  # others are measured anew
    one = Sampler(temperature=0.0, max_new_tokens=sampler.max_new_tokens, rows=sampler.rows)
    said = rounds.sample(step, pool, prompts, one, f"greedy_{key}")
    texts = [[completion["text"] for completion in found] for found in said]
    scores = [score for [score] in rounds.judged(pool, judge, prompts, texts, f"greedy_scores_{key}")]
    finished = sum(completion["finished"] for [completion] in said) / len(prompts)
    return {"prompts": len(prompts), **_mean(scores, "score"), "finished": finished}


def agreement(rounds: Rounds, pool: Pool, pairs: list[tuple[Any, list[str]]]) -> dict[str, Any]:
    """How often the first judge prefers the chosen completion of pairs whose label is trusted; a tie is one half.

    Returns:
        `pairs`, `share`, `error` (half of its 95 % interval), and `no_opinion`.
    """
    prompts, texts = [prompt for prompt, _ in pairs], [answers for _, answers in pairs]
    judge = rounds.judges[0]
    key = digest_of(prompts, texts, judge.identity())[:8]
    given = rounds.judged(pool, judge, prompts, texts, f"trusted_{key}")
    wins = [None if a is None or b is None else (1.0 if a > b else 0.5 if a == b else 0.0) for a, b in given]
    return {"pairs": len(pairs), **_mean(wins, "share")}


def got_worse(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a judge agrees less with trusted pairs than in an earlier round, by more than chance."""
    return bool(now["share"] < before["share"] - max(now["error"], before["error"]))


def _mean(values: Sequence[float | None], name: str) -> dict[str, Any]:
    """The mean, and half of its 95 % interval.

    That of right and wrong answers has two more of each (Agresti and Coull, Approximate is better than "exact" for
    interval estimation of binomial proportions, 1998): a few that are all right do not prove that all are.

    >>> _mean([1.0] * 8, "share")["error"] > 0.2, _mean([3.5] * 8, "score")["error"]
    (True, 0.0)
    """
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    some = [*known, 0.0, 0.0, 1.0, 1.0] if known and {*known} <= {0.0, 0.5, 1.0} else known
    middle = sum(some) / max(1, len(some))
    spread = sum((value - middle) ** 2 for value in some) / max(1, len(some) - 1)
    error = _Z * math.sqrt(spread / max(1, len(some)))
    return {name: mean, "error": error, "no_opinion": len(values) - len(known)}
