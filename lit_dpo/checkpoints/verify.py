"""Whether a checkpoint is what was written: manifests with sums."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.checkpoints.durable import sync_files, write_json
from lit_dpo.checkpoints.shards import SHARDS_META, check_form
from lit_dpo.files import read_json, refuse_special


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


def is_sound(path: Path) -> bool:
    """Whether there is a checkpoint in which no damage is found."""
    return path.exists() and _problem(path) is None


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.json")


def write_shards_manifest(folder: Path) -> None:
    """Write the manifest of a folder of shards; only for whoever has just saved it, when all processes have ended."""
    sync_files(folder)
    sums = {str(file.relative_to(folder)): _sum_of_file(file) for file in _files(folder)}
    write_json(manifest_of(folder), {"format": 1, "sha256": sums})


def _known_sums(manifest: Path) -> list[str]:
    """Sums that a manifest accepts: of the newest file, and of the one before it (for a crash between two renames)."""
    content = read_json(manifest)
    return [content["sha256"], *([content["previous"]] if content.get("previous") else [])]


def _sum_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file != manifest_of(folder))


_BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError)  # of an encrypted part, too


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    manifest = manifest_of(path)
    try:
        if path.is_dir():
            return _problem_of_shards(path)
        refuse_special(path)
        if manifest.exists():
            return (
                None if _sum_of_file(path) in _known_sums(manifest) else "its SHA-256 sum is not that of its manifest"
            )
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f"the part {broken} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError, *_BAD_ZIP) as error:
        return " ".join(str(error).split()) or type(error).__name__


def _problem_of_shards(folder: Path) -> str | None:
    manifest = manifest_of(folder)
    if not (folder / SHARDS_META).exists():
        return f"it has no `{SHARDS_META}`, so its writing did not come to an end"
    if not manifest.exists():
        check_form(folder)
        return None
    expected = read_json(manifest)["sha256"]
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
