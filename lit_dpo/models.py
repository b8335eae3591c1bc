"""Getting a policy from a name, a folder or a description."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_dpo.pretrained import (
    NO_DECODER,
    Attention,
    Loading,
    read_config,
    read_model,
    refuse_kernels,
    trusts_remote_code,
)

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Scalar = bool | int | float | None | str  # the order in which the command line tries to read a value
ModelDescription = dict[str, Scalar | list[Scalar] | dict[str, Scalar]]
Quantization = ModelDescription
if TYPE_CHECKING:
    ModelSource = str | ModelDescription | PreTrainedModel
else:  # what the command line reads: there are no objects on it
    ModelSource = str | ModelDescription


def load_model(
    source: str | ModelDescription,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    loading: Loading = Loading(),  # noqa: B008 - frozen
) -> PreTrainedModel:
    """A causal language model, with dropout off.

    Args:
        source: A hub name or a local folder with weights; or a description such as
            `{"model_type": "llama", "hidden_size": 64, ...}`, from which a model with random weights is made.
        tokenizer: Fills in what a description leaves out: vocabulary size and special tokens.
        dtype: Dtype of the weights.
        seed: Seed of the random weights: the same description and seed give the same model.
        loading: Revision, attention and quantization.

    Raises:
        ValueError: An option of `loading` is not for this source, there is no such model, it is broken or needs code
            of its own (see `read_model`), or the description names no known `model_type`.
    """
    loading.check(source)
    kind, attention = getattr(torch, dtype), loading.attn_implementation
    if isinstance(source, str):
        model = read_model(source, kind, loading)
    else:
        config = _config(source, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _from_config(config, kind, attention)
    _disable_dropout(model)
    _keep_softcap(model, attention)
    model.eval()  # as `from_pretrained` gives it
    return model


def empty_model(
    source: str | ModelDescription,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    loading: Loading = Loading(),  # noqa: B008 - frozen
) -> PreTrainedModel:
    """What `load_model` gives, but without any weights: every tensor is on the meta device.

    Raises:
        ValueError: There is no such model, or the description names no known `model_type`.
    """
    loading.check(source)
    config = read_config(source, loading.revision) if isinstance(source, str) else _config(source, tokenizer)
    with torch.device("meta"):
        model = _from_config(config, getattr(torch, dtype), loading.attn_implementation)
    _disable_dropout(model)
    _keep_softcap(model, loading.attn_implementation)
    return model


def blank_like(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same class, configuration and dtype, for weights that are still to come."""
    other: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def check_object(model: object, dtype: Dtype, adapter: object) -> None:
    """Refuse a loaded model that could not be trained as it is.

    Args:
        model: As the caller has loaded it.
        dtype: That its weights ought to have.
        adapter: The low-rank adapters that it is to get.

    Raises:
        ValueError: It is no `PreTrainedModel`, has weights of another dtype, or is quantized and gets no adapters.
    """
    if not isinstance(model, PreTrainedModel):
        wrong = "adapters of its own" if hasattr(model, "peft_config") else f"the type {type(model).__name__}"
        raise ValueError(
            f"`model` must be a name, a folder, a description or a transformers model, and this one has {wrong}: give "
            "the `PreTrainedModel` itself, and low-rank adapters by `adapter`."
        )
    if getattr(model, "is_quantized", False):
        refuse_full_tuning(adapter)
    elif model.dtype != getattr(torch, dtype):
        has = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"`model` has {has} weights and `dtype` is {dtype}: set `dtype` to {has}, or convert the model first."
        )


def refuse_full_tuning(adapter: object) -> None:
    """Raise ValueError if the weights of a quantized model are to be trained themselves."""
    if adapter is None:
        raise ValueError(
            "The weights of a quantized model cannot be trained themselves: set `adapter`, such as `{rank: 16}`, or "
            "leave the quantization out."
        )


def _config(description: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Any:
    values = dict(description)
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(**values)
    except StrictDataclassError as error:
        raise ValueError(f"`model` describes no model: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`model` names no usable `model_type`: {description.get('model_type')!r}. Give a hub name, a folder, "
            "or a description such as {model_type: llama, hidden_size: 256, num_hidden_layers: 4, ...}."
        ) from error
    refuse_kernels(config, description.get("model_type"))
    return config


def _from_config(config: Any, dtype: torch.dtype, attention: Attention | None = None) -> PreTrainedModel:
    """A random model, or ValueError if a config is that of no decoder-only language model."""
    problem = f"`model` is a {config.model_type}, {NO_DECODER}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(problem)
    try:
        more = {} if attention is None else {"attn_implementation": attention}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trusts_remote_code(), dtype=dtype, **more
        )
    except Exception as error:  # whatever odd numbers come to
        if "Unrecognized configuration class" in str(error):
            raise ValueError(problem) from error
        if attention is not None and "attention implementation" in str(error):
            raise ValueError(
                f"`attn_implementation: {attention}` is not for a {config.model_type}: use another, or leave it out."
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"`model` describes no model that can be made ({reason}): correct its numbers.") from error
    return model


def _keep_softcap(model: PreTrainedModel, asked: Attention | None) -> None:
    """Leave `sdpa` where a model caps its attention scores: transformers 5.17 drops Gemma 2's cap there, silently."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        if asked is not None:
            raise ValueError(
                f"`attn_implementation: {asked}` would drop the cap that {type(model).__name__} puts on its attention "
                "scores: use `eager`, or leave it out."
            )
        model.set_attn_implementation("eager")


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero, those kept as plain numbers on attention modules too; the config stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
