"""Checkpoints of somebody else's: not removed because a checkpoint says so, and not written over."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.checkpoints import TO_RESUME_FROM, manifest_of
from lit_dpo.shards import SHARDS_META


def own_path(path: Any, folder: str | Path, ranked: bool = False) -> str:
    """The checkpoint that has the name of another path in a folder, if it is there and no link to another folder.

    What a checkpoint says of paths is only believed so far: Lightning removes what it takes for older checkpoints. And
    a run whose folder was renamed finds its own again.

    Args:
        path: What a checkpoint says.
        folder: Where the file must be.
        ranked: It is said to be one of the best, which those to resume from are not.

    Returns:
        Its path, or an empty string.
    """
    name = str(path).rpartition("/")[2]
    if not name.endswith(".ckpt") or (ranked and name in TO_RESUME_FROM):
        return ""
    if "://" in str(folder):
        return f"{str(folder).rstrip('/')}/{name}"
    found = Path(folder, name)
    return str(found) if found.exists() and found.resolve().parent == Path(folder).resolve() else ""


def believe(state: dict[str, Any], callback: ModelCheckpoint) -> dict[str, Any]:
    """What a checkpoint knows of a checkpoint callback, without paths outside of the callback's own folder."""
    folder = str(callback.dirpath)
    models = state.get("best_k_models")
    models = models if isinstance(models, dict) else {}
    ranked = {own: score for path, score in models.items() if (own := own_path(path, folder, ranked=True))}
    worst, best = (max, min) if callback.mode == "min" else (min, max)
    first = best(ranked, key=ranked.__getitem__) if ranked else own_path(state.get("best_model_path"), folder, True)
    kth = worst(ranked, key=ranked.__getitem__) if ranked else ""
    if state.get("best_model_path") and not first:
        rank_zero_info(f"`{state['best_model_path']}` is not in `{folder}`, so the best checkpoint is found anew.")
    newest = own_path(state.get("last_model_path"), folder)
    return {
        **state,
        "dirpath": callback.dirpath,
        "best_k_models": ranked,
        "best_model_path": first,
        "best_model_score": ranked.get(first),
        "kth_best_model_path": kth,
        "kth_value": ranked.get(kth, state.get("kth_value")),
        "last_model_path": "" if newest in (*ranked, first) else newest,
    }


def believe_all(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let no checkpoint callback of a Trainer, also of Lightning's own, take up paths of other folders."""
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            for key in {callback.state_key, callback._legacy_state_key} & states.keys():
                states[key] = trainer.strategy.broadcast(believe(states[key], callback))


def refuse_foreign(folder: Path, resumed: str | Path | None) -> None:
    """Find out now that the checkpoints to resume from would be written over something else.

    Args:
        folder: Where they will go.
        resumed: The checkpoint that the run goes on from, which may have lost its manifest.

    Raises:
        FileExistsError: Something of their names is there, and no run wrote it.
    """
    for path in (folder / name for name in TO_RESUME_FROM):
        if not os.path.lexists(path) or manifest_of(path).exists() or (resumed and Path(resumed) == path):
            continue
        names = {file.name for file in path.iterdir()} if path.is_dir() else {""}
        if all(re.fullmatch(r".*\.distcp|\.metadata.*|\.?manifest\.json.*", n) or n == SHARDS_META for n in names):
            continue  # shards whose writing did not come to an end
        raise FileExistsError(f"`{path}` is there already, and no run wrote it: choose another `dirpath`.")


def refuse_foreign_checkpoint(callback: Callback, resumed: str | None) -> None:
    """Refuse Lightning's checkpoint on an exception where a file stands that it would write over, and remove.

    Args:
        callback: One of the user's.
        resumed: What the run resumes from.

    Raises:
        FileExistsError: One does.
    """
    if not isinstance(callback, OnExceptionCheckpoint) or not os.path.lexists(callback.ckpt_path):
        return
    if resumed is None or Path(resumed).resolve() != Path(callback.ckpt_path).resolve():
        raise FileExistsError(f"`{callback.ckpt_path}` exists: give `OnExceptionCheckpoint` another `filename`.")
