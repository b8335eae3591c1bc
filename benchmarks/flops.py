"""Counted work: model shapes, and the floating-point operations of a pass over some pairs.

The derivation of each factor stands in benchmarks/README.md; a hand count in tests/test_benchmarks.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Lengths = tuple[int, int, int]
"""Tokens of prompt, chosen, rejected."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder that decide its cost.

    Args:
        hidden: Width of the residual stream.
        intermediate: Width of the gated feed-forward layer.
        layers: Decoder blocks.
        heads: Query heads; ``head_width`` is ``hidden / heads``.
        kv_heads: Key and value heads.
        vocab: Rows of the output head.
        tied: Whether head and embedding share their weight.
        model_type: Of the transformers configuration.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    model_type: str = "llama"

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the seven linear layers of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        h, m = self.hidden, self.intermediate
        return [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]

    @property
    def body_params(self) -> int:
        """Weights of all blocks that take part in a matrix product once a token."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head_params(self) -> int:
        """Weights of the output head."""
        return self.vocab * self.hidden

    def adapter_params(self, rank: int) -> int:
        """Weights of LoRA adapters on every linear layer of every block."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)

    def description(self, positions: int = 4096) -> dict[str, Any]:
        """The model as `PreferenceModule(model=...)` and `AutoConfig.for_model` take it."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": positions,
        }


SHAPES = {
    "M": ModelShape(768, 2048, 12, 12, 12, 50304),
    "S": ModelShape(256, 688, 6, 4, 4, 8192),
    "tiny": ModelShape(64, 128, 2, 4, 4, 1024),
    "llama-3.2-1b": ModelShape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "qwen2.5-1.5b": ModelShape(1536, 8960, 28, 12, 2, 151936, tied=True, model_type="qwen2"),
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 32, 8, 128256),
}


class Work(NamedTuple):
    """What a pass over some pairs touches: tokens in the blocks, tokens at the head, (query, key) pairs."""

    body_tokens: int
    head_tokens: int
    attended: int

    @classmethod
    def flat(cls, pairs: Sequence[Lengths]) -> Work:
        """Each prompt once, no padding, the head at completion tokens only."""
        attended = sum(_triangle(p + c) + r * p + _triangle(r) for p, c, r in pairs)
        return cls(sum(map(sum, pairs)), sum(c + r for _, c, r in pairs), attended)

    @classmethod
    def padded(cls, pairs: Sequence[Lengths], head_everywhere: bool = False) -> Work:
        """One batch as two right-padded rows a pair; attention counted causal over whole rows."""
        longest, rows = max(p + max(c, r) for p, c, r in pairs), 2 * len(pairs)
        head = rows * longest if head_everywhere else sum(c + r for _, c, r in pairs)
        return cls(rows * longest, head, rows * _triangle(longest))


class Pass(NamedTuple):
    """Floating-point operations: a body or head weight and token, an attended pair and unit of width, an adapter's."""

    body: int
    head: int
    attention: int
    adapter: int = 0


FORWARD = Pass(2, 2, 4)
TRAIN = Pass(6, 6, 12)  # backward costs twice the forward pass
TRAIN_TILED = Pass(6, 8, 12)  # as executed: the head's tiles are computed again in the backward pass
TRAIN_CHECKPOINTED = Pass(8, 8, 16)  # as executed: every forward product runs twice
TRAIN_LORA = Pass(4, 4, 12, 6)  # frozen weights get no gradient


def flops(shape: ModelShape, work: Work, cost: Pass = TRAIN, rank: int = 0) -> int:
    """Counted floating-point operations of a pass, a multiplication and an addition being two."""
    products = cost.body * shape.body_params * work.body_tokens + cost.head * shape.head_params * work.head_tokens
    attention = cost.attention * shape.hidden * shape.layers * work.attended
    return products + attention + cost.adapter * shape.adapter_params(rank) * work.body_tokens


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def resized(shape: ModelShape, sizes: Mapping[str, int | None]) -> ModelShape:
    """The shape with the given sizes in place of its own; key heads follow the heads if only those are given."""
    given = {name: size for name, size in sizes.items() if size is not None}
    if "heads" in given:
        given.setdefault("kv_heads", given["heads"])
    return replace(shape, **given)
