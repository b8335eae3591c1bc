"""Log-probs for the tests of the losses."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import strategies as st

import lit_dpo
from lit_dpo import PairLogps

# Multiples of 1/1024: sums and differences of a few of them are exact in float64.
nats = st.integers(-(2**20), 2**20).map(lambda n: n / 1024)


def logps(chosen, rejected, chosen_tokens=1, rejected_tokens=1, layers=None, dtype=torch.float64):
    """`PairLogps` from numbers or lists."""
    chosen, rejected = (torch.tensor(x, dtype=dtype).view(-1) for x in (chosen, rejected))
    counts = (torch.tensor(n).expand(len(chosen)).clone() for n in (chosen_tokens, rejected_tokens))
    return PairLogps(chosen, rejected, *counts, layers or {})


def token_logps(pairs, layers=None, columns=None, dtype=torch.float64):
    """`PairLogps` from the log-probs of single tokens, lists of numbers ``(chosen, rejected)``, one a pair."""
    tokens = torch.tensor([value for pair in pairs for side in pair for value in side], dtype=dtype)
    counts = torch.tensor([[len(side) for side in pair] for pair in pairs]).T  # (2, batch)
    empty = torch.zeros(len(pairs), dtype=dtype)
    return with_tokens(PairLogps(empty, empty, *counts, layers or {}, None, columns or {}), tokens)


def with_tokens(values, tokens):
    """The same pairs with other log-probs of single tokens, and with their sums."""
    counts = zip(values.chosen_tokens.tolist(), values.rejected_tokens.tolist(), strict=True)
    sizes = [n for pair in counts for n in pair]
    sums = torch.stack([part.sum() for part in tokens.split(sizes)])
    return replace(values, chosen=sums[0::2], rejected=sums[1::2], tokens=tokens)


def random_logps(seed, batch=5, layers=(1, 2), dtype=torch.float64):
    """Random `PairLogps`, the token counts and the columns the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.arange(2 * batch).view(2, batch) % 7 + 1
    columns = {"score_chosen": torch.arange(batch) * 0.75 + 2, "score_rejected": torch.arange(batch) * 0.5 + 1.25}

    def made(layers, columns):
        sizes = counts.T.flatten()
        spread = (20 / sizes.sqrt()).repeat_interleave(sizes).to(dtype)  # so that sums spread by some 20
        tokens = -(spread * torch.randn(len(spread), generator=generator, dtype=dtype)).abs()
        empty = torch.zeros(batch, dtype=dtype)
        return with_tokens(PairLogps(empty, empty, *counts, layers, None, columns), tokens)

    return made({layer: made({}, {}) for layer in layers}, columns)


def neg_log_sigmoid(x):
    """``-log(1 / (1 + exp(-x)))`` of a Python number, without overflow."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    """``1 / (1 + exp(-x))`` of a Python number, without overflow."""
    return math.exp(-neg_log_sigmoid(x))


def numbers(policy, reference):
    """Each pair as Python numbers: log-ratios, policy log-probs and tokens of chosen and rejected."""
    rows = []
    for i in range(len(policy.chosen)):
        p_w, p_l = float(policy.chosen[i]), float(policy.rejected[i])
        q_w, q_l = float(reference.chosen[i]), float(reference.rejected[i])
        rows.append((p_w - q_w, p_l - q_l, p_w, p_l, int(policy.chosen_tokens[i]), int(policy.rejected_tokens[i])))
    return rows


def of_config(stem):
    """The loss that a shipped config describes, built without the command line."""

    def built(node):
        if isinstance(node, list):
            return [built(child) for child in node]
        if not isinstance(node, dict):
            return node
        options = {name: built(child) for name, child in node.get("init_args", {}).items()}
        return getattr(lit_dpo, node["class_path"].removeprefix("lit_dpo."))(**options)

    text = (Path(__file__).parents[2] / "configs" / f"{stem}.yaml").read_text(encoding="utf-8")
    return built(yaml.safe_load(text)["model"]["loss"])


def close(expected):
    """Equal to 1e-12, relative or absolute."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def at(r_w, r_l, **options):
    """One pair with these log-ratios, its reference at -40 nats over 20 and -50 over 30 tokens."""
    return logps(-40.0 + r_w, -50.0 + r_l, 20, 30, **options), logps(-40.0, -50.0, 20, 30)


def gradient(loss, policy, reference):
    """Derivatives of the loss of one pair by the policy's two log-probs, as numbers."""
    inputs = [policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_()]
    value = loss(replace(policy, chosen=inputs[0], rejected=inputs[1]), reference).sum()
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    return [0.0 if grad is None else grad.item() for grad in grads]
