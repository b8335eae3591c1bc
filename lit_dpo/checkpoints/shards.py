"""Checkpoints that are folders of shards, read without running what somebody may have put into them."""

from __future__ import annotations

import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from lit_dpo.files import refuse_special

SHARDS_META = "meta.pt"
"""Lightning's own name for the file that makes a folder of shards a checkpoint."""
_GROUP = 1 << 28  # bytes of tensors to read at a time

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_INDEX_TYPES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *((_METADATA, "_MEM_FORMAT_ENCODING"), (_FILESYSTEM, "_StorageInfo"), (_FILESYSTEM, "_StoragePrefix")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def read_shards(folder: Path, prefix: str) -> dict[str, Any]:
    """Read a checkpoint that is a folder of shards into one process, of its tensors only those under a prefix.

    Args:
        folder: Written by a strategy that shards.
        prefix: How the names of the tensors to read begin, `state_dict.policy.` for the policy's.

    Returns:
        The content as a single file would have it.

    Raises:
        pickle.UnpicklingError: Its index names anything but the few types that an index is made of.
        ValueError: Its index, or a shard, is damaged or forged.
    """
    refuse_special(folder / SHARDS_META, links=False)
    content: dict[str, Any] = torch.load(folder / SHARDS_META, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"`{folder / SHARDS_META}` holds no checkpoint.")
    reader = _SafeReader(folder)
    names = [name for name in reader.read_metadata().state_dict_metadata if name.startswith(prefix)]
    content["state_dict"] = {n.removeprefix("state_dict."): t for n, t in _read(reader, names).items()}
    return content


def shard_tensors(folder: Path) -> Iterator[list[tuple[str, Tensor]]]:
    """Every tensor of a folder of shards, some at a time, so that they need not all be in memory."""
    reader = _SafeReader(folder)
    index = reader.read_metadata().state_dict_metadata
    group: list[str] = []
    for name, entry in index.items():
        group.append(name)
        if isinstance(entry, TensorStorageMetadata) and sum(_bytes(index[n]) for n in group) > _GROUP:
            yield list(_read(reader, group).items())
            group = []
    yield list(_read(reader, group).items())


def check_index(folder: Path) -> None:
    """Refuse a folder of shards that would run code when PyTorch loads it: its index, and what is no tensor in it.

    Raises:
        pickle.UnpicklingError: One of these names anything but plain values.
        ValueError: Its index is damaged, or names what is no regular file of this folder.
    """
    metadata = _SafeReader(folder).read_metadata()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


def check_form(folder: Path) -> None:
    """What can be said of a folder of shards without sums: that nothing of it is cut off.

    Raises:
        pickle.UnpicklingError: Its index is cut off or forged.
        ValueError: Another part of it is.
        OSError: A part of it cannot be read.
    """
    refuse_special(folder / SHARDS_META, links=False)
    with zipfile.ZipFile(folder / SHARDS_META) as archive:
        if broken := archive.testzip():
            raise ValueError(f"the part {broken} of `{SHARDS_META}` has another checksum")
    _SafeReader(folder).read_metadata()


def _read(reader: FileSystemReader, names: list[str]) -> dict[str, Tensor]:
    """These entries, those of them that are tensors."""
    index = reader.read_metadata().state_dict_metadata
    entries = {name: entry for name in names if isinstance(entry := index[name], TensorStorageMetadata)}
    state: dict[str, Any] = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    if not state:
        return state
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*intent is to load in a single process.*")  # it is
            load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # which is no Exception
        reason = " ".join(str(next(iter(error.failures.values()), error)).split())[:200]
        raise ValueError(f"The shards of `{reader.path}` are damaged ({reason}).") from error
    return state


def _bytes(entry: Any) -> int:
    if not isinstance(entry, TensorStorageMetadata):
        return 0
    return math.prod(entry.size) * entry.properties.dtype.itemsize


class _SafeReader(FileSystemReader):
    """PyTorch's reader, except that the index, which is a pickle, may only name what an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        refuse_special(folder / ".metadata", links=False)
        with (folder / ".metadata").open("rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
            except (pickle.UnpicklingError, OSError):
                raise
            except Exception as error:  # whatever a cut or forged pickle comes to
                raise pickle.UnpicklingError(f"the index of the shards in `{folder}` is cut off or forged") from error
        _check_metadata(folder, metadata)
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _check_metadata(folder: Path, metadata: Any) -> None:
    """Refuse an index whose entries lie anywhere but in regular files of the folder itself, or are none.

    Raises:
        ValueError: Names the entry.
    """
    entries, places = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if type(metadata) is not Metadata or not isinstance(entries, dict) or not isinstance(places, Mapping):
        raise ValueError(f"`{folder}` has no usable index of its shards")
    sizes: dict[str, int] = {}
    for index, place in places.items():
        name = getattr(place, "relative_path", None)
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo) or not isinstance(name, str):
            raise ValueError(f"`{folder}` has no usable index of its shards")
        if name not in sizes:
            if name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"the index of `{folder}` names `{name}`, which is no file of that folder")
            refuse_special(folder / name, links=False)
            sizes[name] = (folder / name).stat().st_size
        numbers = (place.offset, place.length)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or sum(numbers) > sizes[name]:
            raise ValueError(f"`{name}` in `{folder}` is shorter than its index says")
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        size, properties = getattr(entry, "size", None), getattr(entry, "properties", None)
        sound = isinstance(entry, TensorStorageMetadata) and isinstance(size, torch.Size) and isinstance(name, str)
        if not sound or not isinstance(getattr(properties, "dtype", None), torch.dtype):
            raise ValueError(f"`{folder}` has no usable index of its shards")
        if min(entry.size, default=0) < 0 or _bytes(entry) > sum(sizes.values()):
            raise ValueError(f"the index of `{folder}` says that `{name}` is larger than all of its files")


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler for the types of a shard index alone."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _INDEX_TYPES
        allowed |= module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not allowed:
            raise pickle.UnpicklingError(f"Weights only load failed: a shard index may not name {module}.{name}.")
        return super().find_class(module, name)
