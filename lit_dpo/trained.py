"""The policy of a checkpoint, ready for use."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.adapters import LoRA
from lit_dpo.checkpoints.content import check_content
from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.checkpoints.shards import read_shards
from lit_dpo.checkpoints.verify import manifest_of, verify
from lit_dpo.files import refuse_special
from lit_dpo.hparams import refuse_absent
from lit_dpo.models import blank_like, load_model
from lit_dpo.module import STATE
from lit_dpo.pretrained import loading_of
from lit_dpo.tokenizers import load_tokenizer

_PREFIX = "policy."


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, ready for use.

    Args:
        model: The policy, its adapters attached if it has any, with the trained weights.
        tokenizer: Its tokenizer, with the chat template of the run.
        options: The module's hyperparameters, as plain values; `model` is where its starting model is now.
        facts: What the checkpoint says of its run; see `lit_dpo.model_card.model_card`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]
    facts: Mapping[str, Any]


def load_policy(
    checkpoint: str, given: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Trained:
    """The policy of a checkpoint.

    Args:
        checkpoint: A `.ckpt` file written during training, or a folder of shards.
        given: The model that the run was given as an object; it is left as it is.
        tokenizer: The tokenizer that the run was given as an object.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no checkpoint of this package, does not fit together, or holds weights that are not finite.
    """
    content = _read(Path(checkpoint))
    with in_one_sentence(checkpoint):
        options = content["hyper_parameters"]
        options = {**options, "model": _present(options["model"], Path(checkpoint))}
        loading = loading_of(options)
        if given is None:
            refuse_absent("model", options["model"])
        if tokenizer is None:
            refuse_absent("tokenizer", options["tokenizer"])
            revision = None if options["tokenizer"] else loading.revision
            tokenizer = load_tokenizer(options["tokenizer"] or options["model"], revision)
        else:
            tokenizer = copy.deepcopy(tokenizer)
        if isinstance(template := content.get(STATE, {}).get("chat_template"), str):
            tokenizer.chat_template = template
        model: Any
        if given is None:
            model = load_model(options["model"], tokenizer, options["dtype"], options["init_seed"], loading)
        else:
            model = blank_like(given)
        if options["adapter"] is not None:
            model = LoRA(**options["adapter"]).attach(model)
        state = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
        if name := first_nonfinite(state.items()):
            raise ValueError(
                f"`{checkpoint}` holds weights that are not finite, `{name}` first, and is not exported: give an "
                "earlier checkpoint of the run, or train again with a lower learning rate."
            )
        model.load_state_dict(state)
    return Trained(model, tokenizer, options, content.get(STATE, {}))


def _present(model: Any, checkpoint: Path) -> Any:
    """The model that a checkpoint started from; of a stepwise run whose folder was renamed, where it is now."""
    if not isinstance(model, str) or Path(model).exists():
        return model
    step = Path(*Path(model).parts[-2:])
    runs = [parent.parent for parent in checkpoint.absolute().parents if parent.name.startswith("partition_")]
    known = re.fullmatch(r"partition_\d+/export", step.as_posix())
    return next((str(run / step) for run in runs if known and (run / step).is_dir()), model)


@contextmanager
def in_one_sentence(checkpoint: str) -> Iterator[None]:
    """A checkpoint may hold anything; what does not fit together in it is its fault, and said in one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next(iter(lines[1:] if "loading state_dict" in str(error) else lines), type(error).__name__)
        raise ValueError(
            f"The weights and options in `{checkpoint}` do not belong together ({reason[:200]}): give a checkpoint "
            "written by `lit-dpo fit`."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f"there are {', '.join(p.name for p in near)}" if near else "give a .ckpt file from a run's folder"
        raise FileNotFoundError(f"No checkpoint `{path}`: {hint}.")
    if not path.is_dir():
        refuse_special(path)
    if path.is_dir() or manifest_of(path).exists():
        verify(path)
    try:
        content = read_shards(path, f"state_dict.{_PREFIX}") if path.is_dir() else _read_file(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError) as error:
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise ValueError(
            f"`{path}` does not load as a checkpoint ({reason[:80]}): give a .ckpt file that `lit-dpo fit` has written "
            "whole."
        ) from error
    check_content(content, path)
    if "model" not in content.get("hyper_parameters", {}):
        raise ValueError(f"`{path}` is no checkpoint of a `PreferenceModule`; give one written by `lit-dpo fit`.")
    return content


def _read_file(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content
