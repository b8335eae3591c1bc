"""Iterative DPO: each step trains on pairs of what the policy that starts it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_dpo.data.partition import Pool
from lit_dpo.data.streams import Each
from lit_dpo.processes import rank_zero_info
from lit_dpo.rounds.base import Rounds, check
from lit_dpo.rounds.judges import Judge
from lit_dpo.rounds.pickers import Picker, RightVsWrong
from lit_dpo.rounds.rows import Row, digest_of, picked, prompts_of, said_of
from lit_dpo.sampling import Sampler
from lit_dpo.vllm_engine import VLLM


class OnPolicy(Rounds):
    """Rounds of pairs of the policy's own completions: sampled, judged and paired before each step (iterative DPO).

    A round is a step. The policy that starts it completes prompts, the judge scores the completions, the picker makes
    pairs of them, and the step trains on these. Completions without an end, empty ones, and those that say what an
    earlier one of their prompt says, are left out. The folder of the step keeps it all: `completions.RANK.jsonl`,
    `scores.RANK.jsonl`, `pairs.jsonl`, and `round.json`, which counts. A run that is stopped goes on behind the last
    prompt that was sampled or judged, and makes the same pairs as one that was not.

    The reference of a round is the policy that starts it, or the model of a `FrozenReference` that names one, such as
    the first. The pool of the data module is not trained on.

    Source: Xu et al., Some things are more cringe than others: iterative preference optimization with the pairwise
    cringe loss, https://arxiv.org/abs/2312.16682; Pang et al., Iterative reasoning preference optimization,
    https://arxiv.org/abs/2404.19733.

    Args:
        prompts: A data set of pairs, or of rows with a `prompt` alone; or a `.txt` file with a prompt a line. A prompt
            counts once, however often it stands there.
        judge: What scores completions.
        picker: What makes pairs of them.
        rounds: Steps, at least 1.
        prompts_per_round: Prompts of a round, in the order of the file; each round begins where the one before ended,
            and behind the last prompt comes the first. `None` takes all prompts in each round.
        min_pairs: A round that gives fewer pairs is an error, at least 1.
        samples: Completions of a prompt.
        temperature: Divides the logits, above 0.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a completion at most, its end included.
        seed: Of the random numbers of sampling.
        batch_size: Completions sampled at a time; it does not change them.
        engine: `VLLM` samples with vLLM, which is less exact; by default transformers does.
        greedy_prompts: Prompts whose likeliest completions the judge scores at the start of each round and after the
            last one; a data set as `prompts`.
        trusted: Pairs whose label is trusted: in each round it is measured how often the judge prefers the chosen one.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        prompts: str,
        judge: Judge,
        picker: Picker = RightVsWrong(),  # noqa: B008 - frozen
        rounds: int = 1,
        prompts_per_round: int | None = None,
        min_pairs: int = 1,
        samples: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 512,
        greedy_prompts: str | None = None,
        trusted: str | None = None,
        engine: VLLM | None = None,
    ) -> None:
        sampler = Sampler(samples, temperature, top_p, max_new_tokens, seed, rows=batch_size, engine=engine)
        super().__init__(rounds, sampler, [judge], min_pairs, greedy_prompts, trusted)
        check(prompts_per_round=prompts_per_round)
        self.prompts, self.judge, self.picker, self.prompts_per_round = prompts, judge, picker, prompts_per_round

    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """Completions, scores, and the pairs that the picker makes of them."""
        prompts, chosen = prompts_of(self.prompts, step, self.prompts_per_round, self.picker.needs_chosen)
        picker = {"picker": type(self.picker).__name__, **getattr(self.picker, "__dict__", {})}
        self.begin(step, pool, prompts=digest_of(prompts, chosen), **picker, **self.judge.identity())
        texts, counts = said_of(self.sample(step, pool, prompts))
        rank_zero_info(f"Round {step}: {len(prompts)} prompts sampled, judging")
        if chosen:
            samples = texts
            texts = Each(len(samples), lambda number: [*samples[number], chosen[number]])
        scores = self.judged(pool, self.judge, prompts, texts)
        rows, more = picked(self.picker, prompts, texts, scores, bool(chosen))
        return rows, {"prompts": len(prompts), **counts, **more}
