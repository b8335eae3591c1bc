"""The pieces of a transformers causal language model that scoring touches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

_NORM_NAMES = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "final_norm")


@dataclass(frozen=True)
class DecoderParts:
    """The pieces of a causal language model that scoring touches.

    Args:
        model: The causal language model itself, adapters' wrapper taken off.
        decoder: Token ids to final hidden states.
        blocks: The decoder blocks in order.
        norm: The norm behind the last block; `None` if it was not found, and then only the last layer can be scored.
        head: Hidden states to logits.
    """

    model: PreTrainedModel
    decoder: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module | None
    head: nn.Linear


def decoder_parts(model: nn.Module) -> DecoderParts:
    """Find decoder, blocks, final norm and head of a transformers causal language model.

    Raises:
        ValueError: A piece is missing or has a form that scoring would get wrong, such as an adapter on the head.
    """
    model = getattr(model, "_fsdp_wrapped_module", model)  # of FSDP1
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise ValueError(f"`model` must be a transformers causal language model, got {type(base).__name__}.")
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if decoder is base or decoder is head:  # Llama 4 finds none and returns itself, ModernBERT its head
        decoder = base.model
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The output head of {type(base).__name__} is a {type(head).__name__}, not a linear layer. "
            "Leave the head out of the adapter's `target_modules`, or use a model with a linear head."
        )
    depth = base.config.get_text_config().num_hidden_layers
    blocks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not blocks:
        raise ValueError(f"No list of {depth} decoder blocks found in {type(decoder).__name__}; use another model.")
    norm = next((getattr(decoder, name) for name in _NORM_NAMES if hasattr(decoder, name)), None)
    return DecoderParts(base, decoder, blocks[0], norm, head)


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's own parameters and buffers, adapters left out, by the names they have without adapters."""
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer", ""), tensor


def adapters_off(policy: nn.Module) -> AbstractContextManager[None]:
    """A context in which a policy's adapters, if it has any, do nothing."""
    off: AbstractContextManager[None] = policy.disable_adapter() if hasattr(policy, "peft_config") else nullcontext()  # type: ignore[operator]
    return off
