"""Completions of a causal language model that do not depend on what else is in the batch."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lit_dpo.pretrained import trusts_remote_code
from lit_dpo.scoring.decoder import decoder_parts
from lit_dpo.scoring.score import length_turn, own_attention

REPEATING = 0.5
"""A completion repeats itself if so much of it stood in it before; see `repetition`."""

_WINDOW = 8  # batches whose rows are sorted by length together, so that little is padded
_BELOW_ONE = 1 - 2.0**-32  # a draw of 1 would lie behind the last token


@dataclass(frozen=True)
class Completion:
    """What a model says to a prompt.

    Args:
        ids: The sampled token ids, the one that ends the completion included. They are kept because a text may be
            encoded in another way than it was sampled in.
        text: The ids as text, without special tokens.
        finished: Whether the model ended it, rather than the limit of tokens.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


class Engine(Protocol):
    """What completes in the place of transformers, such as `lit_dpo.VLLM`."""

    @property
    def complete(self) -> Callable[..., Iterator[list[Completion]]]:
        """Called with the arguments of `VLLM.complete`."""


@dataclass(frozen=True)
class Sampler:
    """Samples completions; `sampler(model, tokenizer, prompts)` yields those of each prompt.

    A completion depends on the model, the prompt, how often the prompt came before in the same call, the number of the
    sample, `round` and `seed` alone: its random numbers are those of a counter-based generator (Philox) with a key made
    of these, one for each token, and a token is drawn by the inverse of its distribution function. Batch size and
    batch mates change only the rounding of logits. In float32 this turns a token about once in a million; in bfloat16
    more often. The global random state is neither read nor changed.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox); Holtzman et al., The curious
    case of neural text degeneration, https://arxiv.org/abs/1904.09751 (`top_p`); Fan et al., Hierarchical neural story
    generation, https://arxiv.org/abs/1805.04833 (`top_k`).

    Args:
        samples: Completions a prompt, at least 1.
        temperature: Divides the logits, at least 0; 0 takes the most likely token, and a larger one is more random.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this, in (0, 1].
        max_new_tokens: Tokens of a completion at most, its end included; at least 1.
        seed: Of the random numbers.
        round: Of the random numbers too: another round draws others for the same prompts.
        rows: Completions sampled at once, at least 1. Models that carry a state, or whose positions depend on the
            length, do one at a time, because padding would change what they say.
        top_k: Draw among this many most likely tokens, at least 1; `None` for all. With `top_p` too, that chooses among
            these, whose probabilities then sum to 1.
        engine: What generates the completions of a round, such as `VLLM`; `None` for transformers.

    Raises:
        ValueError: An option is out of its range.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    round: int = 0
    rows: int = 64
    top_k: int | None = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "rows", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` must be at least 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"`samples` must be 1 at `temperature` 0, where all are alike, got {self.samples}: raise the "
                "temperature, or take one sample."
            )

    def __call__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Iterable[Sequence[int]],
        names: Iterable[bytes] | None = None,
    ) -> Iterator[list[Completion]]:
        """The completions of each prompt, in order; of the prompts, so many as are sampled at once are in memory.

        Between two prompts the model is as it was, so that it may be trained or scored with.

        Args:
            model: A transformers causal language model, alone or in the wrapper of peft.
            tokenizer: Its tokenizer.
            prompts: Token ids, at least one each.
            names: One for each prompt, which decides its random numbers in the place of its ids and how often these
                came before.

        Raises:
            ValueError: A prompt is empty, or too long for the model's positions; or there is an `engine`, which takes
                a folder and no model.
        """
        if self.engine is not None:
            raise ValueError("An `engine` samples from the folder of a model: call its `complete`.")
        parts = decoder_parts(model)
        alone = getattr(parts.model, "_is_stateful", False) or length_turn(parts) is not None
        sampler = replace(self, rows=1) if alone else self
        rows, waiting = sampler.rows, self.keyed(prompts, names)
        while window := list(islice(waiting, sampler.window)):
            keyed = [(ids, key, sample) for ids, key in window for sample in range(self.samples)]
            order = sorted(range(len(keyed)), key=lambda row: -len(keyed[row][0]))  # too long ones fail first
            found: dict[int, Completion] = {}
            for start in range(0, len(order), rows):
                chunk = order[start : start + rows]
                found |= zip(chunk, self._batch(model, tokenizer, [keyed[row] for row in chunk]), strict=True)
            for start in range(0, len(keyed), self.samples):
                yield [found[row] for row in range(start, start + self.samples)]

    @property
    def window(self) -> int:
        """Prompts that are in memory at a time."""
        return max(1, _WINDOW * self.rows // self.samples)

    def keyed(
        self, prompts: Iterable[Sequence[int]], names: Iterable[bytes] | None = None
    ) -> Iterator[tuple[Sequence[int], bytes]]:
        """Each prompt, with what decides the random numbers of its completions besides the number of the sample."""
        seen = Counter[bytes]()
        own = ((ids, array("q", ids).tobytes()) for ids in prompts)
        for ids, name in own if names is None else zip(prompts, names, strict=True):
            yield ids, self._key(name, seen)

    def _key(self, name: bytes, seen: Counter[bytes]) -> bytes:
        prompt = hashlib.sha256(name).digest()
        occurrence, seen[prompt] = seen[prompt], seen[prompt] + 1
        return prompt + array("q", [self.seed, self.round, occurrence]).tobytes()

    def _uniforms(self, key: bytes, sample: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Numbers in [0, 1) for each token of a completion, shape `(max_new_tokens,)`."""
        digest = hashlib.sha256(key + array("q", [sample]).tobytes()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        return np.minimum(generator.random(self.max_new_tokens), _BELOW_ONE)

    @torch.no_grad()
    def _batch(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, keyed: Sequence[tuple[Sequence[int], bytes, int]]
    ) -> list[Completion]:
        with _generating(model, tokenizer) as (generate, ends, device):
            longest = max(len(ids) for ids, _, _ in keyed)
            self.check(model, [ids for ids, _, _ in keyed])
            inputs = torch.tensor([[ends[0] if ends else 0] * (longest - len(ids)) + [*ids] for ids, _, _ in keyed])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _, _ in keyed])
            processors = LogitsProcessorList()
            if self.temperature > 0:
                draws = torch.from_numpy(np.stack([self._uniforms(key, sample) for _, key, sample in keyed]))
                processors.append(_Draw(draws.to(device), longest, self.temperature, self.top_p, self.top_k))
            out = generate(
                input_ids=inputs.to(device),  # (rows, longest)
                attention_mask=mask.to(device),
                logits_processor=processors,
                generation_config=GenerationConfig(
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                ),
                trust_remote_code=trusts_remote_code(),
            )
        found = []
        for row in out[:, longest:].tolist():
            size = next((place for place, token in enumerate(row, 1) if token in ends), None)
            ids = tuple(row[:size])
            found.append(Completion(ids, text_of(tokenizer, ids), size is not None))
        return found

    def check(self, model: nn.Module, prompts: Sequence[Sequence[int]], where: str = "") -> None:
        """Refuse prompts that the model cannot complete.

        Args:
            model: As it is called with.
            prompts: Token ids.
            where: What an error begins with, such as the row.

        Raises:
            ValueError: A prompt is empty, or too long for the model's positions.
        """
        config: Any = decoder_parts(model).model.config
        self.check_ids(prompts, getattr(config.get_text_config(), "max_position_embeddings", None), where)

    def check_ids(self, prompts: Sequence[Sequence[int]], most: int | None, where: str = "") -> None:
        """Refuse prompts that no model of so many positions can complete, or `None` for no limit; see `check`."""
        if not all(prompts):
            raise ValueError(f"{where}A prompt needs at least one token: remove the empty one.")
        longest = max(map(len, prompts), default=0)
        if prompts and most and longest + self.max_new_tokens > most:
            raise ValueError(
                f"{where}A prompt of {longest} tokens and {self.max_new_tokens} new ones exceed the {most} positions "
                "of the model: lower `max_new_tokens`, or shorten the prompt."
            )


class _Draw(LogitsProcessor):
    """Leaves of each row's tokens the one that its random number falls on.

    Args:
        uniforms: In [0, 1), shape `(rows, new tokens)`, float64.
        start: Tokens of the prompts, padding included.
        temperature: Above 0.
        top_p: In (0, 1].
        top_k: At least 1, or `None` for all tokens.
    """

    def __init__(self, uniforms: Tensor, start: int, temperature: float, top_p: float, top_k: int | None) -> None:
        self.uniforms, self.start, self.temperature = uniforms, start, temperature
        self.top_p, self.top_k = top_p, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, shape `(rows, vocabulary)`, with all but the drawn token at minus infinity."""
        probabilities = (scores.double() / self.temperature).softmax(-1)
        if self.top_p < 1 or self.top_k is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            if self.top_k is not None:
                ordered[:, self.top_k :] = 0
                ordered /= ordered.sum(-1, keepdim=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        below = probabilities.cumsum(-1)
        places = self.uniforms[:, input_ids.shape[1] - self.start, None] * below[:, -1:]
        drawn = torch.searchsorted(below, places, right=True)  # a token of probability zero is no step, and never drawn
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


@contextmanager
def _generating(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Any, list[int], torch.device]]:
    """The model's own `generate`, the ids that end a completion, and the device; afterwards the model is as it was.

    Meanwhile it has its own attention, and no settings of generation that came with it, such as a repetition penalty.
    """
    base: Any = decoder_parts(model).model
    own, training = base.generation_config, model.training
    ends = ends_of(tokenizer, own)
    own_attention(model)
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        yield base.generate, ends, base.device
    finally:
        base.generation_config = own
        model.train(training)


def ends_of(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> list[int]:
    """Ids that end a completion: the tokenizer's end, and those of the model."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return list(dict.fromkeys(end for end in [tokenizer.eos_token_id, *ends] if end is not None))


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text, without special tokens; no white space is tidied away, since a model may have meant it."""
    return str(tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a completion's n-grams that stood earlier in it (seq-rep-n); 0 for one of fewer tokens.

    Source: Welleck et al., Neural text generation with unlikelihood training, https://arxiv.org/abs/1908.04319.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1, 1, 1, 1, 1, 1])
    (0.0, 0.6666666666666667)
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
