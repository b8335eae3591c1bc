"""Pairs without their rejected completions, for a loss that never looks at these."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_dpo.pairs import PairBatch


def chosen_alone(batch: PairBatch) -> PairBatch:
    """The same prompts and chosen completions; of the rejected ones no token is left, and none is computed.

    >>> chosen_alone(PairBatch.from_lists([([1, 2], [3, 4], [5]), ([6], [7], [8, 9])])).input_ids.tolist()
    [1, 2, 3, 4, 6, 7]
    """
    sizes = torch.tensor(batch.shape)  # on the host, which need not wait for the device
    wanted = torch.tensor([True, True, False]).repeat(len(batch)).repeat_interleave(sizes.flatten())
    kept = wanted.nonzero()[:, 0].to(batch.input_ids.device, non_blocking=True)
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tokens: dict[str, Any] = {
        name: value.index_select(0, kept)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.shape == batch.input_ids.shape
    }
    lengths = torch.cat([batch.lengths[:, :2], torch.zeros_like(batch.lengths[:, 2:])], 1)
    shape, scored_shape = (tuple((p, c, 0) for p, c, _ in batch.shape), tuple((c, 0) for c, _ in batch.scored_shape))
    return replace(batch, **tokens, lengths=lengths, shape=shape, scored_shape=scored_shape)
