"""From a training checkpoint to a folder that transformers loads."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lit_dpo.card import model_card
from lit_dpo.checkpoints import manifest_of, verify
from lit_dpo.content import check_content
from lit_dpo.files import refuse_special
from lit_dpo.finite import first_nonfinite
from lit_dpo.models import LoRA, export, load_model, load_tokenizer, refuse_existing
from lit_dpo.module import STATE
from lit_dpo.shards import read_shards

_PREFIX = "policy."


def export_checkpoint(checkpoint: str, output_dir: str, merge: bool = True) -> Path:
    """Write the policy of a checkpoint as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Args:
        checkpoint: A ``.ckpt`` file written during training, or a folder of shards.
        output_dir: The folder to make; it must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise write the adapters alone.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no checkpoint of this package.
        FileExistsError: `output_dir` holds something already.
    """
    refuse_existing(Path(output_dir))
    content = _read(Path(checkpoint))
    with _one_sentence(checkpoint):
        options = content["hyper_parameters"]
        tokenizer = load_tokenizer(options["tokenizer"] or options["model"])
        model: Any = load_model(options["model"], tokenizer, options["dtype"], options["init_seed"])
        if options["adapter"] is not None:
            model = LoRA(**options["adapter"]).attach(model)
        state = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
        if name := first_nonfinite(state.items()):
            raise ValueError(
                f"`{checkpoint}` holds weights that are not finite, `{name}` first, and is not exported: give an "
                "earlier checkpoint of the run, or train again with a lower learning rate."
            )
        model.load_state_dict(state)
        card = model_card(options, content.get(STATE, {}))
    return export(model, tokenizer, output_dir, merge, card)


@contextmanager
def _one_sentence(checkpoint: str) -> Iterator[None]:
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
        raise ValueError(f"`{path}` does not load as a checkpoint: {reason}") from error
    check_content(content, path)
    if "model" not in content.get("hyper_parameters", {}):
        raise ValueError(f"`{path}` is no checkpoint of a `PreferenceModule`; give one written by `lit-dpo fit`.")
    return content


def _read_file(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content
