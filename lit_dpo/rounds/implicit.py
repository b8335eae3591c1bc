"""A judge that is a policy: what it prefers to its reference is taken for better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.pair import Pair
from lit_dpo.data.partition import Pool, Prompt
from lit_dpo.models import load_model
from lit_dpo.pairs import PairBatch
from lit_dpo.pretrained import read_tokenizer
from lit_dpo.references.table import fingerprint
from lit_dpo.rounds.judges import Judge, JudgeError
from lit_dpo.scoring.score import Scorer

_NO_LIMIT = 1 << 40  # tokens
_ROUND, _FIRST = "the policy that starts the round", "the model that starts the first round"


class ImplicitReward(Judge):
    """The implicit reward of a policy: how much more likely it finds a completion than its reference does.

        score = beta * (log p(completion | prompt) - log p_reference(completion | prompt))

    Log-probs are sums over the completion's tokens as the tokenizer gives them for the whole text, its end included.
    No rounds take this judge unless it is named. It knows nothing but the policy, and rewards what the policy already
    prefers: errors are confirmed and grow from round to round. Compare it with `trusted` pairs in every round.

    Source: Rafailov et al., Direct preference optimization, https://arxiv.org/abs/2305.18290, equation 5; as a judge of
    rounds: Chen et al., Bootstrapping language models with DPO implicit rewards, https://arxiv.org/abs/2406.09760.

    Args:
        model: The policy, a hub name or folder; `None` is the one that starts the round.
        reference: A hub name or folder; `None` is the model that starts the first round. One of both must be named: in
            the first round they would be the same model, and every score 0.
        beta: Factor of the log-ratio, above 0. It decides what a `gap` or `floor` of a picker means.
        batch_size: Completions at a time, at least 1.

    Raises:
        ValueError: An option is out of its range, or neither model is named.
    """

    def __init__(
        self, model: str | None = None, reference: str | None = None, beta: float = 0.1, batch_size: int = 16
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"`beta` must be above 0, got {beta}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if model is None and reference is None:
            raise ValueError(
                f"In the first round {_ROUND} is {_FIRST}, and the implicit reward of every completion 0: name another "
                "`model` or `reference` of `ImplicitReward`."
            )
        self.model, self.reference, self.beta, self.batch_size = model, reference, beta, batch_size
        self._round: tuple[int, Pool] | None = None
        self._loaded: tuple[Any, Any, PairEncoder] | None = None

    def prepare(self, step: int, pool: Pool) -> None:
        """Know the models of this round."""
        self._round = step, pool

    def _open(self) -> tuple[Any, Any, PairEncoder]:
        if self._loaded is None:
            policy, tokenizer, template = self._load(self.model, start=False)
            reference, other, _ = self._load(self.reference, start=True)
            if tokenizer.get_vocab() != other.get_vocab():
                raise JudgeError(
                    f"`{self.reference or _FIRST}` has another tokenizer than `{self.model or _ROUND}`, so their "
                    "log-probs cannot be compared: give a `reference` that shares it."
                )
            self._loaded = policy, reference, PairEncoder(tokenizer, _NO_LIMIT, chat_template=template)
        return self._loaded

    def _load(self, name: str | None, start: bool) -> tuple[Any, Any, str | None]:
        """A model on its device, its tokenizer, and the chat template of the data if it is one of the run's."""
        if name is not None:
            model: Any = load_model(name)
            return model.to("cuda" if torch.cuda.is_available() else "cpu"), read_tokenizer(name), None
        if self._round is None:
            raise JudgeError("Outside of rounds `ImplicitReward` needs both: name its `model` and its `reference`.")
        step, pool = self._round
        return *pool.model(0 if start else step), pool.encoder.chat_template

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """The scaled log-ratio of each."""
        policy, reference, encoder = self._open()
        # Beside itself twice over, since pairs are what is encoded; only the first side is scored.
        pairs = [
            Pair(prompt, *_sides(prompt, said), "judged", "a judged completion")  # type: ignore[arg-type]
            for prompt, said in zip(prompts, completions, strict=True)
        ]
        ids = [(one.prompt, one.chosen, one.chosen[:1]) for one in map(encoder, pairs)]
        found: list[float | None] = []
        for start in range(0, len(ids), self.batch_size):
            batch = PairBatch.from_lists(ids[start : start + self.batch_size])
            now, before = (Scorer()(model, batch.to(model.device)).chosen.cpu() for model in (policy, reference))
            found += (self.beta * (now - before)).tolist()  # (some,)
        return found

    def identity(self) -> dict[str, Any]:
        """Both names, beta, and the fingerprints of the weights that the round does not decide by itself."""
        policy, reference, _ = self._open()
        named = [model for name, model in ((self.model, policy), (self.reference, reference)) if name is not None]
        who = {"policy": self.model or _ROUND, "reference": self.reference or _FIRST, "beta": self.beta}
        weights = [fingerprint(model.state_dict().items()) for model in named]
        return {**super().identity(), "model": who, "weights": weights}

    def close(self) -> None:
        """Free its memory."""
        self._loaded = None


def _sides(prompt: Prompt, said: str) -> tuple[Any, Any]:
    """A completion as the sides of a pair: itself, and another that begins as it does."""
    texts = said, said * 2 or "0"
    if isinstance(prompt, str):
        return texts
    first, second = ([{"role": "assistant", "content": text}] for text in texts)
    return first, second
