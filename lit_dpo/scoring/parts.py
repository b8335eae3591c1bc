"""A batch computed in parts: memory for so many tokens, however long the pairs of a batch happen to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.scoring.score import Layout, score


def score_in_parts(
    model: nn.Module,
    batch: PairBatch,
    layers: Sequence[int | float] = (),
    *,
    detach_head: bool = False,
    layout: Layout = "auto",
    max_tokens: int,
) -> PairLogps:
    """`score` with the activations of at most `max_tokens` tokens alive at a time.

    A batch of more is scored part by part. Only the last part, whose backward pass comes first, keeps its activations;
    those of the others are computed again when their turn comes. Log-probs and gradients are those of `score`, and a
    batch within the budget costs what it costs there.

    The gradient of a weight is complete only when all parts are done, so that it stands beside what
    `accumulate_grad_batches` has gathered before.

    Args:
        model: As for `score`; not sharded, since a shard is gathered once a forward pass.
        batch: As for `score`.
        layers: As for `score`.
        detach_head: As for `score`.
        layout: As for `score`.
        max_tokens: Of a part, counted on the flat line; at least 1. A pair of more is a part of its own.

    Returns:
        As `score`.
    """
    run = partial(score, model, layers=layers, detach_head=detach_head, layout=layout)
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
