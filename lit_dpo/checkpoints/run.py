"""The folder of a run: making it, finding it again, and what is where in it."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_dpo.checkpoints.claim import is_first, number_of
from lit_dpo.checkpoints.foreign import own_path
from lit_dpo.checkpoints.io import TO_RESUME_FROM
from lit_dpo.checkpoints.shards import SHARDS_META, check_index
from lit_dpo.checkpoints.verify import verify

_LOGGED = ("metrics.csv", "hparams.yaml")  # what Lightning's CSVLogger writes over
_STARTING = ("config.yaml", "hparams.yaml")  # what a run writes before it has anything to keep


@dataclass(frozen=True)
class Run:
    """The folder of a run.

    Args:
        folder: Usually `version_N`, with `config.yaml`, `metrics.csv` and `checkpoints`. A stepwise run has a folder
            `partition_N` for each partition, which holds these of its own.
        made: Folders that this very process made for it, the outermost first.
    """

    folder: Path
    made: tuple[Path, ...] = field(default=(), compare=False)

    # -- making it ------------------------------------------------------------------------------------------------

    @classmethod
    def make(cls, folder: Path) -> Run:
        """A run in this folder, which is made with those above it if it is not there.

        Raises:
            OSError: It cannot be made.
        """
        made = []
        for missing in reversed([f for f in (folder, *folder.parents) if not f.is_dir()]):
            with suppress(FileExistsError):  # another process was faster, or something is in the way
                _make(missing)
                made.append(missing)
        if not folder.is_dir():
            raise OSError(f"`{folder}` is no folder: choose another `default_root_dir`.")
        return cls(folder, tuple(made))

    @classmethod
    def claim(cls, root: Path) -> Run:
        """A new run, `version_N` after the highest in `root`; two runs never get the same folder.

        Gaps stay gaps, so the highest number is always the newest run.

        Raises:
            OSError: It cannot be made.
        """
        above = cls.make(root).made
        while True:
            folder = root / f"version_{max(map(number_of, root.iterdir()), default=-1) + 1}"
            with suppress(FileExistsError):  # another process was faster
                _make(folder)
                return cls(folder, (*above, folder))

    def abandon(self) -> None:
        """Remove the folder of a run that failed before it had anything to keep.

        Only if this process made it, and nothing is in it but what every run writes at its start. Nothing is removed
        recursively; anything else that stands there stays, and the folder with it.
        """
        if self.folder not in self.made:
            return
        empty = self.checkpoints
        found = [entry for entry in self.folder.iterdir() if entry != empty]
        if empty.is_symlink() or (empty.is_dir() and any(empty.iterdir())):
            return
        if any(entry.name not in _STARTING or entry.is_symlink() or not entry.is_file() for entry in found):
            return
        for file in found:
            file.unlink()
        with suppress(OSError):  # a folder that is not there, or not empty
            empty.rmdir()
        with suppress(OSError):
            for folder in reversed(self.made):
                folder.rmdir()

    # -- finding it -----------------------------------------------------------------------------------------------

    @classmethod
    def all_in(cls, root: Path) -> list[Run]:
        """The runs in a folder, the newest last."""
        folders = (folder for folder in root.glob("version_*") if folder.is_dir() and number_of(folder) >= 0)
        return [cls(folder) for folder in sorted(folders, key=number_of)]

    @classmethod
    def newest(cls, root: Path, what: str = "`ckpt_path: last`") -> Run:
        """The run that `ckpt_path: last` means: the newest `version_N` in a folder.

        Args:
            root: The folder.
            what: The option that asks, for the message.

        Raises:
            FileNotFoundError: There is none, or it holds nothing to resume from.
        """
        runs = cls.all_in(root)
        if not runs:
            raise FileNotFoundError(f"{what}: no run is in `{root}`. Leave `ckpt_path` out to start one.")
        if runs[-1].last or runs[-1].is_stepwise:
            return runs[-1]
        older = [path for run in runs[:-1] if (path := run.last)]
        hint = f"name one, such as `{older[-1]}`, or leave" if older else "leave"
        raise FileNotFoundError(
            f"{what}: the newest run, `{runs[-1].folder}`, has no checkpoint yet; {hint} `ckpt_path` out to start anew."
        )

    @classmethod
    def of(cls, checkpoint: Path) -> Run | None:
        """The run that a checkpoint belongs to, as its place says."""
        return cls(checkpoint.parent.parent) if checkpoint.parent.name == "checkpoints" else None

    @classmethod
    def named(cls, path: Path) -> Run | None:
        """The run that a folder is, or whose `checkpoints` it is, or the newest of those in it; else nothing.

        Raises:
            FileNotFoundError: It holds runs, and the newest has nothing to resume from.
        """
        if not path.is_dir() or path.suffix == ".ckpt" or (path / SHARDS_META).exists():
            return None
        if path.name == "checkpoints":
            return cls(path.parent)
        if cls(path).last is None and any(number_of(entry) >= 0 for entry in path.iterdir()):
            return cls.newest(path, f"`{path}`")
        return cls(path)

    def is_in(self, root: Path) -> bool:
        """Whether it is one of the numbered runs of a folder."""
        return number_of(self.folder) >= 0 and self.folder.parent.resolve() == root.resolve()

    # -- what is where --------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of its metrics, one line a measurement."""
        return self.folder / "metrics.csv"

    @property
    def partitions(self) -> list[Path]:
        """The folders of its partitions, in order; none unless it is stepwise."""
        found = (folder for folder in self.folder.glob("partition_*") if number_of(folder, "partition") >= 0)
        return sorted(found, key=lambda folder: number_of(folder, "partition"))

    @property
    def is_stepwise(self) -> bool:
        """Whether it holds partitions."""
        return (self.folder / "partition_0").is_dir()

    @property
    def config(self) -> Path | None:
        """The configuration that it was started with, if it is there."""
        inner = (path for part in self.partitions for path in sorted(part.glob("version_*/config.yaml")))
        return next((path for path in (self.folder / "config.yaml", *inner) if path.exists()), None)

    @property
    def last(self) -> Path | None:
        """Its last checkpoint, of its last partition if it has several.

        It is the one before the last, if a crash left no last one (of shards, it can).
        """
        inner = (folder for part in self.partitions[::-1] for folder in sorted(part.glob("version_*/checkpoints")))
        paths = (folder / name for folder in (self.checkpoints, *inner) for name in TO_RESUME_FROM)
        return next((path for path in paths if path.exists()), None)

    @property
    def best(self) -> Path | None:
        """Its best checkpoint, of its last partition if it has several, as its callback ranked it."""
        last = self.last
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

    def rotate_metrics(self) -> None:
        """Let a logger that begins anew leave what was measured so far in `metrics_0.csv` and so on."""
        if self.metrics.exists():
            older = (number_of(path.with_suffix(""), "metrics") for path in self.folder.glob("metrics_*.csv"))
            self.metrics.rename(self.folder / f"metrics_{max(older, default=-1) + 1}.csv")


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"`{folder}` cannot be made ({reason}): choose another `default_root_dir`.") from error


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
        Run(folder).rotate_metrics()
    taken = [] if ours or isinstance(logger, TensorBoardLogger) else [n for n in _LOGGED if os.path.lexists(folder / n)]
    if taken:
        raise FileExistsError(f"`{kind}` would write over `{folder / taken[0]}`: give it another `save_dir` or `name`.")


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
