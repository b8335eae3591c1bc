"""Checkpoint files that a crash cannot spoil: written whole beside their place, and checked when they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.checkpoints.content import check_content
from lit_dpo.checkpoints.durable import forget_parts_of_the_dead, new_file, part_beside, put, write_json
from lit_dpo.checkpoints.shards import SHARDS_META
from lit_dpo.checkpoints.verify import _known_sums, _problem, _sum_of_file, manifest_of, verify

TO_RESUME_FROM = ("last.ckpt", "previous.ckpt")
"""Names of the checkpoints to resume from, the newer one first."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoints as Lightning does, but never loses one.

    A checkpoint is written to a hidden file in its own folder, flushed to the disk, read back, and only then renamed
    into its place; until then the previous one stands there. A manifest beside it, `<name>.json`, holds the SHA-256
    sum that loading checks. Loading never runs code: `weights_only=True`, always. (Remote paths, with `://`, are
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
        written = _Hashed()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            forget_parts_of_the_dead(target)
            with part_beside(target) as part:
                with new_file(part) as written.file:
                    torch.save(checkpoint, written)  # type: ignore[arg-type]  # it needs to be written to, no more
                if _sum_of_file(part) != written.sum.hexdigest():
                    raise OSError("what was written does not read back")
                _commit(part, target, written.sum.hexdigest())
        except (OSError, RuntimeError) as error:  # torch turns an error of the disk into a RuntimeError
            raise _cannot_save(target, written, error) from error

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
        check_content(content, Path(path))
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


def keep_as(path: Path, other: Path) -> None:
    """Let a sound checkpoint stand under a second name too, in the place of what stood there; one that is not, not.

    A folder of shards is moved, so that until the next save only the second name stands; a damaged one is removed. One
    without a manifest, as a crash right after the shards leaves it, is not vouched for: it gets none now, and takes the
    place of nothing sound.
    """
    if path.is_dir():
        unproven = not manifest_of(path).exists() and other.exists() and _problem(other) is None
        if unproven or _problem(path) is not None:
            shutil.rmtree(path)
            return
        _remove(other)
        path.rename(other)
        return
    if not manifest_of(path).exists() or _problem(path) is not None:
        return  # what stands there under the second name may be the only sound one
    if other.is_dir():
        _remove(other)
    forget_parts_of_the_dead(other)
    with part_beside(other) as part:
        try:
            os.link(path, part)
        except OSError:  # a file system without links
            with path.open("rb") as source, new_file(part) as copy:
                shutil.copyfileobj(source, copy)
        _commit(part, other, _sum_of_file(path))


def _remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, and its manifest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        manifest_of(path).unlink(missing_ok=True)


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


def _commit(part: Path, target: Path, new: str) -> None:
    """Rename a finished file into its place. At every moment the manifest knows the file that stands there."""
    manifest = manifest_of(target)
    old = _sum_of_file(target) if target.exists() else None
    try:
        known = _known_sums(manifest) if manifest.exists() else [old]
    except (OSError, ValueError, KeyError):
        known = []
    if old not in known:
        old = None  # what stands there is damaged, and must not be vouched for
    write_json(manifest, {"format": 1, "sha256": new, "previous": old})
    put(part, target)


def _cannot_save(target: Path, written: _Hashed, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).split(" Exception raised from")[0]
    folder = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    kept = "what stood there before is untouched" if target.exists() else "nothing was kept"
    return OSError(
        f"The checkpoint `{target}` cannot be written ({reason}), {written.bytes:,} bytes into it, with {free:,} bytes "
        f"free; {kept}. Make room, or set another folder, and resume."
    )
