"""Checkpoints that are folders of shards, read without running what somebody may have put into them."""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

SHARDS_META = "meta.pt"
"""Lightning's own name for the file that makes a folder of shards a checkpoint."""

_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_TYPES = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def read_shards(folder: Path, prefix: str) -> dict[str, Any]:
    """Read a checkpoint that is a folder of shards into one process, of its tensors only those under a prefix.

    Args:
        folder: Written by a strategy that shards.
        prefix: Of the tensors' names, ``state_dict.policy.`` for the policy's.

    Returns:
        The content as a single file would have it.

    Raises:
        pickle.UnpicklingError: Its index names anything but the few types that an index is made of.
    """
    content: dict[str, Any] = torch.load(folder / SHARDS_META, map_location="cpu", weights_only=True)
    reader = _SafeReader(folder)
    index = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*intent is to load in a single process.*")  # it is
        load(state, storage_reader=reader, no_dist=True)
    content["state_dict"] = {name.removeprefix("state_dict."): tensor for name, tensor in state.items()}
    return content


def check_index(folder: Path) -> None:
    """Refuse a folder of shards that would run code when PyTorch loads it: its index, and what is no tensor in it.

    Raises:
        pickle.UnpicklingError: One of these names anything but plain values.
    """
    metadata = _SafeReader(folder).read_metadata()
    for index, place in (metadata.storage_data or {}).items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


class _SafeReader(FileSystemReader):
    """PyTorch's reader, except that the index, which is a pickle, may only name what an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"`{self.path}` has no usable index of its shards.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler for the types of a shard index alone."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _INDEX_TYPES
        allowed |= module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        allowed |= module in _INDEX_MODULES and isinstance(getattr(sys.modules.get(module), name, None), type)
        if not allowed:
            raise pickle.UnpicklingError(f"Weights only load failed: a shard index may not name {module}.{name}.")
        return super().find_class(module, name)
