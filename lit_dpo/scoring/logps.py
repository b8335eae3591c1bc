"""Log-probs of target tokens from hidden states, without the [tokens, vocabulary] matrix.

The output head of a language model is by far its widest layer: 2,000 completion tokens times a vocabulary of 128,000
are one gigabyte of float32 logits, several times that with their gradient. Only one number a token is needed. The head
is therefore applied tile by tile with a running log-sum-exp; the backward pass recomputes each tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKEN_TILE = 1024
VOCAB_TILE = 4096


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target under `softmax(cap(scale * (hidden @ weight.T + bias)))`, in nats.

    Products run in the dtype of `hidden` (or of autocast), everything after them in float32, or float64 for float64
    input. Gradients flow to `hidden`, `weight` and `bias` and are exact.

    Args:
        hidden: Final hidden states at the predicting positions, shape `(tokens, width)`.
        weight: Weight of the output head, shape `(vocabulary, width)`.
        targets: Token ids to score, shape `(tokens,)`, int64.
        bias: Bias of the output head, shape `(vocabulary,)`.
        scale: Factor on the logits.
        softcap: With a value `s`, logits become `s * tanh(logits / s)`.

    Returns:
        Shape `(tokens,)`, float32 or float64.

    >>> token_logps(torch.zeros(2, 3), torch.randn(4, 3), torch.tensor([0, 3])).tolist()  # -log(4), twice
    [-1.3862943649291992, -1.3862943649291992]
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        logps: Tensor = _TiledHead.apply(hidden, weight, targets, bias, scale, softcap)  # type: ignore[no-untyped-call]
    return logps


def sum_by_completion(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums over runs of consecutive tokens.

    Args:
        logps: One value a token, shape `(tokens,)`.
        lengths: Length of each run, shape `(runs,)`, adding up to `tokens`.

    Returns:
        Shape `(runs,)`. The order of summation is fixed, so equal input gives equal bits on every device.
    """
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True)


class _Tiles:
    """The head's logits, one [token tile, vocabulary tile] at a time, all in the same memory.

    Fresh memory for every tile would cost a CPU more time in page faults than in some of the arithmetic.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
    ) -> None:
        self.hidden, self.weight, self.bias, self.scale, self.softcap = hidden, weight, bias, scale, softcap
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        size = min(TOKEN_TILE, len(hidden)) * min(VOCAB_TILE, len(weight))
        self._product = hidden.new_empty(size)
        self._logits = self._product if hidden.dtype == self.wide else self._product.to(self.wide)

    def weight_tile(self, vocab: slice) -> Tensor:
        return self.weight[vocab].to(self.hidden.dtype)  # (vocabulary tile, width)

    def logits(self, tokens: slice, vocab: slice, weight: Tensor) -> Tensor:
        """Logits of one tile, which the caller may overwrite; the next call does."""
        rows, columns = tokens.stop - tokens.start, vocab.stop - vocab.start
        product, raw = (memory[: rows * columns].view(rows, columns) for memory in (self._product, self._logits))
        torch.mm(self.hidden[tokens], weight.T, out=product)
        if raw.dtype != product.dtype:
            raw.copy_(product)
        if self.bias is not None:
            raw += self.bias[vocab]
        if self.scale != 1.0:
            raw *= self.scale
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward_through_cap(self, grad: Tensor, slope: Tensor | None) -> Tensor:
        """Turn d/d(capped, scaled logits) into d/d(hidden @ weight.T + bias), in place."""
        if slope is not None:
            grad *= slope
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def _slices(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _add_product(into: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """`into += left @ right`, or `into = left @ right` the first time; the sum has the dtype of `into`."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, beta=0 if first else 1)
    elif first:
        into.copy_(left @ right)
    else:
        into += left @ right


class _TiledHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        tiles = _Tiles(hidden, weight, bias, scale, softcap)
        logsumexp = hidden.new_full((len(hidden),), -torch.inf, dtype=tiles.wide)  # (tokens,)
        target_logit = torch.zeros_like(logsumexp)
        for vocab in _slices(len(weight), VOCAB_TILE):
            weight_tile = tiles.weight_tile(vocab)
            for tokens in _slices(len(hidden), TOKEN_TILE):
                logits = tiles.logits(tokens, vocab, weight_tile)
                place, inside = _place(targets[tokens], vocab)
                target_logit[tokens] += torch.where(inside, logits.gather(1, place)[:, 0], 0.0)
                highest = logits.amax(1, keepdim=True)
                sums = logits.sub_(highest).exp_().sum(1)
                logsumexp[tokens] = torch.logaddexp(logsumexp[tokens], highest[:, 0] + sums.log_())
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp)
        ctx.scale, ctx.softcap = scale, softcap
        return target_logit - logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, logsumexp = ctx.saved_tensors
        grad = grads[0]
        tiles = _Tiles(hidden, weight, bias, ctx.scale, ctx.softcap)
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        d_hidden = torch.zeros_like(hidden, dtype=tiles.wide) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=tiles.wide) if needs_bias else None
        in_place = weight.dtype == tiles.wide  # else token tiles add up in the wider dtype first
        for vocab in _slices(len(weight), VOCAB_TILE):
            weight_tile = tiles.weight_tile(vocab)
            if d_weight is not None:
                sum_of_tiles = d_weight[vocab] if in_place else torch.empty_like(d_weight[vocab], dtype=tiles.wide)
            for tokens in _slices(len(hidden), TOKEN_TILE):
                logits = tiles.logits(tokens, vocab, weight_tile)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
                d_logits = logits.sub_(logsumexp[tokens, None]).exp_().mul_(-grad[tokens, None])  # -softmax * grad
                place, inside = _place(targets[tokens], vocab)
                d_logits.scatter_add_(1, place, torch.where(inside, grad[tokens], 0.0)[:, None])
                d_logits = tiles.backward_through_cap(d_logits, slope)
                if d_bias is not None:
                    d_bias[vocab] += d_logits.sum(0)
                d_product = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[tokens], d_product, weight_tile)
                if d_weight is not None:
                    _add_product(sum_of_tiles, d_product.T, hidden[tokens], first=tokens.start == 0)
            if d_weight is not None and not in_place:
                d_weight[vocab] = sum_of_tiles
        if d_weight is not None and not len(hidden):
            d_weight.zero_()
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _place(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a vocabulary tile, shape (tokens, 1), and whether it lies inside, shape (tokens,)."""
    column = targets - vocab.start
    size = vocab.stop - vocab.start
    return column.clamp(0, size - 1)[:, None], (column >= 0) & (column < size)
