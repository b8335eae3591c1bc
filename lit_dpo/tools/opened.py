"""What a word on the command line means where a model is expected: a folder, a hub name, a run, or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_dpo.export import meant_checkpoint
from lit_dpo.models import Dtype, load_model
from lit_dpo.pretrained import loading_of
from lit_dpo.tokenizers import load_tokenizer
from lit_dpo.trained import load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Opened:
    """A model, ready for use.

    Args:
        name: As it was given.
        model: On its device, in eval mode.
        tokenizer: Its own, or that of the run.
        options: The module's hyperparameters if it is a run's, as plain values; else nothing.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any] = field(default_factory=dict)


def is_trained(given: str) -> bool:
    """Whether a word means a run or a checkpoint, rather than a model that transformers loads."""
    path = Path(given)
    if path.is_dir():
        return not (path / "config.json").exists() and not (path / "adapter_config.json").exists()
    return given == "last" or path.suffix == ".ckpt" or path.is_file()


def open_model(given: str, dtype: Dtype = "float32") -> Opened:
    """The model that a word means.

    Args:
        given: A folder or hub name that transformers loads; a run's folder, for its best checkpoint or else its last;
            a `.ckpt` file or folder of shards; or `last` for the newest run.
        dtype: Of the weights.

    Raises:
        OSError: There is no such run or checkpoint.
        ValueError: It does not load.
    """
    if not is_trained(given):
        tokenizer = load_tokenizer(given)
        return Opened(given, on_device(load_model(given, tokenizer, dtype)), tokenizer)
    path = Path(given)
    if path.is_dir() and path.suffix != ".ckpt" and not any(path.rglob("*.ckpt")):
        raise FileNotFoundError(
            f"`{given}` holds neither a model (`config.json` and weights) nor a run with a checkpoint: give the folder "
            "of one of them, or wait for the run's first checkpoint; a run that was stopped before has to start again."
        )
    trained = load_policy(str(meant_checkpoint(given, None)[0]))
    quantized = trained.options.get("quantization") is not None  # whose weights have a type of their own
    model = trained.model if quantized else trained.model.to(getattr(torch, dtype))
    return Opened(given, on_device(model), trained.tokenizer, trained.options)


def open_start(opened: Opened, dtype: Dtype = "float32") -> Opened | None:
    """The model that a run started from, with the tokenizer of the run; `None` of what is no run."""
    if not opened.options:
        return None
    source, seed = opened.options["model"], opened.options["init_seed"]
    name = source if isinstance(source, str) else "the untrained model"
    model = load_model(source, opened.tokenizer, dtype, seed, loading_of(opened.options))
    return Opened(name, on_device(model), opened.tokenizer)


def on_device(model: nn.Module) -> nn.Module:
    """The model in eval mode, on a GPU if there is one."""
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def positions(model: nn.Module) -> int | None:
    """How many positions a model has, if they are limited."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
