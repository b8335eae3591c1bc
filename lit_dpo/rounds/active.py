"""Active preference learning: the judge is asked where its answer is likely to teach most, within a budget."""

from __future__ import annotations

import json
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import replace_file, write_json
from lit_dpo.data.partition import Pool, Prompt
from lit_dpo.data.streams import Each, Streamed, those
from lit_dpo.files import read_json
from lit_dpo.processes import rank_zero_info
from lit_dpo.rounds.base import Rounds, check, own_rank
from lit_dpo.rounds.judges import Judge
from lit_dpo.rounds.rows import Row, digest_of, prompts_of, row_of, said_of
from lit_dpo.sampling import Sampler
from lit_dpo.vllm_engine import VLLM

ASKED = "asked.jsonl"
_QUESTIONS = "questions.json"


class Active(Rounds):
    """Rounds that ask a costly judge about few pairs, chosen by the policy (active preference learning).

    A round is a step. The policy that starts it completes prompts. Those are ranked by its predictive entropy, which is
    minus the mean log-prob of a prompt's samples (over whole completions, whatever their length); the top share of them
    is ranked by the gap between the implicit rewards of two completions, the first two that differ,

        |log p(a)/p_first(a) - log p(b)/p_first(b)|,

    and the judge is asked about the top pairs. The step trains on all pairs asked about so far. In the first round,
    where the policy is the first model and all gaps are 0, the entropy decides. The reference is the first model.

    A question is a pair: the judge scores both completions, and equal scores or no opinion give no pair, but count. The
    questions of a round are written to `questions.json` before the first is asked, each answer to `scores.RANK.jsonl`
    when it comes, and all of them to `asked.jsonl`. A question whose answer is there is never asked again; after a kill
    the one under way is, and no other.

    Source: Muldrew et al., Active preference learning for large language models, https://arxiv.org/abs/2402.08114.
    There: 32 samples for the entropy, beta 0.1.

    Args:
        prompts: A data set of pairs, or of rows with a `prompt` alone; or a `.txt` file with a prompt a line. A prompt
            is asked about once.
        judge: What is asked: a verifier, a reward model, a program, a person behind a program.
        budget: Questions of all rounds, at least one a round. Each round may ask an equal part of it, and what the
            rounds before have left.
        rounds: Steps, at least 1.
        prompts_per_round: Prompts that a round chooses from, in the order of the file; each round begins where the one
            before ended. `None` takes all that were not asked about.
        entropy: Rank prompts by entropy. Without it and without `gap` they are taken at random: the control.
        gap: Rank pairs by the gap of their implicit rewards.
        share: With both rankings, the share of prompts that goes from the first to the second, in (0, 1]; `None` for
            one half. It is never less than what the round may ask.
        restart: Train each step from the first model; `False` goes on from the policy that the step before has made.
        min_pairs: A round that trains on fewer pairs is an error, at least 1.
        samples: Completions of a prompt, at least 2.
        temperature: Divides the logits, above 0; the entropy is that of the policy where it is 1.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a completion at most, its end included.
        seed: Of the random numbers of sampling and of the random order.
        batch_size: Completions sampled at a time; it does not change them.
        engine: `VLLM` samples with vLLM, which is less exact; by default transformers does.

    Raises:
        ValueError: An option is out of its range.
    """

    first_reference: ClassVar[bool] = True

    def __init__(
        self,
        prompts: str,
        judge: Judge,
        budget: int,
        rounds: int = 1,
        prompts_per_round: int | None = None,
        entropy: bool = True,
        gap: bool = True,
        share: float | None = None,
        restart: bool = True,
        min_pairs: int = 1,
        samples: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 512,
        engine: VLLM | None = None,
    ) -> None:
        super().__init__(
            rounds,
            Sampler(samples, temperature, top_p, max_new_tokens, seed, rows=batch_size, engine=engine),
            [judge],
            min_pairs,
        )
        check(prompts_per_round=prompts_per_round)
        if budget < rounds:
            raise ValueError(f"`budget` must be at least `rounds`, which is {rounds}, got {budget}.")
        if samples < 2:
            raise ValueError(f"`samples` must be at least 2, since the judge compares two, got {samples}.")
        if share is not None and not (entropy and gap and 0 < share <= 1):
            raise ValueError(
                f"`share` must be in (0, 1] and needs both `entropy` and `gap`, got {share}: leave it out otherwise."
            )
        self.prompts, self.judge, self.budget, self.prompts_per_round = prompts, judge, budget, prompts_per_round
        self.entropy, self.gap, self.share, self.restarts = entropy, gap, share, restart

    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """Samples, both rankings, answers of the judge, and the pairs of all answers so far."""
        earlier = _told([pool.folder_of(before) / ASKED for before in range(step)])
        known = {_key(one["prompt"]) for one in earlier}
        every = prompts_of(self.prompts, step, self.prompts_per_round)[0]
        prompts = those((n for n, one in enumerate(every) if _key(one) not in known), every)
        own = {name: getattr(self, name) for name in ("budget", "rounds", "entropy", "gap", "share", "restarts")}
        digests = {"prompts": digest_of(prompts), "earlier": digest_of(earlier)}
        self.begin(step, pool, partition="Active", **digests, **own, **self.judge.identity())
        _refuse_strangers(pool)
        found = self.sample(step, pool, prompts)
        texts, counts = said_of(found)
        pairs = Each(len(texts), lambda number: texts[number][:2])
        able = array("q", (number for number, said in enumerate(pairs) if len(said) > 1))
        left = max(0, self.budget * (step + 1) // self.rounds - len(earlier))
        ranked = self._questions(pool, lambda: self._ranked(step, pool, prompts, found, pairs, able, left)[:left])
        rank_zero_info(f"Round {step}: asking about {len(ranked)} of {len(prompts)} prompts")
        asked_of, asked = those(ranked, prompts), those(ranked, pairs)
        scores = self.judged(pool, self.judge, asked_of, asked)

        def told() -> Iterator[dict[str, Any]]:
            for prompt, pair, given in zip(asked_of, asked, scores, strict=True):
                yield {"prompt": prompt, "completions": pair, "scores": given}

        if is_first():
            with replace_file(pool.folder / ASKED) as file:
                for line in told():
                    file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        answers = Streamed(len(earlier) + len(ranked), lambda: chain(earlier, told()))
        rows, reasons = _pairs(answers)
        reasons["fewer than two completions"] += len(prompts) - len(able)
        return rows, {
            "prompts": len(prompts),
            **counts,
            "asked": len(ranked),
            "asked_so_far": len(answers),
            "without_pair": dict(sorted((+reasons).items())),
        }

    # -- rankings -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _questions(pool: Pool, rank: Callable[[], Sequence[int]]) -> Sequence[int]:
        """The numbers of the prompts asked about, as they were written down before the first question."""
        path = pool.folder / _QUESTIONS
        if any(pool.gathered({own_rank(): path.exists()}).values()):  # asked of all before one of them writes it
            return array("q", read_json(path)["prompts"])
        ranked = rank()
        if is_first():
            write_json(path, {"prompts": list(ranked)})
        return ranked

    def _ranked(
        self,
        step: int,
        pool: Pool,
        prompts: Sequence[Prompt],
        found: Sequence[Sequence[Mapping[str, Any]]],
        pairs: Sequence[Sequence[str]],
        able: Sequence[int],
        left: int,
    ) -> Sequence[int]:
        """The numbers of the prompts that may be asked about, the most wanted first."""
        chance = Each(len(able), lambda place: bytes.fromhex(digest_of(self.sampler.seed, step, prompts[able[place]])))
        order = _sorted(able, chance)
        if self.entropy:
            samples = Each(len(order), lambda place: [one["ids"] for one in found[order[place]]])
            order = _sorted(order, self._values(pool, those(order, prompts), samples, step, statistics.fmean))
        if self.gap and step:
            if self.entropy:
                share = 0.5 if self.share is None else self.share
                order = order[: max(left, math.ceil(share * len(order)))]
            kept = order
            asked_of = those(kept, prompts)
            ids = Each(len(kept), lambda place: [_ids_of(text, found[kept[place]]) for text in pairs[kept[place]]])
            now, first = (self._values(pool, asked_of, ids, model, _difference) for model in (step, 0))
            order = _sorted(kept, Each(len(kept), lambda place: -abs(now[place] - first[place])))
        return order

    def _values(
        self,
        pool: Pool,
        prompts: Sequence[Prompt],
        ids: Sequence[list[list[int]]],
        step: int,
        value: Callable[[list[float]], float],
    ) -> array[float]:
        """A number for each prompt, made of log-probs of its completions under the model that starts a step."""
        with self.seconds("ranking"):
            own = pool.share(len(prompts))
            found = pool.logps(those(own, prompts), those(own, ids), step)
            parts = pool.gathered({own_rank(): (own, array("d", map(value, found)))})
        values = array("d", bytes(8 * len(prompts)))
        for numbers, part in parts.values():
            for number, one in zip(numbers, part, strict=True):
                values[number] = one
        return values


def _difference(logps: list[float]) -> float:
    return logps[0] - logps[1]


def _key(prompt: Prompt) -> bytes:
    return blake2b(json.dumps(prompt).encode(), digest_size=20).digest()


def _sorted(numbers: Sequence[int], keys: Sequence[Any]) -> array[int]:
    """Numbers by the keys that stand at their places; those of one key stay in their order."""
    return array("q", (numbers[place] for place in sorted(range(len(numbers)), key=keys.__getitem__)))


def _ids_of(text: str, found: Sequence[Mapping[str, Any]]) -> list[int]:
    """The token ids of the first completion that says this."""
    return next(list(one["ids"]) for one in found if one["finished"] and one["text"] == text)


def _pairs(asked: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Row], Counter[str]]:
    """Rows of all answers, and why some questions gave none."""
    reasons = Counter(found for one in asked if isinstance(found := _pair(one), str))
    rows = Streamed(
        len(asked) - reasons.total(), lambda: (row for row in map(_pair, asked) if not isinstance(row, str))
    )
    return rows, reasons


def _pair(one: Mapping[str, Any]) -> Row | str:
    """The row of one answer, or why there is none."""
    (first, second), (left, right) = one["completions"], one["scores"]
    if left is None or right is None:
        return "no opinion"
    if left == right:
        return "equal scores"
    return row_of(one["prompt"], *((first, second) if left > right else (second, first)))


def _told(paths: Sequence[Path]) -> Sequence[dict[str, Any]]:
    """What the judge has said, read anew from these files each time."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"`{path}` is missing, which holds what the judge has said: restore it.")

    def lines() -> Iterator[dict[str, Any]]:
        for path in paths:
            with path.open(encoding="utf-8", newline="\n") as file:
                yield from (json.loads(line) for line in file if line.strip())

    return Streamed(sum(1 for _ in lines()), lines)


def _refuse_strangers(pool: Pool) -> None:
    """Refuse several processes that know nothing of each other, since each would ask the judge."""
    if own_rank() > 0 and len(pool.share(2)) == 2:
        raise ValueError(
            "`Active` asks the judge once, and processes that torchrun or Slurm start would each ask it in their first "
            "round: start one process, and let `trainer.devices` start the others."
        )
