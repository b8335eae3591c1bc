"""Active preference learning: the judge is asked where its answer is likely to teach most, within a budget."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import replace_file, write_json
from lit_dpo.data.partition import Pool, Prompt
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

    def make(self, step: int, pool: Pool) -> tuple[list[Row], dict[str, Any]]:
        """Samples, both rankings, answers of the judge, and the pairs of all answers so far."""
        earlier = [line for before in range(step) for line in _lines(pool.folder_of(before) / ASKED)]
        known = {json.dumps(one["prompt"]) for one in earlier}
        prompts = [
            one for one in prompts_of(self.prompts, step, self.prompts_per_round)[0] if json.dumps(one) not in known
        ]
        own = {name: getattr(self, name) for name in ("budget", "rounds", "entropy", "gap", "share", "restarts")}
        digests = {"prompts": digest_of(prompts), "earlier": digest_of(earlier)}
        self.begin(step, pool, partition="Active", **digests, **own, **self.judge.identity())
        _refuse_strangers(pool)
        found = self.sample(step, pool, prompts)
        texts, counts = said_of(found)
        able = [number for number, said in enumerate(texts) if len(said) > 1]
        left = self.budget * (step + 1) // self.rounds - len(earlier)
        ranked = self._questions(pool, lambda: self._ranked(step, pool, prompts, found, texts, able, left)[:left])
        rank_zero_info(f"Round {step}: asking about {len(ranked)} of {len(prompts)} prompts")
        pairs = [texts[number][:2] for number in ranked]
        asked_of = [prompts[number] for number in ranked]
        scores = self.judged(pool, self.judge, asked_of, pairs)
        asked = [
            {"prompt": prompt, "completions": pair, "scores": given}
            for prompt, pair, given in zip(asked_of, pairs, scores, strict=True)
        ]
        if is_first():
            with replace_file(pool.folder / ASKED) as file:
                file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in asked).encode())
        rows, reasons = _pairs([*earlier, *asked])
        reasons["fewer than two completions"] += len(prompts) - len(able)
        return rows, {
            "prompts": len(prompts),
            **counts,
            "asked": len(asked),
            "asked_so_far": len(earlier) + len(asked),
            "without_pair": dict(sorted((+reasons).items())),
        }

    # -- rankings -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _questions(pool: Pool, rank: Callable[[], list[int]]) -> list[int]:
        """The numbers of the prompts asked about, as they were written down before the first question."""
        path = pool.folder / _QUESTIONS
        if any(pool.gathered({own_rank(): path.exists()}).values()):  # asked of all before one of them writes it
            return list(read_json(path)["prompts"])
        ranked = rank()
        if is_first():
            write_json(path, {"prompts": ranked})
        return ranked

    def _ranked(
        self,
        step: int,
        pool: Pool,
        prompts: Sequence[Prompt],
        found: Sequence[Sequence[Mapping[str, Any]]],
        texts: Sequence[Sequence[str]],
        able: Sequence[int],
        left: int,
    ) -> list[int]:
        """The numbers of the prompts that may be asked about, the most wanted first."""
        order = sorted(able, key=lambda number: digest_of(self.sampler.seed, step, prompts[number]))
        if self.entropy:
            samples = {number: [one["ids"] for one in found[number]] for number in able}
            logps = self._logps(pool, prompts, samples, step)
            order.sort(key=lambda number: statistics.fmean(logps[number]))
        if self.gap and step:
            if self.entropy:
                share = 0.5 if self.share is None else self.share
                order = order[: max(left, math.ceil(share * len(order)))]
            ids = {number: [_ids_of(text, found[number]) for text in texts[number][:2]] for number in order}
            now = self._logps(pool, prompts, ids, step)
            first = self._logps(pool, prompts, ids, 0)
            rewards = {n: [a - b for a, b in zip(now[n], first[n], strict=True)] for n in order}
            order.sort(key=lambda number: -abs(rewards[number][0] - rewards[number][1]))
        return order

    def _logps(
        self, pool: Pool, prompts: Sequence[Prompt], ids: Mapping[int, list[list[int]]], step: int
    ) -> dict[int, list[float]]:
        """Log-probs of completions under the model that starts a step, by the number of their prompt."""
        numbers = [*ids]
        with self.seconds("ranking"):
            own = [numbers[place] for place in pool.share(len(numbers))]
            found = pool.logps([prompts[number] for number in own], [ids[number] for number in own], step)
            return pool.gathered(dict(zip(own, found, strict=True)))


def _ids_of(text: str, found: Sequence[Mapping[str, Any]]) -> list[int]:
    """The token ids of the first completion that says this."""
    return next(list(one["ids"]) for one in found if one["finished"] and one["text"] == text)


def _pairs(asked: Sequence[Mapping[str, Any]]) -> tuple[list[Row], Counter[str]]:
    """Rows of all answers, and why some questions gave none."""
    rows: list[Row] = []
    reasons: Counter[str] = Counter()
    for one in asked:
        (first, second), (left, right) = one["completions"], one["scores"]
        if left is None or right is None or left == right:
            reasons["equal scores" if left is not None and left == right else "no opinion"] += 1
            continue
        rows.append(row_of(one["prompt"], *((first, second) if left > right else (second, first))))
    return rows, reasons


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"`{path}` is missing, which holds what the judge has said: restore it.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _refuse_strangers(pool: Pool) -> None:
    """Refuse several processes that know nothing of each other, since each would ask the judge."""
    if own_rank() > 0 and len(pool.share(2)) == 2:
        raise ValueError(
            "`Active` asks the judge once, and processes that torchrun or Slurm start would each ask it in their first "
            "round: start one process, and let `trainer.devices` start the others."
        )
