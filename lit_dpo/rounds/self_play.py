"""Self-augmented pairs: an answer of the data against the same answer with a segment that the policy wrote (SAPO)."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from lit_dpo.data import new_pairs
from lit_dpo.data.answers import read_answers
from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.opening import Opening, answer_of, open_answer
from lit_dpo.data.pair import Pair, RowError
from lit_dpo.data.partition import Pool
from lit_dpo.data.streams import Each, Spool, Streamed, different
from lit_dpo.data.texts import pair_of, values_of
from lit_dpo.rounds.base import Rounds, check
from lit_dpo.rounds.rows import Row, digest_of
from lit_dpo.sampling import Sampler
from lit_dpo.vllm_engine import VLLM

_AT_ONCE = 256  # pairs, to be encoded together


class SelfPlay(Rounds):
    """Rounds of pairs made of answers alone: each against itself with a segment that the policy wrote (SAPO).

    No preferences are needed, and no judge. A round is a step. An answer of the data is cut at a random place, the
    policy that starts the round goes on from there for a segment, and behind the segment comes what stood there, unless
    the policy ended the answer itself. That is the rejected completion, and the answer the chosen one. An answer no
    longer than a segment is written anew from its beginning. Pairs go into a buffer, and the step trains on what is in
    it: the newest pairs of this round and those before.

    An answer makes no pair if the policy writes what stood there, if it comes to no end and there is nothing to put
    behind it, or if `max_length` of the data leaves no room; `round.json` counts these by reason. The cut depends on
    the row, the round and `seed` alone, and the segment on these and the policy. Like every round, one that is stopped
    goes on behind the last answer that was gone on with.

    The paper's reference is an exponential moving average of the policy: `SyncedReference(every=1, mix=0.5)`. There
    that average writes the segments too; here the policy that starts the round does, which the average has come to
    within the last few optimizer steps. The paper draws its batches from the buffer, and writes one new pair for each
    that it draws; here a round is an epoch, or several, over the buffer.

    Source: Yin et al., Self-augmented preference optimization: off-policy paradigms for language model alignment,
    https://arxiv.org/abs/2405.20830, and its code, whose settings the defaults are.

    Args:
        answers: A data set of rows with a prompt and an answer: pairs, whose chosen answer is taken, or `prompt` and
            `completion`, or `messages` that end with the assistant's.
        rounds: Steps, at least 1.
        prompts_per_round: Rows of a round, in the order of the file; each round begins where the one before ended, and
            behind the last row comes the first. `None` takes all rows in each round.
        min_pairs: A round that makes fewer new pairs is an error, at least 1.
        buffer: Pairs that a step trains on, at most: the newest; at least 1.
        segment_tokens: Tokens that the policy writes at most, at least 1.
        temperature: Divides the logits, above 0.
        top_k: Draw among this many most likely tokens; `None` for all.
        top_p: Draw among the fewest most likely of these tokens whose probabilities sum to this.
        seed: Of the cuts and of sampling.
        batch_size: Answers gone on with at a time; it does not change what comes of them.
        engine: `VLLM` samples with vLLM, which is less exact; by default transformers does.

    Raises:
        ValueError: An option is out of its range.
    """

    remedy: ClassVar[str] = "take longer answers, a higher `temperature`, or another number of `segment_tokens`"

    def __init__(
        self,
        answers: str,
        rounds: int = 1,
        prompts_per_round: int | None = None,
        min_pairs: int = 1,
        buffer: int = 2000,
        segment_tokens: int = 256,
        temperature: float = 0.7,
        top_k: int | None = 50,
        top_p: float = 0.95,
        seed: int = 0,
        batch_size: int = 512,
        engine: VLLM | None = None,
    ) -> None:
        check(prompts_per_round=prompts_per_round, buffer=buffer, segment_tokens=segment_tokens)
        sampler = Sampler(1, temperature, top_p, segment_tokens, seed, rows=batch_size, engine=engine, top_k=top_k)
        super().__init__(rounds, sampler, (), min_pairs)
        self.answers, self.prompts_per_round, self.buffer = answers, prompts_per_round, buffer

    def next(self, step: int, pool: Pool) -> Sequence[Row] | None:
        """The pairs in the buffer: those of this round behind those of the rounds before, at most `buffer` of them.

        Raises:
            ValueError: There are too few rows or new pairs, or the round was begun with other options.
        """
        new = super().next(step, pool)
        if new is None:
            return None
        before = pool.folder_of(step - 1) / new_pairs.FILE if step else None
        known = sum(1 for _ in _lines(before)) + len(new)
        over = max(0, known - self.buffer)
        return Streamed(known - over, lambda: islice(chain(_lines(before), new), over, None))

    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """The new pairs of a round."""
        taken = self._taken(step)
        self.begin(step, pool, rows=digest_of(Each(len(taken), lambda n: _name(taken[n]))), buffer=self.buffer)
        encoder, opened, reasons = pool.encoder, Spool(), Counter[str]()
        for number, pair in enumerate(taken):
            found = self._open(encoder, pair, step)
            if isinstance(found, str):
                reasons[found] += 1
            else:
                opened.append([number, found.ids, found.said, found.rest])

        def opening(place: int) -> Opening:
            number, ids, said, rest = opened[place]
            return Opening(tuple(ids), said, rest, _name(taken[number]).encode())

        said = self.sample(step, pool, Each(len(opened), opening))

        def rejected(place: int) -> Pair | str:
            """The pair of an opening, or why there is none."""
            (number, _, begun, rest), [one] = opened[place], said[place]
            if not one["finished"] and not rest:
                return "no end"
            text = begun + (one["text"] if one["finished"] else one["text"].rstrip("\ufffd") + rest)
            if text == answer_of(taken[number]) or not text.strip():
                return "the policy says the same" if text.strip() else "empty"
            return _with_rejected(taken[number], text)

        kept = array("q")
        for start in range(0, len(opened), _AT_ONCE):
            places, pairs = list[int](), list[Pair]()
            for place in range(start, min(start + _AT_ONCE, len(opened))):
                made = rejected(place)
                if isinstance(made, str):
                    reasons[made] += 1
                else:
                    places.append(place)
                    pairs.append(made)
            for place, encoded in zip(places, encoder.many(pairs), strict=True):
                if isinstance(encoded, RowError):
                    reasons[encoded.reason] += 1
                else:
                    kept.append(place)
        finished = sum(one["finished"] for [one] in said)
        counts = {"prompts": len(taken), "completions": len(said), "finished": finished / max(1, len(said))}
        rows = Each(len(kept), lambda number: _row(rejected(kept[number])))  # type: ignore[arg-type]  # a pair
        return rows, {**counts, "without_pair": dict(sorted(reasons.items()))}

    def _taken(self, step: int) -> Sequence[Pair]:
        """The rows of a round; equal ones count once."""
        rows = ([_name(pair), values_of(pair)] for pair in read_answers(self.answers))
        known = different(rows, key=lambda row: row[0])
        count = len(known) if self.prompts_per_round is None else self.prompts_per_round
        if not known or count > len(known):
            raise ValueError(
                f"`{self.answers}` holds {len(known)} different rows, and a round takes {count or 'at least 1'}: give "
                "more, or lower `prompts_per_round`."
            )
        return Each(count, lambda number: pair_of(known[(step * count + number) % len(known)][1]))

    def _open(self, encoder: PairEncoder, pair: Pair, step: int) -> Opening | str:
        drawn = sha256(f"{self.sampler.seed} {step} {_name(pair)}".encode()).digest()
        place = int.from_bytes(drawn[:6], "little") / 2**48
        try:
            return open_answer(encoder, pair, self.sampler.max_new_tokens, place, _name(pair).encode())
        except RowError as error:
            return error.reason


def _lines(path: Path | None) -> Iterator[Row]:
    """The pairs of the round before, if there is one."""
    if path is not None:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _name(pair: Pair) -> str:
    """What tells a row from the others."""
    return json.dumps([pair.prompt, pair.chosen, [*pair.tools], {**pair.template_options}])


def _with_rejected(pair: Pair, text: str) -> Pair:
    """The pair with another rejected side: the turn of the answer, with this text."""
    return replace(pair, rejected=text if isinstance(pair.chosen, str) else [{**pair.chosen[0], "content": text}])


def _row(pair: Pair) -> Row:
    """A pair as a row of a data file."""
    sides: Sequence[tuple[str, object]] = [(name, getattr(pair, name)) for name in ("prompt", "chosen", "rejected")]
    more = {"tools": [*pair.tools], "chat_template_kwargs": {**pair.template_options}}
    return {**dict(sides), **{name: value for name, value in more.items() if value}}
