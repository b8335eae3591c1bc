"""From a policy or a training checkpoint to a folder that transformers loads, with its model card."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lit_dpo.adapters import LoRA, merged
from lit_dpo.checkpoints.changes import saved_config
from lit_dpo.checkpoints.claim import number_of
from lit_dpo.checkpoints.content import check_content
from lit_dpo.checkpoints.durable import sync_files
from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.checkpoints.run import best_checkpoint, folder_of_run, last_checkpoint
from lit_dpo.checkpoints.shards import read_shards
from lit_dpo.checkpoints.verify import manifest_of, verify
from lit_dpo.files import refuse_special
from lit_dpo.hparams import refuse_absent
from lit_dpo.model_card import how_made, model_card
from lit_dpo.models import blank_like, load_model
from lit_dpo.module import STATE
from lit_dpo.pretrained import loading_of
from lit_dpo.tokenizers import load_tokenizer


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    merge: bool = True,
    card: str | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load with ``from_pretrained``.

    The folder appears whole or not at all: it is written beside its place and renamed into it.

    Args:
        model: A transformers model or a peft wrapper around one; it is left as it is.
        tokenizer: Saved along, chat template included.
        folder: Must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise only the adapters are written.
        card: Text of the model card, ``README.md``.

    Raises:
        FileExistsError: `folder` holds something already.
        ValueError: A weight is not finite, or the merged model gives other log-probs than the one with adapters.
    """
    refuse_existing(Path(folder))
    if hasattr(model, "peft_config") and merge:
        model = merged(model)
    if name := first_nonfinite(model.named_parameters()):
        raise ValueError(
            f"The weights to export are not finite, `{name}` first, and make no model: export an earlier checkpoint, "
            "or train with a lower learning rate."
        )
    target = new_folder(folder)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.chmod(part, 0o755)
        with without_bars():
            model.save_pretrained(part)  # type: ignore[operator]
        tokenizer.save_pretrained(part)
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")
        sync_files(part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


@contextmanager
def without_bars(hidden: bool = True) -> Iterator[None]:
    """Let transformers draw no progress bars here, such as one over the files that it writes."""
    hidden &= logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def new_folder(folder: str | Path) -> Path:
    """A path where a folder may be made, its parents present.

    Raises:
        FileExistsError: Something is there already.
    """
    target = Path(folder)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def refuse_existing(target: Path) -> None:
    """Raise FileExistsError if something is there that is no empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"`{target}` exists already: name a new folder, or remove that one first.")


_PREFIX = "policy."


def export_run(checkpoint: str, output_dir: str, merge: bool = True, root: str | None = None) -> None:
    """Write the policy of a run or a checkpoint as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Args:
        checkpoint: A ``.ckpt`` file written during training, or a folder of shards; a run's folder, or its
            ``checkpoints``, for its best checkpoint, or else its last; ``last`` for that of the newest run.
        output_dir: The folder to make; it must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise write the adapters alone.
        root: Where ``last`` looks for runs; by default the current folder and the folders in its ``runs``.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no run.
        ValueError: It is no checkpoint of this package, or the base of its adapters could not be loaded.
        FileExistsError: `output_dir` holds something already.
    """
    if root is not None and checkpoint != "last":
        raise ValueError("`root` says where `last` looks for runs: give `last`, or leave `root` out.")
    refuse_existing(Path(output_dir))
    path, which = meant_checkpoint(checkpoint, root)
    print(f"Exporting {which} `{path}`", flush=True)
    folder = export_checkpoint(str(path), output_dir, merge)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    load = f"from transformers import pipeline; print(pipeline('text-generation', {str(folder)!r})('Hello'))"
    print(f"Wrote the policy to `{folder}`: {files}\nNext: {shlex.join(['python', '-c', load])}")


def meant_checkpoint(given: str, root: str | None) -> tuple[Path, str]:
    """The checkpoint that a name on the command line means, and what it is."""
    path = Path(given)
    if given == "last" and (root is not None or not path.exists()):
        places = [Path(), *sorted(Path("runs").glob("*"))] if root is None else [Path(root)]
        runs = [run for place in places for run in place.glob("version_*") if number_of(run) >= 0]
        times = {run: last.stat().st_mtime for run in runs if (last := last_checkpoint(run)) is not None}
        if not times:
            where = ", ".join(f"`{place}`" for place in places)
            raise FileNotFoundError(f"`last`: no run with a checkpoint is in {where}. Give `--root`, or a folder.")
        path = max(times, key=times.__getitem__)
    run = folder_of_run(path)
    if run is None:
        return path, "the checkpoint"
    if (best := best_checkpoint(run)) is not None:
        return best, "the best checkpoint of its run,"
    if (last := last_checkpoint(run)) is not None:
        return last, "the last checkpoint of its run (no best one is beside it),"
    raise FileNotFoundError(f"No checkpoint of a run is in `{path}`: give a run's folder, or a .ckpt file.")


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end an export as an exception does, so that nothing half written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def refuse_baseless(model: Any, adapter: Any, merge: bool) -> None:
    """Refuse to write adapters alone where nobody could load the model that they belong to.

    Raises:
        ValueError: The model has random weights, made from a description, or was given as an object.
    """
    if adapter is not None and not merge and not isinstance(model, str):
        why = "has random weights that are stored nowhere" if isinstance(model, dict) else "was given as an object"
        raise ValueError(f"Adapters alone are of no use here, because their base {why}: leave `merge` true.")


def export_checkpoint(
    checkpoint: str,
    output_dir: str,
    merge: bool = True,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the policy of a checkpoint as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Args:
        checkpoint: A ``.ckpt`` file written during training, or a folder of shards.
        output_dir: The folder to make; it must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise write the adapters alone.
        model: The model that the run was given as an object, or another of its class and configuration; it is left as
            it is, and its weights do not matter.
        tokenizer: The tokenizer that the run was given as an object.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no checkpoint of this package, the base of its adapters could not be loaded, or an object
            that the run was given is missing.
        FileExistsError: `output_dir` holds something already.
    """
    refuse_existing(Path(output_dir))
    with cleaning_up():
        trained = load_policy(checkpoint, model, tokenizer)
        refuse_baseless(trained.options["model"], trained.options["adapter"], merge)
        config = saved_config(None, Path(checkpoint).absolute())
        made = how_made(config, shlex.join(["lit-dpo", "export", checkpoint, output_dir]))
        card = model_card(trained.options, trained.facts, made)
        return export(trained.model, trained.tokenizer, output_dir, merge, card)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, ready for use.

    Args:
        model: The policy, its adapters attached if it has any, with the trained weights.
        tokenizer: Its tokenizer, with the chat template of the run.
        options: The module's hyperparameters, as plain values; ``model`` is where its starting model is now.
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
        checkpoint: A ``.ckpt`` file written during training, or a folder of shards.
        given: The model that the run was given as an object; it is left as it is.
        tokenizer: The tokenizer that the run was given as an object.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no checkpoint of this package, does not fit together, or holds weights that are not finite.
    """
    content = _read(Path(checkpoint))
    with _one_sentence(checkpoint):
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
