"""The folder of a run: which one to go on in, and what is where."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_dpo.checkpoints.claim import is_first, number_of
from lit_dpo.checkpoints.foreign import own_path
from lit_dpo.checkpoints.io import TO_RESUME_FROM
from lit_dpo.checkpoints.shards import SHARDS_META, check_index
from lit_dpo.checkpoints.verify import verify

_LOGGED = ("metrics.csv", "hparams.yaml")  # what Lightning's CSVLogger writes over


def refuse_foreign_logs(logger: Logger, root: Path, ours: bool) -> None:
    """Refuse a logger that would write over files of somebody else, or among the runs.

    Args:
        logger: One of the user's.
        root: Where the runs are.
        ours: The run that is resumed had this logger too; what it has logged so far is kept in `metrics_0.csv` and
            so on.

    Raises:
        ValueError: It would make a folder that looks like a run.
        FileExistsError: It would write over a file.
    """
    if not isinstance(logger, CSVLogger | TensorBoardLogger):
        return
    folder = Path(logger.log_dir)
    kind = type(logger).__name__
    if number_of(folder) >= 0 and folder.parent.resolve() == root.resolve():
        raise ValueError(
            f"`{kind}` would write to `{folder}`, among the runs themselves: give it a `name`, or leave it out, as "
            "each run logs to its own `metrics.csv` anyway."
        )
    if ours and is_first():
        rotate_metrics(folder)
    taken = [] if ours or isinstance(logger, TensorBoardLogger) else [n for n in _LOGGED if os.path.lexists(folder / n)]
    if taken:
        raise FileExistsError(f"`{kind}` would write over `{folder / taken[0]}`: give it another `save_dir` or `name`.")


def newest_run(root: Path, what: str = "`ckpt_path: last`") -> Path:
    """The run that `ckpt_path: last` means: the newest `version_N` in a folder.

    Args:
        root: The folder.
        what: The option that asks, for the message.

    Raises:
        FileNotFoundError: There is none, or it holds nothing to resume from.
    """
    runs = sorted((run for run in root.glob("version_*") if run.is_dir() and number_of(run) >= 0), key=number_of)
    if runs and (last_checkpoint(runs[-1]) or is_stepwise(runs[-1])):
        return runs[-1]
    if not runs:
        raise FileNotFoundError(f"{what}: no run is in `{root}`. Leave `ckpt_path` out to start one.")
    older = [path for run in runs[:-1] if (path := last_checkpoint(run))]
    hint = f"name one, such as `{older[-1]}`, or leave" if older else "leave"
    raise FileNotFoundError(
        f"{what}: the newest run, `{runs[-1]}`, has no checkpoint yet; {hint} `ckpt_path` out to start anew."
    )


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, of its last partition if it has several.

    It is the one before the last, if a crash left no last one (of shards, it can).
    """
    parts = sorted(run.glob("partition_*"), key=lambda part: number_of(part, "partition"), reverse=True)
    folders = [run / "checkpoints", *(f for part in parts for f in sorted(part.glob("version_*/checkpoints")))]
    return next((path for folder in folders for name in TO_RESUME_FROM if (path := folder / name).exists()), None)


def folder_of_run(path: Path) -> Path | None:
    """The run that a folder is, or whose `checkpoints` it is, or the newest of those in it; else nothing."""
    if not path.is_dir() or path.suffix == ".ckpt" or (path / SHARDS_META).exists():
        return None
    if path.name == "checkpoints":
        return path.parent
    if last_checkpoint(path) is None and any(number_of(entry) >= 0 for entry in path.iterdir()):
        return newest_run(path, f"`{path}`")
    return path


def best_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run, of its last partition if it has several, as its callback ranked it."""
    last = last_checkpoint(run)
    if last is None:
        return None
    file = last / SHARDS_META if last.is_dir() else last
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        states = list(content["callbacks"].values())
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError):
        return None  # whoever loads it says what is wrong
    best = [own_path(s.get("best_model_path"), last.parent, ranked=True) for s in states if isinstance(s, dict)]
    return next((Path(path) for path in best if path), None)


def is_stepwise(run: Path) -> bool:
    """Whether a run's folder holds partitions."""
    return (run / "partition_0").is_dir()


def run_of(checkpoint: Path, root: Path) -> Path | None:
    """The run in `root` that a checkpoint belongs to, if it does; a fit that resumes from it goes on there."""
    folder = checkpoint.parent
    belongs = folder.name == "checkpoints" and folder.parent.parent.resolve() == root.resolve()
    return folder.parent if belongs and number_of(folder.parent) >= 0 else None


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that is missing, damaged, or would run code, before any strategy loads it in its own way.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
        pickle.UnpicklingError: It holds more than plain values and tensors.
    """
    if not path.exists():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f"There are {', '.join(file.name for file in near)}." if near else "Give a .ckpt file of a run's folder."
        raise FileNotFoundError(f"`ckpt_path`: there is no `{path}`. {hint}")
    verify(path)
    if path.is_dir():
        check_index(path)
    content = path / SHARDS_META if path.is_dir() else path
    torch.load(content, map_location="cpu", weights_only=True, mmap=True)


def rotate_metrics(run: Path) -> None:
    """Let a logger that begins anew leave what was measured before the interruption in `metrics_0.csv` and so on."""
    metrics = run / "metrics.csv"
    if metrics.exists():
        number = max((number_of(path.with_suffix(""), "metrics") for path in run.glob("metrics_*.csv")), default=-1)
        metrics.rename(run / f"metrics_{number + 1}.csv")
