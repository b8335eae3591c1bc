"""The folder of a run: which one to go on in, and whether the configuration is still the one it was started with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lit_dpo.checkpoints import verify
from lit_dpo.shards import SHARDS_META, check_index

_KEPT = ("last.ckpt", "previous.ckpt")
_IGNORED = ("ckpt_path", "predictions", "threads", "trainer.default_root_dir")
_RESTORED = ("model.optimizer", "model.lr_scheduler")


def newest_run(root: Path) -> Path:
    """The run that ``ckpt_path: last`` means: the newest ``version_N`` in a folder.

    Raises:
        FileNotFoundError: There is none, or it holds nothing to resume from.
    """
    runs = sorted((run for run in root.glob("version_*") if run.is_dir()), key=_number)
    if runs and (last_checkpoint(runs[-1]) or is_stepwise(runs[-1])):
        return runs[-1]
    if not runs:
        raise FileNotFoundError(f"`ckpt_path: last`: no run is in `{root}`. Leave `ckpt_path` out to start one.")
    older = [path for run in runs[:-1] if (path := last_checkpoint(run))]
    hint = f"name one, such as `{older[-1]}`, or leave" if older else "leave"
    raise FileNotFoundError(
        f"`ckpt_path: last`: the newest run, `{runs[-1]}`, has no checkpoint yet; {hint} `ckpt_path` out to start anew."
    )


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, of its last partition if it has several.

    It is the one before the last, if a crash left no last one (of shards, it can).
    """
    parts = sorted(run.glob("partition_*"), key=lambda part: int(part.name.rpartition("_")[2]), reverse=True)
    folders = [run / "checkpoints", *(f for part in parts for f in sorted(part.glob("version_*/checkpoints")))]
    return next((path for folder in folders for name in _KEPT if (path := folder / name).exists()), None)


def is_stepwise(run: Path) -> bool:
    """Whether a run's folder holds partitions."""
    return (run / "partition_0").is_dir()


def run_of(checkpoint: Path, root: Path) -> Path | None:
    """The run in `root` that a checkpoint belongs to, if it does; a fit that resumes from it goes on there."""
    folder = checkpoint.parent
    belongs = folder.name == "checkpoints" and folder.parent.parent.resolve() == root.resolve()
    return folder.parent if belongs and re.fullmatch(r"version_\d+", folder.parent.name) else None


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
        number = len(list(run.glob("metrics_*.csv")))
        metrics.rename(run / f"metrics_{number}.csv")


def saved_config(run: Path | None, checkpoint: Path) -> Path | None:
    """The configuration that a run, or else the run of a checkpoint, was started with, if it is there."""
    if run is None and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
    found = [] if run is None else [run / "config.yaml", *sorted(run.glob("partition_*/version_*/config.yaml"))]
    return next((path for path in found if path.exists()), None)


def new_version(root: Path) -> Path:
    """The first of ``root/version_0``, ``root/version_1``, ... that does not exist."""
    number = 0
    while (root / f"version_{number}").exists():
        number += 1
    return root / f"version_{number}"


def discard(folder: Path) -> None:
    """Remove the folder of a run that failed before it had anything to keep, and its parent if that is empty then."""
    kept = any(f.name in ("metrics.csv", "DONE") or f.suffix in (".ckpt", ".safetensors") for f in folder.rglob("*"))
    if folder.is_dir() and not kept:
        shutil.rmtree(folder)
        with suppress(OSError):
            folder.parent.rmdir()


def refuse_changes(saved: Path | None, current: str, allowed: bool) -> None:
    """Compare the configuration of a run that resumes with the saved one, and show what differs.

    Args:
        saved: The ``config.yaml`` of the run; nothing is compared if there is none.
        current: The configuration of this run as yaml.
        allowed: Go on nevertheless.

    Raises:
        ValueError: They differ, and that was not allowed.
    """
    if saved is None:
        return
    old, new = (_flat(yaml.safe_load(text)) for text in (saved.read_text(encoding="utf-8"), current))
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n) and not n.startswith(_IGNORED)]
    if not names:
        return
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


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def _number(run: Path) -> int:
    found = re.fullmatch(r"version_(\d+)", run.name)
    return int(found[1]) if found else -1
