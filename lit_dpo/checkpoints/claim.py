"""A folder that a run makes for itself, on one process for all, and what may be removed from it again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

_STARTING = ("config.yaml", "hparams.yaml")  # what a run writes before it has anything to keep
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
        """Make the folder of a new run, `version_N` after the highest in `root`; two runs never get the same one.

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


def number_of(folder: Path, stem: str = "version") -> int:
    """The N of `version_N`, or -1."""
    found = re.fullmatch(rf"{stem}_([0-9]+)", folder.name)
    return int(found[1]) if found else -1
