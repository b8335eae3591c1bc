"""Attention over a flat batch of pairs that share their prompt.

A token sees the earlier tokens of its own pair that are prompt or of its own branch. Written as two ordinary attention
calls a pair: one causal call over `[P C]`, and one of the queries of R over the keys `[P R]`, causal and aligned to
the end. No mask over the whole line exists, no padding is computed, and the prompt is computed once.

On a GPU in half precision the calls of all pairs are one variable-length flash call: its queries are the flat line as
it stands, cut into `[P C] [R]`, and its keys are those of `[P C] [P R]`.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUMERICS = 2  # of the arithmetic below: raised by whoever changes what it rounds to
_DISTRUSTED: set[torch.device] = set()  # devices whose flash kernel has failed its comparison


def pair_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[tuple[int, int, int], ...],
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Exact attention over the flat line `[P C R][P C R]...`.

    Args:
        query: Shape `(1, heads, tokens, head width)`.
        key: Shape `(1, key heads, tokens, head width)`; `heads` is a multiple of `key heads`.
        value: Shape `(1, key heads, tokens, value width)`.
        shape: Tokens of prompt, chosen, rejected of every pair, adding up to `tokens`; 0 rejected ones cost nothing.
        scale: Factor on the scores; `None` means `1 / sqrt(head width)`.
        softcap: With a value `s`, scores become `s * tanh(scores / s)`.
        dropout: Probability of dropping an attention weight.

    Returns:
        Shape `(1, heads, tokens, value width)`.
    """
    kind = query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and query.dtype != torch.float64:  # as PyTorch's own attention does
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    if softcap is None and _flash_serves(query, key, value):
        return _all_pairs_at_once(query, key, value, shape, scale, dropout)
    return _pair_by_pair(query, key, value, shape, scale, dropout, softcap)


def flash_here(device: torch.device) -> bool:
    """Whether half precision on this device goes to the flash kernel, other reasons aside."""
    return (
        device.type == "cuda"
        and device not in _DISTRUSTED
        and torch.version.hip is None  # ROCm's kernel aligns causal attention to the start
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()  # the user's switch
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _flash_serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash kernel takes these tensors and gives what attention is."""
    width = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and flash_here(query.device)
        and _flash_agrees(query.device, query.dtype, query.shape[1], key.shape[1], width)
    )


@lru_cache(maxsize=64)
def _flash_agrees(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Compare one small call of the kernel, and its gradient, with the calls pair by pair; warn if they differ."""
    shape, generator = ((5, 3, 70), (1, 1, 1), (40, 30, 2)), torch.Generator().manual_seed(0)
    tokens = sum(map(sum, shape))
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # from checkpoints
    with apart, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        made = [torch.randn(1, n, tokens, width, generator=generator) for n in (heads, key_heads, key_heads)]
        query, key, value = (tensor.to(device, dtype).requires_grad_() for tensor in made)
        weights = torch.randn(1, heads, tokens, width, generator=generator).to(device, dtype)
        found = []
        try:
            for way in (_all_pairs_at_once, _pair_by_pair):
                out = way(query, key, value, shape, None, 0.0)
                found.append([out.detach(), *torch.autograd.grad((weights * out).sum(), [query, key, value])])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            problem = f"refuses: {error}"
        else:
            gaps = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*found, strict=True)]
            if all(gap < 0.02 for gap in gaps):  # a NaN is not
                return True
            problem = f"differs: by {', '.join(f'{gap:.1%}' for gap in gaps)} in output and gradients"
    _DISTRUSTED.add(device)
    warnings.warn(f"Attention runs pair by pair, as the flash kernel {problem}.", stacklevel=2)
    return False


def _pair_by_pair(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[tuple[int, int, int], ...],
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    """`pair_attention` as two calls a pair."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    # Prompt and chosen lie side by side: views, no copies. (One split each, because the backward pass of a split is one
    # concatenation, where that of every slice would be as long as the whole line.)
    sizes = [size for prompt, chosen, rejected in shape for size in (prompt + chosen, rejected)]
    q, k, v = (torch.split(tensor, sizes, 2) for tensor in (query, key, value))
    out: list[Tensor] = []
    for pair, (prompt, _, rejected) in enumerate(shape):
        first, second = 2 * pair, 2 * pair + 1
        if not rejected:
            out.append(_causal(q[first], k[first], v[first], scale, softcap, dropout))
            continue
        k_r, v_r = (torch.cat([x[first][:, :, :prompt], x[second]], 2) for x in (k, v))
        out.append(_causal(q[first], k[first], v[first], scale, softcap, dropout))
        out.append(_causal(q[second], k_r, v_r, scale, softcap, dropout))
    return torch.cat(out, 2)


def _all_pairs_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[tuple[int, int, int], ...],
    scale: float | None,
    dropout: float,
) -> Tensor:
    """`pair_attention` as one call of variable length, grouped query heads included."""
    calls = _calls(shape, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, width)
    q = q if q.stride(-1) == 1 else q.contiguous()
    # A prompt's key stands in two calls, so its gradient is a sum of two numbers: the same in either order.
    k, v = k.index_select(0, calls.keys), v.index_select(0, calls.keys)
    out = _flash(q, k, v, calls, dropout, scale)
    return out.transpose(0, 1)[None]


def _flash(query: Tensor, key: Tensor, value: Tensor, calls: _Calls, dropout: float, scale: float | None) -> Tensor:
    """PyTorch's flash kernel, causal, aligned to the end; shapes `(tokens, heads, width)`.

    (The operator below `torch.nn.attention.varlen`, whose signature differs between PyTorch 2.11 and 2.13.)
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query=query,
        key=key,
        value=value,
        cum_seq_q=calls.query_ends,
        cum_seq_k=calls.key_ends,
        max_q=calls.longest_query,
        max_k=calls.longest_key,
        dropout_p=dropout,
        is_causal=True,
        return_debug_mask=False,
        scale=scale,
    )[0]
    return out


class _Calls(NamedTuple):
    """The two calls of every pair, [P C] and then R over [P R], as one of variable length.

    Args:
        keys: Places in the flat line of all calls' keys, shape `(keys,)`.
        query_ends: Where each call's queries end, a zero before them, shape `(2 * pairs + 1,)`, int32.
        key_ends: The same of its keys.
        longest_query: Most queries of a call.
        longest_key: Most keys of a call.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=2)  # every layer of a batch asks for the same
def _calls(shape: tuple[tuple[int, int, int], ...], device: torch.device) -> _Calls:
    lengths = torch.tensor(shape)
    prompt, chosen, rejected = lengths.unbind(1)
    starts = lengths.sum(1).cumsum(0) - lengths.sum(1)
    queries = torch.stack([prompt + chosen, rejected], 1).flatten()
    keys = torch.stack([prompt + chosen, prompt + rejected], 1).flatten()[queries > 0]
    queries = queries[queries > 0]
    places = []
    for start, (p, c, r) in zip(starts.tolist(), shape, strict=True):
        places += [*range(start, start + p + c), *(range(start, start + p) if r else ())]
        places += range(start + p + c, start + p + c + r)
    with torch.inference_mode(False):  # what validation makes must serve training too
        ends = [F.pad(sizes.cumsum(0), (1, 0)).int() for sizes in (queries, keys)]
        tensors = [tensor.to(device, non_blocking=True) for tensor in (torch.tensor(places), *ends)]
    return _Calls(tensors[0], tensors[1], tensors[2], int(queries.max()), int(keys.max()))


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
