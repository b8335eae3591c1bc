"""A batch computed in parts: memory for so many tokens, however long the pairs of a batch happen to be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from lit_dpo.pairs import PairBatch, PairLogps


def in_parts(run: Callable[[PairBatch], PairLogps], batch: PairBatch, max_tokens: int) -> PairLogps:
    """Score a batch with the activations of at most `max_tokens` tokens alive at a time; see `Scorer`.

    Args:
        run: Scores a batch, or a part of one.
        batch: The whole.
        max_tokens: Tokens of a part, counted on the flat line; at least 1. A pair of more is a part of its own.
    """
    parts = batch.split(max_tokens)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return PairLogps.cat([run(part) for part in parts])
    kind = batch.input_ids.device.type
    mixed, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # Without autocast's cache each part casts the weights for itself, and the parts' gradients add up in float32.
    with torch.autocast(kind, dtype, enabled=mixed, cache_enabled=False):
        again = [_checkpointed(run, part) for part in parts[:-1]]
        return PairLogps.cat([*again, run(parts[-1])])


def _checkpointed(run: Callable[[PairBatch], PairLogps], part: PairBatch) -> PairLogps:
    """`torch.utils.checkpoint`, which needs a tensor among its arguments to know whose random state to keep."""
    logps: PairLogps = checkpoint(lambda tokens, batch: run(batch), part.input_ids, part, use_reentrant=False)
    return logps
