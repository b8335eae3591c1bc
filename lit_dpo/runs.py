"""The folder of a run: made for it alone, found again, and never taken for another's."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lit_dpo.checkpoints import TO_RESUME_FROM, verify
from lit_dpo.foreign import own_path
from lit_dpo.shards import SHARDS_META, check_index

_STARTING = ("config.yaml", "hparams.yaml")  # what a run writes before it has anything to keep
_LOGGED = ("metrics.csv", "hparams.yaml")  # what Lightning's CSVLogger writes over
_IGNORED = ("ckpt_path", "predictions", "threads", "trainer.default_root_dir")
_RESTORED = ("model.optimizer", "model.lr_scheduler")
_HANDED_DOWN = "LIT_DPO_RUN"


class RunFolder:
    """The folder of a run, and which folders this very process made for it.

    Args:
        path: The folder; it is made if it is not there, with those above it.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []  # outermost first
        for folder in reversed([f for f in (path, *path.parents) if not f.is_dir()]):
            with suppress(FileExistsError):  # another process was faster, or something is in the way
                _make(folder)
                self._made.append(folder)
        if not path.is_dir():
            raise OSError(f"`{path}` is no folder: choose another `default_root_dir`.")

    @classmethod
    def claim(cls, root: Path) -> RunFolder:
        """Make the folder of a new run, ``version_N`` after the highest in `root`; two runs never get the same one.

        Gaps stay gaps, so the highest number is always the newest run.

        Raises:
            OSError: It cannot be made.
        """
        run = cls(root)
        while True:
            run.path = root / f"version_{max(map(number_of, root.iterdir()), default=-1) + 1}"
            with suppress(FileExistsError):  # another process was faster
                _make(run.path)
                run._made.append(run.path)
                return run

    def abandon(self) -> None:
        """Remove the folder of a run that failed before it had anything to keep.

        Only if this process made it, and nothing is in it but what every run writes at its start. Nothing is removed
        recursively; anything else that stands there stays, and the folder with it.
        """
        if self.path not in self._made:
            return
        empty = self.path / "checkpoints"
        found = [entry for entry in self.path.iterdir() if entry != empty]
        if empty.is_symlink() or (empty.is_dir() and any(empty.iterdir())):
            return
        if any(entry.name not in _STARTING or entry.is_symlink() or not entry.is_file() for entry in found):
            return
        for file in found:
            file.unlink()
        with suppress(OSError):  # a folder that is not there, or not empty
            empty.rmdir()
        with suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"`{folder}` cannot be made ({reason}): choose another `default_root_dir`.") from error


def agreed(trainer: Trainer, choose: Callable[[], Path]) -> Path:
    """The folder that the first process of a run chooses, on all of them, before they train together.

    Lightning's own launcher starts the others with this process's environment, where they find it. Processes that
    torchrun or a cluster started all at once are connected for it.

    Raises:
        OSError: The first process could not make it; raised on all.
    """
    if (folder := handed_down()) is not None:
        return folder
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or cluster is None or not cluster.creates_processes_externally:
        folder = choose()
        os.environ[_HANDED_DOWN] = f"{os.getpid()} {folder.absolute()}"
        return folder
    trainer.strategy.setup_environment()
    problem = None
    if trainer.is_global_zero:
        try:
            folder = choose()
        except OSError as error:
            problem = str(error)
    folder, problem = trainer.strategy.broadcast((folder, problem))
    if folder is None:
        raise OSError(problem)
    return folder


def handed_down() -> Path | None:
    """The run that the process which started this one has chosen, if it did and this is not the first of a run."""
    process, _, folder = os.environ.get(_HANDED_DOWN, "").partition(" ")
    if is_first() or process != str(os.getppid()):
        return None
    return Path(folder)


def forget_handed_down() -> None:
    """Tell processes that this one starts from now on nothing of a run."""
    os.environ.pop(_HANDED_DOWN, None)


def is_first() -> bool:
    """Whether this is the first process of a run, as far as its environment says."""
    return getattr(rank_zero_only, "rank", 0) == 0


def refuse_foreign_logs(logger: Logger, root: Path, ours: bool) -> None:
    """Refuse a logger that would write over files of somebody else, or among the runs.

    Args:
        logger: One of the user's.
        root: Where the runs are.
        ours: The run that is resumed had this logger too; what it has logged so far is kept in ``metrics_0.csv`` and
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
    """The run that ``ckpt_path: last`` means: the newest ``version_N`` in a folder.

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
    """The run that a folder is, or whose ``checkpoints`` it is, or the newest of those in it; else nothing."""
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
    """Let a logger that begins anew leave what was measured before the interruption in ``metrics_0.csv`` and so on."""
    metrics = run / "metrics.csv"
    if metrics.exists():
        number = max((number_of(path.with_suffix(""), "metrics") for path in run.glob("metrics_*.csv")), default=-1)
        metrics.rename(run / f"metrics_{number + 1}.csv")


def saved_config(run: Path | None, checkpoint: Path) -> Path | None:
    """The configuration that a run, or else the run of a checkpoint, was started with, if it is there."""
    if run is None and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
    found = [] if run is None else [run / "config.yaml", *sorted(run.glob("partition_*/version_*/config.yaml"))]
    return next((path for path in found if path.exists()), None)


def refuse_changes(saved: Path | None, current: str, allowed: bool) -> list[str]:
    """Compare the configuration of a run that resumes with the saved one, and show what differs.

    Args:
        saved: The ``config.yaml`` of the run; nothing is compared if there is none.
        current: The configuration of this run as yaml.
        allowed: Go on nevertheless.

    Returns:
        The names of the options that differ.

    Raises:
        ValueError: They differ, and that was not allowed.
    """
    if saved is None:
        return []
    old, new = (_flat(yaml.safe_load(text)) for text in (saved.read_text(encoding="utf-8"), current))
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n) and not n.startswith(_IGNORED)]
    if not names:
        return []
    table = Table("option", "checkpoint", "this run", "in force", title="Changed since the checkpoint")
    for name in names:
        restored = name.startswith(_RESTORED)  # Lightning restores both as they were
        table.add_row(name, *(str(values.get(name)) for values in (old, new, old if restored else new)))
    Console().print(table)
    if not allowed:
        raise ValueError(
            f"The configuration differs from that of the run to resume in {', '.join(names)}: undo that, or add "
            "--allow-changes."
        )
    return names


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def number_of(folder: Path, stem: str = "version") -> int:
    """The N of ``version_N``, or -1."""
    found = re.fullmatch(rf"{stem}_([0-9]+)", folder.name)
    return int(found[1]) if found else -1
