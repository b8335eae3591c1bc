"""Filtered DPO: the pairs whose chosen answer is still better than what the policy says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lit_dpo.data.pair import Pair, RowError
from lit_dpo.data.partition import Pool
from lit_dpo.data.streams import Each, Grouped, Streamed
from lit_dpo.rounds.base import Rounds
from lit_dpo.rounds.judges import Judge
from lit_dpo.rounds.rows import Row, answer_of, digest_of
from lit_dpo.sampling import Sampler
from lit_dpo.vllm_engine import VLLM


class Filtered(Rounds):
    """Rounds of the training pairs whose chosen answer is better than a sample of the policy's (filtered DPO, fDPO).

    A round is a step, and an epoch with `max_epochs: 1`. The policy that starts it says one thing to each prompt of the
    training pairs, and the judge scores it and the chosen answer. A pair is trained on in this round if the sample
    scores less; the others, and those of which the judge has no opinion, are left out until the next round. A sample
    counts as it is, with or without an end. With a judge that only knows right and wrong, equal scores leave out pairs
    whose chosen answer is as right, or as wrong, as the sample.

    The reference of all rounds is the model that starts the first one. `round.json` counts the pairs of the data set
    (`of`), those kept, replaced and dropped, and those without an opinion.

    Source: Morimura et al., Filtered direct preference optimization, https://arxiv.org/abs/2404.13846. There: 64 new
    tokens at temperature 1, a reward model, beta 0.1. `replace` is ours.

    Args:
        judge: What scores chosen answers and samples.
        rounds: Steps, at least 1.
        replace: Take a sample that has an end and scores more than the chosen answer in its place, in the place of
            leaving the pair out.
        min_pairs: A round that leaves fewer pairs is an error, at least 1.
        temperature: Divides the logits, above 0.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a sample at most, its end included.
        seed: Of the random numbers of sampling.
        batch_size: Samples drawn at a time; it does not change them.
        engine: `VLLM` samples with vLLM, which is less exact; by default transformers does.

    Raises:
        ValueError: An option is out of its range.
    """

    first_reference: ClassVar[bool] = True

    def __init__(
        self,
        judge: Judge,
        rounds: int = 1,
        replace: bool = False,
        min_pairs: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        batch_size: int = 512,
        engine: VLLM | None = None,
    ) -> None:
        sampler = Sampler(1, temperature, top_p, max_new_tokens, seed, rows=batch_size, engine=engine)
        super().__init__(rounds, sampler, [judge], min_pairs)
        self.judge, self.replace = judge, replace

    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """One sample a prompt, and the pairs whose chosen answer beats it."""
        pairs = pool.pairs()
        keys, answers, rejected = (
            Each(len(pairs), lambda n: json.dumps(pairs[n].prompt)),
            Each(len(pairs), lambda n: _answer(pairs[n])),
            Each(len(pairs), lambda n: pairs[n].rejected),
        )
        digest = digest_of(keys, answers, rejected)
        self.begin(step, pool, pairs=digest, partition="Filtered", replace=self.replace, **self.judge.identity())
        equal = Grouped(keys)
        prompts = Each[Any](len(equal.first), lambda n: pairs[int(equal.first[n])].prompt)
        samples = self.sample(step, pool, prompts)

        def judged(number: int) -> list[str]:  # the sample, and the answers of the pairs with this prompt
            return list(dict.fromkeys([samples[number][0]["text"], *(answers[int(n)] for n in equal.of(number))]))

        texts = Each(len(prompts), judged)
        scores = self.judged(pool, self.judge, prompts, texts)

        def each() -> Iterator[tuple[Row | None, str]]:
            for pair, group in zip(pairs, equal.group.tolist(), strict=True):
                [sample], score = samples[group], dict(zip(texts[group], scores[group], strict=True))
                yield self._kept(pair, sample, score[sample["text"]], score[_answer(pair)])

        counts = Counter(what for _, what in each())
        finished = sum(found[0]["finished"] for found in samples) / len(samples)
        rows = Streamed(counts["kept"] + counts["replaced"], lambda: (row for row, _ in each() if row is not None))
        return rows, {
            "prompts": len(prompts),
            "of": len(pairs),
            "completions": len(samples),
            "finished": finished,
            **{name: counts.pop(name, 0) for name in ("kept", "replaced")},
            "dropped": counts.total() - counts["no opinion"],
            "no_opinion": counts["no opinion"],
            "without_pair": dict(sorted(counts.items())),
        }

    def _kept(
        self, pair: Pair, sample: dict[str, Any], said: float | None, chosen: float | None
    ) -> tuple[Row | None, str]:
        """The row that is trained on, if there is one, and what became of the pair."""
        if said is None or chosen is None:
            return None, "no opinion"
        if said < chosen:
            return self._row(pair), "kept"
        if said == chosen:
            return None, "sample as good as the chosen answer"
        if not self.replace:
            return None, "sample better than the chosen answer"
        rejected = pair.rejected if isinstance(pair.rejected, str) else pair.rejected[-1].get("content")
        if not sample["finished"] or not sample["text"].strip() or sample["text"] == rejected:
            return None, "better sample without an end, empty, or the rejected answer"
        better = sample["text"] if isinstance(pair.chosen, str) else [{"role": "assistant", "content": sample["text"]}]
        return {**self._row(pair), "chosen": better}, "replaced"

    @staticmethod
    def _row(pair: Pair) -> Row:
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **pair.values}


def _answer(pair: Pair) -> str:
    """The chosen answer of a pair that can be sampled for."""
    if pair.tools or pair.template_options:
        reason, remedy = "prompts with tools or template options are not sampled", "leave such rows out"
        raise RowError(pair.row, "tools", reason, remedy)
    return answer_of(pair.chosen, pair.row)
