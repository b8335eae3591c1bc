"""Attention over a flat batch of pairs that share their prompt.

A token sees the earlier tokens of its own pair that are prompt or of its own branch. Written as two ordinary attention
calls a pair: one causal call over ``[P C]``, and one of the queries of R over the keys ``[P R]``, causal and aligned to
the end. No mask over the whole line exists, no padding is computed, and the prompt is computed once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[tuple[int, int, int], ...],
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Exact attention over the flat line ``[P C R][P C R]...``.

    Args:
        query: Shape ``(1, heads, tokens, head width)``.
        key: Shape ``(1, key heads, tokens, head width)``; ``heads`` is a multiple of ``key heads``.
        value: Shape ``(1, key heads, tokens, value width)``.
        shape: Tokens of prompt, chosen, rejected of every pair, adding up to ``tokens``.
        scale: Factor on the scores; ``None`` means ``1 / sqrt(head width)``.
        softcap: With a value ``s``, scores become ``s * tanh(scores / s)``.
        dropout: Probability of dropping an attention weight.

    Returns:
        Shape ``(1, heads, tokens, value width)``.
    """
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    # Prompt and chosen lie side by side: views, no copies. (One split each, because the backward pass of a split is one
    # concatenation, where that of every slice would be as long as the whole line.)
    sizes = [size for prompt, chosen, rejected in shape for size in (prompt + chosen, rejected)]
    q, k, v = (torch.split(tensor, sizes, 2) for tensor in (query, key, value))
    out: list[Tensor] = []
    for pair, (prompt, _, _) in enumerate(shape):
        first, second = 2 * pair, 2 * pair + 1
        k_r, v_r = (torch.cat([x[first][:, :, :prompt], x[second]], 2) for x in (k, v))
        out.append(_causal(q[first], k[first], v[first], scale, softcap, dropout))
        out.append(_causal(q[second], k_r, v_r, scale, softcap, dropout))
    return torch.cat(out, 2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None, dropout: float
) -> Tensor:
    """Causal attention in which the last query stands at the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if softcap is None and queries == keys:
        return F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scale)
    mask = _hidden(queries, keys, query.dtype, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh() + mask
    weights = scores.softmax(-1, torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


@lru_cache(maxsize=64)  # every layer of a batch asks for the same few
def _hidden(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity where a query must not look, zero elsewhere, shape (queries, keys)."""
    with torch.inference_mode(False):  # what validation makes must serve training too
        return torch.full((queries, keys), -torch.inf, dtype=dtype, device=device).triu(keys - queries + 1)
