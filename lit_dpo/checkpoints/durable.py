"""The one way to write what a crash must not spoil: whole beside its place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replace_file(target: Path, private: bool = False) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: a reader sees the old one or the new one, also after a power cut.

    Args:
        target: The file; what stands there is replaced at the end, and left as it is on an error.
        private: Only its owner may read it.

    Raises:
        OSError: It cannot be written. Nothing is left of what was.
    """
    forget_parts_of_the_dead(target)
    with part_beside(target) as part:
        with new_file(part, private) as file:
            yield file
        put(part, target)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which appears under its own name at the end, whole, or not at all.

    Args:
        target: Where; only an empty folder may stand there.

    Raises:
        OSError: It cannot be made, or something stands there. Nothing is left of what was written.
    """
    with part_beside(target) as part:
        part.mkdir()
        yield part
        sync_files(part)
        if target.exists():
            target.rmdir()
        put(part, target)


@contextmanager
def part_beside(target: Path) -> Iterator[Path]:
    """A name beside a file or folder, to write it under; what stands there in the end is removed.

    No other writer uses the name, and it says which process of which machine does.
    """
    part = target.with_name(f"{_stem(target)}{os.getpid()}.{secrets.token_hex(8)}.part")
    if os.path.lexists(part):
        raise FileExistsError(f"`{part}` exists already: remove it.")
    try:
        yield part
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A file that was not there, on the disk when it is closed without an error."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def put(part: Path, target: Path) -> None:
    """Rename a finished file or folder into its place, so that a power cut does not undo it."""
    os.replace(part, target)
    sync_folder(target.parent)


def forget_parts_of_the_dead(target: Path) -> None:
    """Remove what processes of this machine had written of a file when they were killed."""
    for part in target.parent.glob(f"{glob.escape(_stem(target))}*.part"):
        found = re.fullmatch(r"(\d+)(\.[0-9a-f]{16})?\.part", part.name.removeprefix(_stem(target)))
        if found and part.is_file() and not _is_alive(int(found[1])):
            part.unlink(missing_ok=True)


def _stem(target: Path) -> str:
    """How the names of a file's parts begin, those that this machine writes."""
    return f".{target.name}.{socket.gethostname()}-"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


@contextmanager
def naming(folder: Path, kept: str) -> Iterator[None]:
    """Say in one sentence where a file could not be written for want of room.

    Args:
        folder: Where it was to go.
        kept: What is not lost, such as `what was judged is kept`.

    Raises:
        OSError: The disk is full, or a file may not grow.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"`{folder}` cannot be written to ({error.strerror}): make room and go on; {kept}.") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(content).encode())


def sync_files(folder: Path) -> None:
    """Have every file of a folder on the disk before this returns."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_unwritable_file(path: Path) -> None:
    """Find out now, and not after hours, that a file could not be made; nothing is left.

    Args:
        path: The file; folders above it need not exist yet.

    Raises:
        OSError: The nearest folder that exists cannot be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"`{path}` cannot be written ({error.strerror}): name a file in another folder.") from error


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
