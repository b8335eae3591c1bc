"""How a batch of pairs goes into a decoder: on the flat line, as padded rows, or one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_dpo.pairs import PairBatch
from lit_dpo.scoring.decoder import DecoderParts

PAIR_ATTENTION = "lit_dpo_pairs"  # the name of the flat line's attention in transformers


def one_by_one(parts: DecoderParts, batch: PairBatch) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each of the 2B sequences alone, so that its positions follow from its own length."""
    use_attention(parts.model, None)
    ids, _, sources = padded(batch)
    counts = [count for pair in batch.scored_shape for count in pair]
    totals = [prompt + size for prompt, *branches in batch.shape for size in branches]
    for row, (places, total) in enumerate(zip(sources.split(counts), totals, strict=True)):
        if not len(places):  # a rejected completion that is left out
            continue
        forget_lengths(parts)
        yield {"input_ids": ids[row : row + 1, :total]}, places - row * batch.longest


def forget_lengths(parts: DecoderParts) -> None:
    """Bring rotary positions back to those of short sequences: transformers keeps those of the longest seen."""
    for module in parts.decoder.modules():
        for name in [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]:
            prefix, current = name.removesuffix("original_inv_freq"), getattr(module, name)
            setattr(module, f"{prefix}inv_freq", current.to(getattr(module, f"{prefix}inv_freq").device, copy=True))
            if hasattr(module, "original_max_seq_len"):
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def flat_inputs(parts: DecoderParts, batch: PairBatch) -> tuple[dict[str, Any], Tensor]:
    """The flat line, and the places in it whose states predict targets."""
    use_attention(parts.model, PAIR_ATTENTION)
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        # A 4-D mask passes through the model untouched; this one has no element and fits nothing, so that attention
        # which is not ours cannot run on it by accident.
        "attention_mask": torch.empty(1, 1, 0, 0, device=batch.input_ids.device),
        "pair_shape": batch.shape,
    }
    return inputs, batch.sources


def padded_inputs(parts: DecoderParts, batch: PairBatch) -> tuple[dict[str, Any], Tensor]:
    """Padded rows, and the places in them, counted through, whose states predict targets."""
    use_attention(parts.model, None)
    ids, mask, sources = padded(batch, _pad_id(parts))
    if not any(rejected for *_, rejected in batch.shape):  # every other row is a prompt alone then
        ids, mask, sources = ids[::2], mask[::2], sources - batch.sequences // 2 * batch.longest
    return {"input_ids": ids, "attention_mask": mask}, sources


def _pad_id(parts: DecoderParts) -> int:
    pad = getattr(parts.model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0  # masked, so any id will do


def use_attention(model: PreTrainedModel, name: str | None) -> None:
    """Switch the attention implementation; `None` is the one the model was loaded with."""
    current: str = model.config._attn_implementation
    if current != PAIR_ATTENTION:
        object.__setattr__(model, "_attention_before_lit_dpo", current)
    usual = "sdpa" if model._supports_sdpa else "eager"  # of a model made from the config of one in use
    wanted = name or str(getattr(model, "_attention_before_lit_dpo", usual))
    if wanted != current:
        model.set_attn_implementation(wanted)


def padded(batch: PairBatch, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same pairs as 2B separate right-padded rows, for models that the flat line cannot serve.

    Returns:
        `input_ids` and `attention_mask` of shape `(2B, longest)`, rows in the order chosen 0, rejected 0,
        chosen 1, ...; and the index into the flattened rows of the hidden state that predicts each target,
        shape `(scored tokens,)`, in the order of `targets`.
    """
    device = batch.input_ids.device
    prompts = batch.lengths[:, 0].repeat_interleave(2)  # (2B,)
    rows = prompts + batch.lengths[:, 1:].flatten()
    total = batch.lengths.sum(1)
    pair_start = (total.cumsum(0) - total).repeat_interleave(2)
    skip = torch.stack([torch.zeros_like(total), batch.lengths[:, 1]], dim=1).flatten()
    place = torch.arange(batch.longest, device=device).expand(len(rows), -1)  # (2B, longest)
    mask = place < rows[:, None]
    flat = pair_start[:, None] + place + torch.where(place >= prompts[:, None], skip[:, None], 0)
    ids = torch.where(mask, batch.input_ids[flat.clamp(max=len(batch.input_ids) - 1)], pad_id)
    sources = batch.sequences * batch.longest + prompts[batch.sequences] + batch._within - 1
    return ids, mask.long(), sources
