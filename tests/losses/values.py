"""Log-probs for the tests of the losses."""

import math

import torch
from hypothesis import strategies as st

from lit_dpo import PairLogps

# Multiples of 1/1024: sums and differences of a few of them are exact in float64.
nats = st.integers(-(2**20), 2**20).map(lambda n: n / 1024)


def logps(chosen, rejected, chosen_tokens=1, rejected_tokens=1, layers=None, dtype=torch.float64):
    """`PairLogps` from numbers or lists."""
    chosen, rejected = (torch.tensor(x, dtype=dtype).view(-1) for x in (chosen, rejected))
    counts = (torch.tensor(n).expand(len(chosen)).clone() for n in (chosen_tokens, rejected_tokens))
    return PairLogps(chosen, rejected, *counts, layers or {})


def random_logps(seed, batch=5, layers=(1, 2), dtype=torch.float64):
    """Random `PairLogps`, the token counts the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.arange(2 * batch).view(2, batch) % 7 + 1

    def made(layers):
        return PairLogps(*(20 * torch.randn(2, batch, generator=generator, dtype=dtype)), *counts, layers)

    return made({layer: made({}) for layer in layers})


def neg_log_sigmoid(x):
    """``-log(1 / (1 + exp(-x)))`` of a Python number, without overflow."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))
