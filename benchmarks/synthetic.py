"""Made-up material for a GPU benchmark: models of random weights, and pairs of random tokens with real lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from flops import SHAPES, Lengths

from lit_dpo import PairBatch

# Mean tokens of prompt, chosen, rejected; spread of their logarithms; longest sequence. The spreads give random batches
# of 8 pairs padding of 1.55 and about 2 times, near that of the data sets they are named after.
LENGTHS: dict[str, tuple[Lengths, float, int]] = {
    "ultrafeedback": ((170, 300, 300), 0.36, 1024),
    "hh": ((114, 39, 48), 0.8, 512),
}


def draw_lengths(name: str, pairs: int, seed: int, divide: int = 1) -> list[Lengths]:
    """Lengths of pairs, log-normal around the means of a data set, cut to its longest sequence."""
    means, sigma, longest = LENGTHS[name]
    draw = random.Random(seed)

    def one(mean: float, limit: int) -> int:
        return min(max(1, round(mean / divide * draw.lognormvariate(-(sigma**2) / 2, sigma))), limit)

    prompts = [one(means[0], longest // divide // 2) for _ in range(pairs)]
    return [(p, *(one(mean, longest // divide - p) for mean in means[1:])) for p in prompts]  # type: ignore[misc]


def random_batches(lengths: Sequence[Lengths], size: int, vocab: int, seed: int) -> list[Any]:
    """Pairs of random tokens, `size` to a batch."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [tuple(torch.randint(vocab, (n,), generator=generator).tolist() for n in pair) for pair in lengths]
    return [PairBatch.from_lists(pairs[i : i + size]) for i in range(0, len(pairs), size)]  # type: ignore[arg-type]


def build(shape_name: str, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights, made where it will stay."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape_name].description())
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype).train()
