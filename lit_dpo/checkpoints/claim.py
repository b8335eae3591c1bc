"""Which folder a run has, settled by its first process for all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

_HANDED_DOWN = "LIT_DPO_RUN"


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
    connect(trainer.strategy)
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


def connect(strategy: Any) -> None:
    """Connect processes that were started all at once, before there is a module to train.

    `FSDP2Strategy` tells its module about the mesh of processes then, and does so again to the one that is trained.
    """
    strategy.connect(LightningModule())
    strategy.setup_environment()


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
