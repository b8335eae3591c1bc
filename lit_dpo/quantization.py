"""Quantized weights, through transformers' own configuration classes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import BitsAndBytesConfig, TorchAoConfig


def quantization_config(options: Mapping[str, Any]) -> Any:
    """The configuration that `from_pretrained` takes, of the library whose options these are.

    Args:
        options: Of `transformers.BitsAndBytesConfig`, such as `{load_in_4bit: true, bnb_4bit_quant_type: nf4}`; or
            `quant_type`, the name of one of torchao's configurations, with its own options and those of
            `transformers.TorchAoConfig`, such as `{quant_type: Int8WeightOnlyConfig}`.

    Raises:
        ValueError: There is no such option, or one has a value that is not allowed.
        ImportError: The library is not installed.
    """
    torchao = "quant_type" in options
    name = "torchao" if torchao else "bitsandbytes"
    kind = TorchAoConfig if torchao else BitsAndBytesConfig
    if not torchao:
        _refuse_unknown(options, BitsAndBytesConfig, set())
        if options.get("load_in_4bit", False) is options.get("load_in_8bit", False):
            raise ValueError(
                "`quantization` must say one of `load_in_4bit: true` and `load_in_8bit: true` (bitsandbytes), or a "
                "`quant_type` (torchao)."
            )
    if importlib.util.find_spec(name) is None:
        raise ImportError(f'`quantization` needs the package {name}: pip install "lit-dpo[quantization]".')
    try:
        return kind(**(_torchao_options(options) if torchao else options))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"`quantization` has an option that {name} does not take: {error}.") from error


def _torchao_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `TorchAoConfig`, the type made from its name and its share of the options."""
    module = importlib.import_module("torchao.quantization")
    base = importlib.import_module("torchao.core.config").AOBaseConfig
    kind = getattr(module, str(options["quant_type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(
            f"`quant_type` must be the name of a configuration in torchao.quantization, such as Int8WeightOnlyConfig, "
            f"got {options['quant_type']!r}."
        )
    _refuse_unknown(options, TorchAoConfig, _names(kind))
    ours = _names(TorchAoConfig)
    theirs = {key: value for key, value in options.items() if key not in ours}
    return {**{key: value for key, value in options.items() if key in ours}, "quant_type": kind(**theirs)}


def _refuse_unknown(options: Mapping[str, Any], kind: type[Any], more: set[str]) -> None:
    """Raise ValueError for an option that transformers would ignore, since it does not know it."""
    known = _names(kind) | more
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"`quantization` has no option `{unknown[0]}`: {kind.__name__} takes {', '.join(sorted(known))}."
        )


def _names(kind: type[Any]) -> set[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, value in inspect.signature(kind).parameters.items() if value.kind in named}
