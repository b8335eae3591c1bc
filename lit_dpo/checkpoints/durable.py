"""Files and folders that a crash cannot spoil: written whole beside their place, flushed, renamed."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any


def _replace(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old file or the new one, never a part."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def refuse_unwritable(folder: Path, needed: int) -> None:
    """Find out now, and not after an hour of training, that a checkpoint could not be written.

    Args:
        folder: Where checkpoints will go.
        needed: Bytes of one.

    Raises:
        OSError: The folder cannot be written to, or the disk has less space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"Checkpoints cannot be written to `{folder}` ({reason}): choose another folder.") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"A checkpoint needs about {needed:,} bytes and `{folder}` has {free:,} free: make room, or choose "
            "another folder."
        )


def _part_of(target: Path) -> Path:
    """Where this process writes a file before it is renamed into its place; no other process does."""
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.part")


def _forget_parts_of_the_dead(target: Path) -> None:
    """Remove what processes of this machine had written of a file when they were killed."""
    for part in target.parent.glob(f"{glob.escape(f'.{target.name}.{socket.gethostname()}-')}*.part"):
        process = part.name.removesuffix(".part").rpartition("-")[2]
        if process.isdigit() and not _is_alive(int(process)):
            part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all, and to the disk before this returns."""
    part = _part_of(path)
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Have every file of a folder on the disk before this returns."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
