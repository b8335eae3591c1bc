"""Checkpoint files that a crash cannot spoil: written whole beside their place, and checked when they are read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.shards import SHARDS_META

TO_RESUME_FROM = ("last.ckpt", "previous.ckpt")
"""Names of the checkpoints to resume from, the newer one first."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoints as Lightning does, but never loses one.

    A checkpoint is written to a hidden file in its own folder, flushed to the disk, read back, and only then renamed
    into its place; until then the previous one stands there. A manifest beside it, ``<name>.json``, holds the SHA-256
    sum that loading checks. Loading never runs code: ``weights_only=True``, always. (Remote paths, with ``://``, are
    Lightning's own business but for that.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint and its manifest.

        Raises:
            OSError: It cannot be written; names the path and the free space. What stood there before is untouched.
        """
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = _part_of(target)
        written = _Hashed()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _forget_parts_of_the_dead(target)
            with part.open("wb") as file:
                written.file = file
                torch.save(checkpoint, written)  # type: ignore[arg-type]  # it needs to be written to, no more
                file.flush()
                os.fsync(file.fileno())
            if _sum_of_file(part) != written.sum.hexdigest():
                raise OSError("what was written does not read back")
            _commit(part, target, written.sum.hexdigest())
        except (OSError, RuntimeError) as error:  # torch turns an error of the disk into a RuntimeError
            raise _cannot_save(target, written, error) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Check a checkpoint, then load it, as plain values and tensors alone.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged; names another one that is not.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        verify(Path(path))
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, then its manifest; a folder that is no checkpoint of shards stays."""
        path = str(path).removeprefix("local://").removeprefix("file://")
        if not _is_remote(path) and Path(path).is_dir() and not (Path(path) / SHARDS_META).exists():
            rank_zero_info(f"`{path}` is no checkpoint and stays.")
            return
        super().remove_checkpoint(path)
        if not _is_remote(path):
            manifest_of(Path(path)).unlink(missing_ok=True)


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def make_durable(trainer: Trainer) -> None:
    """Give a Trainer's strategy `DurableCheckpointIO`, unless it has a checkpoint plugin of the user's choice."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest; without one, at least check the archive's own sums.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged; the message names the newest one in its folder that is not.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint `{path}`.{_offer(path)}")
    problem = _problem(path)
    if problem is not None:
        raise ValueError(f"The checkpoint `{path}` is damaged ({problem}).{_offer(path)}")
    if not manifest_of(path).exists():
        rank_zero_info(f"`{path}` has no manifest beside it, so only its form could be checked.")


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.json")


def write_shards_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint that is a folder of shards, all of them written before."""
    sums = {str(file.relative_to(folder)): _sum_of_file(file) for file in _files(folder)}
    write_json(manifest_of(folder), {"format": 1, "sha256": sums})


def keep_as(path: Path, other: Path) -> None:
    """Let a sound checkpoint stand under a second name too, in the place of what stood there; one that is not, not.

    A folder of shards is moved, so that until the next save only the second name stands; an unfinished one is removed.
    """
    if path.is_dir():
        if _problem_of_shards(path) is not None:
            shutil.rmtree(path)
            return
        if not manifest_of(path).exists():  # a crash came between the shards and their manifest
            write_shards_manifest(path)
        _remove(other)
        path.rename(other)
        return
    if not manifest_of(path).exists() or _problem(path) is not None:
        return  # what stands there under the second name may be the only sound one
    if other.is_dir():
        _remove(other)
    part = _part_of(other)
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    _commit(part, other, _sum_of_file(path))


def _remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, and its manifest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        manifest_of(path).unlink(missing_ok=True)


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


# -- inside -----------------------------------------------------------------------------------------------------------


class _Hashed:
    """A file to write to that sums up what it is given."""

    def __init__(self) -> None:
        self.file: Any = None
        self.sum = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self.sum.update(data)
        self.bytes += len(data)
        count: int = self.file.write(data)
        return count

    def flush(self) -> None:
        self.file.flush()


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


def _commit(part: Path, target: Path, new: str) -> None:
    """Rename a finished file into its place. At every moment the manifest knows the file that stands there."""
    manifest = manifest_of(target)
    old = _sum_of_file(target) if target.exists() else None
    if manifest.exists() and old not in _known_sums(manifest):
        old = None  # what stands there is damaged, and must not be vouched for
    write_json(manifest, {"format": 1, "sha256": new, "previous": old})
    os.replace(part, target)
    _sync_folder(target.parent)


def _known_sums(manifest: Path) -> list[str]:
    """Sums that a manifest accepts: of the newest file, and of the one before it (for a crash between two renames)."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    return [content["sha256"], *([content["previous"]] if content.get("previous") else [])]


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


def _sum_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file != manifest_of(folder))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    manifest = manifest_of(path)
    try:
        if path.is_dir():
            return _problem_of_shards(path)
        if manifest.exists():
            return (
                None if _sum_of_file(path) in _known_sums(manifest) else "its SHA-256 sum is not that of its manifest"
            )
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f"the part {broken} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _problem_of_shards(folder: Path) -> str | None:
    manifest = manifest_of(folder)
    if not (folder / SHARDS_META).exists():
        return f"it has no `{SHARDS_META}`, so its writing did not come to an end"
    if not manifest.exists():
        return None
    expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    found = {str(file.relative_to(folder)): _sum_of_file(file) for file in _files(folder)}
    bad = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    return f"{', '.join(bad)}: not what the manifest says" if bad else None


def _offer(path: Path) -> str:
    """A sentence that names the newest good checkpoint in the same folder, if there is one."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path] if path.parent.is_dir() else []
    # `previous.ckpt` first, which was kept to resume from; then the newest.
    for other in sorted(others, key=lambda file: (file.name == "previous.ckpt", file.stat().st_mtime), reverse=True):
        if _problem(other) is None:
            return f" Resume from `{other}`."
    return " No other checkpoint is in its folder."


def _cannot_save(target: Path, written: _Hashed, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).split(" Exception raised from")[0]
    folder = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    kept = "what stood there before is untouched" if target.exists() else "nothing was kept"
    return OSError(
        f"The checkpoint `{target}` cannot be written ({reason}), {written.bytes:,} bytes into it, with {free:,} bytes "
        f"free; {kept}. Make room, or set another folder, and resume."
    )
