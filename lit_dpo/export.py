"""From a policy or a training checkpoint to a folder that transformers loads, with its model card."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lit_dpo.adapters import merged
from lit_dpo.checkpoints.durable import replace_folder
from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.checkpoints.run import Run
from lit_dpo.extrapolate import Extrapolation
from lit_dpo.model_card import how_made, model_card
from lit_dpo.trained import in_one_sentence, load_policy


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    merge: bool = True,
    card: str | None = None,
    beyond: Extrapolation | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load with `from_pretrained`.

    The folder appears whole or not at all: it is written beside its place and renamed into it.

    Args:
        model: A transformers model or a peft wrapper around one; it is left as it is.
        tokenizer: Saved along, chat template included.
        folder: Must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise only the adapters are written.
        card: Text of the model card, `README.md`.
        beyond: Extrapolate the weights that are written; not for adapters alone.

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
    with replace_folder(target) as part:
        with without_bars():
            model.save_pretrained(part)  # type: ignore[operator]
        if beyond is not None:
            beyond.apply(part, model.state_dict().keys())
        tokenizer.save_pretrained(part)
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")
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


def export_run(
    checkpoint: str,
    output_dir: str,
    merge: bool = True,
    root: str | None = None,
    extrapolate: float | None = None,
    base: str | None = None,
) -> None:
    """Write the policy of a run or a checkpoint as a folder for `AutoModelForCausalLM` and `AutoTokenizer`.

    Args:
        checkpoint: A `.ckpt` file written during training, or a folder of shards; a run's folder, or its
            `checkpoints`, for its best checkpoint, or else its last; `last` for that of the newest run.
        output_dir: The folder to make; it must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise write the adapters alone.
        root: Where `last` looks for runs; by default the current folder and the folders in its `runs`.
        extrapolate: Go beyond the policy: `policy + extrapolate * (policy - base)` for each weight (ExPO).
        base: The folder of the model that training started from, for `extrapolate`.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no run.
        ValueError: It is no checkpoint of this package, or the base of its adapters could not be loaded.
        FileExistsError: `output_dir` holds something already.
    """
    if root is not None and checkpoint != "last":
        raise ValueError("`root` says where `last` looks for runs: give `last`, or leave `root` out.")
    if (extrapolate is None) != (base is None):
        raise ValueError("`extrapolate` and `base` belong together: give both, or leave both out.")
    beyond = None if extrapolate is None or base is None else Extrapolation(extrapolate, base)
    refuse_existing(Path(output_dir))
    path, which = meant_checkpoint(checkpoint, root)
    print(f"Exporting {which} `{path}`", flush=True)
    folder = export_checkpoint(str(path), output_dir, merge, beyond)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    load = f'from transformers import pipeline; print(pipeline("text-generation", {json.dumps(str(folder))})("Hello"))'
    print(f"Wrote the policy to `{folder}`: {files}\nNext: {shlex.join(['python', '-c', load])}")


def meant_checkpoint(given: str, root: str | None) -> tuple[Path, str]:
    """The checkpoint that a name on the command line means, and what it is."""
    path = Path(given)
    if given == "last" and (root is not None or not path.exists()):
        places = [Path(), *sorted(Path("runs").glob("*"))] if root is None else [Path(root)]
        runs = [run for place in places for run in Run.all_in(place)]
        times = {run.folder: last.stat().st_mtime for run in runs if (last := run.last) is not None}
        if not times:
            where = ", ".join(f"`{place}`" for place in places)
            raise FileNotFoundError(f"`last`: no run with a checkpoint is in {where}. Give `--root`, or a folder.")
        path = max(times, key=times.__getitem__)
    run = Run.named(path)
    if run is None:
        return path, "the checkpoint"
    if (best := run.best) is not None:
        return best, "the best checkpoint of its run,"
    if (last := run.last) is not None:
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
    beyond: Extrapolation | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the policy of a checkpoint as a folder for `AutoModelForCausalLM` and `AutoTokenizer`.

    Args:
        checkpoint: A `.ckpt` file written during training, or a folder of shards.
        output_dir: The folder to make; it must not exist, or be empty.
        merge: Fold LoRA adapters into the weights; otherwise write the adapters alone.
        beyond: Extrapolate the weights that are written.
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
        if beyond is not None:
            if trained.options["adapter"] is not None and not merge:
                raise ValueError("Adapters alone cannot be extrapolated: leave `merge` true.")
            beyond.check(trained.tokenizer)
        run = Run.of(Path(checkpoint).absolute())
        made = how_made(None if run is None else run.config, shlex.join(["lit-dpo", "export", checkpoint, output_dir]))
        with in_one_sentence(checkpoint):
            card = model_card(trained.options, trained.facts, made, beyond)
        return export(trained.model, trained.tokenizer, output_dir, merge, card, beyond)
