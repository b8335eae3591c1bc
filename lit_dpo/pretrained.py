"""Models and tokenizers that somebody else made: what of theirs may run, and what is wrong with them, in a sentence."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.files import refuse_special
from lit_dpo.quantization import quantization_config

Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
NO_DECODER = "which is no decoder-only language model: use one, such as a Llama, Qwen or Gemma."
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_remote_code(trust: bool = True) -> Iterator[None]:
    """Let models and tokenizers run the Python code that comes with them, while this context lasts.

    Only for sources that you trust as you trust a program of your own: their code can do all that you can. The
    command line's `--trust-remote-code` is this context around a whole run. That a run had it is written into its
    hyperparameters and model card, and no run ever takes it from there.

    Args:
        trust: `False` changes nothing.
    """
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def trusts_remote_code() -> bool:
    """Whether code that comes with a model may run now."""
    return _trusted.get()


@dataclass(frozen=True)
class Loading:
    """How the model of a hub name or folder is loaded.

    Args:
        revision: Branch, tag or commit of a hub name.
        attn_implementation: Attention of the model's own; `None` is transformers' choice.
        quantization: Options of a quantized model; see `quantization_config`.
    """

    revision: str | None = None
    attn_implementation: Attention | None = None
    quantization: Mapping[str, Any] | None = None

    def check(self, source: object) -> None:
        """Refuse options that would be ignored for this source.

        Raises:
            ValueError: A folder or description has no revisions, and a description no weights to quantize; a loaded
                model is loaded.
        """
        name, folder = isinstance(source, str), isinstance(source, str) and Path(source).is_dir()
        wrong = {
            "revision": self.revision is not None and (not name or folder),
            "attn_implementation": self.attn_implementation is not None and not isinstance(source, str | dict),
            "quantization": self.quantization is not None and not name,
        }
        kind = "a folder" if folder else "a description" if isinstance(source, dict) else "loaded already"
        for option in (option for option, refused in wrong.items() if refused):
            raise ValueError(f"`{option}` would change nothing, since `model` is {kind}: leave it out.")

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is told of it."""
        options = {"revision": self.revision, "attn_implementation": self.attn_implementation}
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization)
        return {name: value for name, value in options.items() if value is not None}


def loading_of(options: Mapping[str, Any]) -> Loading:
    """How the model of a run was loaded, from its hyperparameters; a run of an earlier release names none of it."""
    return Loading(**{field.name: options.get(field.name) for field in fields(Loading)})


def read_config(source: str, revision: str | None = None) -> Any:
    """The configuration of a hub name or folder.

    Args:
        source: The name or folder.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: There is none, it does not load, or it needs code of its own and that is not trusted.
    """
    with _reading("model", source):
        more = {} if revision is None else {"revision": revision}
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trusts_remote_code(), **more)
        refuse_kernels(config, source)
    return config


def read_model(source: str, dtype: torch.dtype, loading: Loading = Loading()) -> PreTrainedModel:
    """The model of a hub name or folder, every weight of it read from there and finite.

    Args:
        source: The name or folder.
        dtype: Of the weights.
        loading: Options of transformers.

    Raises:
        ValueError: As `read_config`; or weights are missing, of another shape, pickled with more than tensors in them,
            or not finite.
    """
    model: PreTrainedModel
    more = loading.arguments()
    with _reading("model", source):
        if find_adapter_config_file(source, revision=loading.revision) is not None:
            raise _SourceError(
                f"`model` {source!r} holds adapters, which are no model to start from: merge them into their base "
                "with peft's `merge_and_unload` and save that (`lit-dpo export` merges unless told otherwise)."
            )
        read_config(source, loading.revision)
        load: Any = AutoModelForCausalLM.from_pretrained
        trust = trusts_remote_code()
        model, info = load(source, trust_remote_code=trust, dtype=dtype, output_loading_info=True, **more)
    _refuse_half(model)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`model` {source!r} lacks weights that its configuration asks for ({_few(missing)}), and random ones "
            "would stand in for them: give a folder with all of its weights."
        )
    if name := first_nonfinite(model.named_parameters()):
        raise ValueError(
            f"`model` {source!r} holds weights that are not finite, `{name}` first: nothing can be computed with them; "
            "give another copy or an earlier checkpoint of it."
        )
    return model


def read_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder.

    Args:
        source: The name or folder.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: There is none, it does not load, or it needs code of its own and that is not trusted.
    """
    with _reading("tokenizer", source):
        more = {} if revision is None else {"revision": revision}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trusts_remote_code(), **more
        )
    return tokenizer


def refuse_kernels(config: Any, source: object) -> None:
    """Refuse a configuration that has transformers fetch a kernel from the hub, which is code, unless it is trusted.

    Raises:
        ValueError: It names one as its attention.
    """
    if "/" in str(getattr(config, "_attn_implementation", None)) and not trusts_remote_code():
        raise _SourceError(_needs_code("model", source))


def _refuse_half(model: PreTrainedModel) -> None:
    """Refuse the decoder of an encoder-decoder, which transformers loads alone without a word."""
    config = model.config
    made_as = (getattr(config, "architectures", None) or [""])[0]
    cut = made_as.endswith("ForConditionalGeneration") and made_as != type(model).__name__
    if cut and getattr(config, "encoder_layers", None) is not None:
        raise ValueError(f"`model` is a {config.model_type}, {NO_DECODER}")


class _SourceError(ValueError):
    """An error that is one sentence already."""


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a source of somebody else's, as one sentence about the source."""
    folder = Path(source)
    try:
        if folder.is_dir():
            for file in folder.iterdir():
                if not file.is_dir():
                    refuse_special(file)
        yield
    except _SourceError:
        raise
    except Exception as error:
        raise _SourceError(_sentence(what, source, error)) from error


def _sentence(what: str, source: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return _needs_code(what, source)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        return (
            f"`{what}` {source!r} has its weights as a pickle (pytorch_model.bin) that holds more than tensors, and "
            "loading it would run code: give a copy whose weights are converted to safetensors."
        )
    if "ignore_mismatched_sizes" in str(error):
        return (
            f"`{what}` {source!r} holds weights of other shapes than its configuration says: give a folder whose "
            "`config.json` and weights belong together."
        )
    if found := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", str(error)):
        return f"`{what}` {source!r} is a {found[1].removesuffix('Config').lower()}, {NO_DECODER}"
    hint = (
        "that folder exists but does not load"
        if Path(source).is_dir()
        else "no such folder, and not to be had from the hub"
    )
    return f"`{what}` {source!r}: {hint} ({reason}). Give a folder saved by `save_pretrained`, or a hub name."


def _needs_code(what: str, source: object) -> str:
    return (
        f"`{what}` {source!r} needs Python code of its own, which is not run: use one that transformers itself knows, "
        "or, if you trust that code, add `--trust-remote-code` to the command line "
        "(in Python: `with lit_dpo.trusting_remote_code():`)."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
