"""From a batch of pairs and a causal language model to log-probs.

Knows how transformers' decoders are put together: the attention interface that the flat line plugs into, the decoder
blocks, the final norm, the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.scoring.attention import pair_attention
from lit_dpo.scoring.decoder import DecoderParts, decoder_parts
from lit_dpo.scoring.fabric import in_fabric, is_fabrics
from lit_dpo.scoring.inputs import PAIR_ATTENTION, flat_inputs, forget_lengths, one_by_one, padded_inputs, use_attention
from lit_dpo.scoring.logps import sum_by_completion, token_logps
from lit_dpo.scoring.parts import in_parts

BatchForm = Literal["auto", "flat", "padded"]
"""How a batch reaches the model: one padding-free line with each prompt once, or padded rows. `auto` picks."""

SHARDED_METHOD = "completion_logps"


@dataclass(frozen=True)
class Scorer:
    """How a batch of pairs is scored; `scorer(model, batch)` scores it.

    The decoder runs once over the batch. Only completion tokens reach the output head, tile by tile, so nothing of
    size (tokens, vocabulary) is ever alive. Gradients are exact.

    With `max_tokens` a batch of more tokens is scored part by part. Only the last part, whose backward pass comes
    first, keeps its activations; those of the others are computed again when their turn comes. Log-probs and gradients
    are the same, and a batch within the budget costs what it costs without one. The gradient of a weight is complete
    only when all parts are done, so that it stands beside what `accumulate_grad_batches` has gathered before.

    Args:
        layers: 1-based numbers of decoder blocks to score besides the last: their output goes through the model's
            own final norm and head.
        detach_head: Keep the gradient of `layers` out of final norm and head.
        form: `flat` shares prompts and computes no padding; `padded` serves every causal language model;
            `auto` takes the flat line wherever `flat_obstacle` finds nothing against it.
        max_tokens: Tokens of the flat line to compute at once, at least 1; a pair of more is a part of its own.
            `None` computes the whole batch at once. Not for sharded models, whose shards are gathered once a forward
            pass.
        per_token: Keep the log-prob of every completion token, in `PairLogps.tokens`, at every layer asked for.

    Raises:
        ValueError: An option is out of its range.
    """

    layers: tuple[int | float, ...] = ()
    detach_head: bool = False
    form: BatchForm = "auto"
    max_tokens: int | None = None
    per_token: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.form not in get_args(BatchForm):
            raise ValueError(f"`form` must be one of {', '.join(get_args(BatchForm))}, got {self.form!r}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {self.max_tokens}.")

    def __call__(self, model: nn.Module, batch: PairBatch) -> PairLogps:
        """Log-probs of both completions of every pair under a transformers causal language model.

        Args:
            model: A transformers causal language model, alone or in the wrapper of peft or Lightning Fabric.
            batch: B pairs on the model's device.

        Returns:
            Sums over completion tokens, shape `(batch,)` each, float32 (float64 for a float64 model).

        Raises:
            ValueError: The flat form was asked for and cannot serve this model or batch, or a layer does not exist.
        """
        if is_fabrics(model):
            return in_fabric(model, self, batch)
        if self.max_tokens is None:
            return self._whole(model, batch)
        return in_parts(partial(self._whole, model), batch, self.max_tokens)

    def _whole(self, model: nn.Module, batch: PairBatch) -> PairLogps:
        form = self.form
        if form == "auto":
            form = "padded" if flat_obstacle(model, batch) else "flat"
        elif form == "flat" and (why := flat_obstacle(model, batch)):
            raise ValueError(f"The flat form cannot serve this model: {why}. Use `form: padded` or `auto`.")
        # A sharded model gathers its weights only around calls of its own methods (see `lit_dpo.strategies`).
        run = getattr(model, SHARDED_METHOD, partial(completion_logps, model))
        last, *between = (self._summed(tokens, batch) for tokens in run(batch, replace(self, form=form)))
        return replace(last, layers={int(layer): logps for layer, logps in zip(self.layers, between, strict=True)})

    def _summed(self, tokens: Tensor, batch: PairBatch) -> PairLogps:
        sums = sum_by_completion(tokens, batch.completion_lengths)  # (2B,)
        counts = batch.completion_lengths
        kept = tokens if self.per_token else None
        return PairLogps(sums[0::2], sums[1::2], counts[0::2], counts[1::2], tokens=kept)


def score(
    model: nn.Module,
    batch: PairBatch,
    layers: Sequence[int | float] = (),
    *,
    detach_head: bool = False,
    form: BatchForm = "auto",
    max_tokens: int | None = None,
    per_token: bool = False,
) -> PairLogps:
    """Log-probs of both completions of every pair: the short form of `Scorer`, which explains the options.

    Args:
        model: A transformers causal language model, alone or in the wrapper of peft or Lightning Fabric.
        batch: B pairs on the model's device.
        layers: This and the following are those of `Scorer`.
        detach_head: See `Scorer`.
        form: See `Scorer`.
        max_tokens: See `Scorer`.
        per_token: See `Scorer`.

    Returns:
        Sums over completion tokens, shape `(batch,)` each, float32 (float64 for a float64 model).
    """
    return Scorer(tuple(layers), detach_head, form, max_tokens, per_token)(model, batch)


def completion_logps(model: nn.Module, batch: PairBatch, scorer: Scorer) -> tuple[Tensor, ...]:
    """The part of scoring that touches weights: log-probs of all completion tokens, one `(tokens,)` a layer."""
    parts, layers = decoder_parts(model), scorer.layers
    detach_head = scorer.detach_head and torch.is_grad_enabled()  # without a graph there is nothing to keep out
    columns: list[list[Tensor]] = [[] for _ in (None, *layers)]  # states of the last layer, then of `layers`
    for inputs, sources in _calls(parts, batch, scorer.form):
        with _captured(parts, layers) as between:
            last = parts.decoder(**inputs, use_cache=False).last_hidden_state
        for column, state in zip(columns, (last, *(between[int(layer)] for layer in layers)), strict=True):
            column.append(state.flatten(0, 1)[sources])
    states = [column[0] if len(column) == 1 else torch.cat(column) for column in columns]  # (completion tokens, width)
    norm = parts.norm
    if layers:
        assert norm is not None  # `_captured` has checked
        states[1:] = [_frozen(norm, state) if detach_head else norm(state) for state in states[1:]]
    return tuple(_head_logps(parts, states, batch.targets, detach_head))


def flat_obstacle(model: nn.Module, batch: PairBatch | None = None) -> str | None:
    """Why the flat form cannot serve this model, or this batch on it; `None` if it can."""
    parts = decoder_parts(model)
    base = parts.model
    if getattr(base, "_is_stateful", False):
        return f"{type(base).__name__} carries a state from token to token instead of attending"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} does not use transformers' attention interface"
    config = base.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    window = min((size for size in windows if size), default=None)
    if batch is not None and window is not None and batch.longest > window:
        return f"a sequence of {batch.longest} tokens is longer than the model's attention window of {window}"
    floor = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    if batch is not None and floor and len(batch.input_ids) >= floor:
        return f"from place {floor} of the line on, the model would change its attention's temperature"
    turn = length_turn(parts)
    if batch is not None and turn is not None and batch.longest > turn:
        return f"beyond {turn} tokens the model's rotary positions depend on the length"
    return None


def length_turn(parts: DecoderParts) -> int | None:
    """Tokens beyond which a model's rotary positions depend on the sequence's length; `None` if they never do."""
    config = parts.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    turns = []
    for options in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # some have one a layer type
        kind = str(options.get("rope_type"))
        if "dynamic" in kind:
            turns.append(int(config.max_position_embeddings))
        elif kind == "longrope":
            turns.append(int(options.get("original_max_position_embeddings") or config.max_position_embeddings))
    return min(turns, default=None)


def own_attention(model: nn.Module) -> None:
    """Give the model back the attention implementation it was loaded with, for generation or export."""
    use_attention(decoder_parts(model).model, None)


def _calls(parts: DecoderParts, batch: PairBatch, form: BatchForm) -> Iterable[tuple[dict[str, Any], Tensor]]:
    """Arguments of each call of the decoder, and which of its states predict targets; mostly one call."""
    turn = length_turn(parts)
    if turn is None:
        return [flat_inputs(parts, batch) if form == "flat" else padded_inputs(parts, batch)]
    if batch.longest > turn:
        return one_by_one(parts, batch)
    forget_lengths(parts)
    return [flat_inputs(parts, batch) if form == "flat" else padded_inputs(parts, batch)]


@contextmanager
def _captured(parts: DecoderParts, layers: Sequence[int | float]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of decoder blocks, by 1-based number, while the context is open."""
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[number] = state = output if isinstance(output, Tensor) else output[0]
            if state.dim() != 3:
                raise ValueError(
                    f"The blocks of {type(parts.model).__name__} put out {state.dim()}-dimensional states, which its "
                    "final norm does not take: score its last layer only."
                )

        return hook

    if layers and parts.norm is None:
        raise ValueError(
            f"{type(parts.model).__name__} has no final norm under a known name: score its last layer only."
        )
    for layer in layers:
        if not 1 <= layer <= len(parts.blocks) or layer != int(layer):
            raise ValueError(f"There is no block {layer}: the decoder has {len(parts.blocks)} blocks, counted from 1.")
    handles = [parts.blocks[int(layer) - 1].register_forward_hook(keep(int(layer))) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _frozen(module: nn.Module, state: Tensor) -> Tensor:
    """Apply a module with its parameters cut off from the graph."""
    result: Tensor = functional_call(module, {k: v.detach() for k, v in module.named_parameters()}, (state,))
    return result


def _head_logps(parts: DecoderParts, states: list[Tensor], targets: Tensor, detach_head: bool) -> list[Tensor]:
    """Log-probs of the targets from each layer's states, one (completion tokens,) tensor a layer."""
    config = parts.model.config.get_text_config()
    weight, bias = parts.head.weight, parts.head.bias
    scale = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
    softcap = getattr(config, "final_logit_softcapping", None)

    def logps(group: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        if not group:
            return []
        values = token_logps(torch.cat(group), weight, targets.repeat(len(group)), bias, scale, softcap)
        return list(values.chunk(len(group)))

    if not detach_head:
        return logps(states, weight, bias)
    detached = None if bias is None else bias.detach()
    return logps(states[:1], weight, bias) + logps(states[1:], weight.detach(), detached)


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pair_shape: tuple[tuple[int, int, int], ...] | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the flat line under transformers' signature; other calls go to the usual one."""
    if pair_shape is None and softcap is not None:
        raise RuntimeError(
            "This model caps its attention scores: call `own_attention(model)` of `lit_dpo.scoring.score`."
        )
    if pair_shape is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    extra = [name for name, v in kwargs.items() if isinstance(v, Tensor) and name != "position_ids"]
    if extra or kwargs.get("is_causal") is False:
        raise NotImplementedError(f"its attention uses {', '.join(extra) or 'a non-causal mask'}")
    out = pair_attention(query, key, value, pair_shape, scaling, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None  # (1, tokens, heads, width)


AttentionInterface.register(PAIR_ATTENTION, flat_attention)
AttentionMaskInterface.register(PAIR_ATTENTION, sdpa_mask)
