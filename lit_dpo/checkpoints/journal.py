"""Blocks of tensors on disk, kept as they come: a kill costs the block under way."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_dpo.checkpoints.locks import lock
from lit_dpo.checkpoints.tensor_store import TensorStore

_HEAD = struct.Struct("<Q16s")  # of a block in a journal: its length, its sum


class Journal:
    """What a `TensorStore` will hold, written block by block as it is computed, so that a kill loses little.

    Every writer has a file of its own, which it keeps locked; so a process can tell the journals of others that still
    write from those that were left behind. A block carries a sum over its content and the store's identity, and what
    comes behind the first block that is torn or damaged is ignored.

    Args:
        store: What it belongs to.

    Raises:
        OSError: The folder cannot be written to.
    """

    def __init__(self, store: TensorStore) -> None:
        store.make_folder()
        self._store = store
        handle, path = tempfile.mkstemp(prefix=f"{store.key}.", suffix=".journal", dir=store.folder)
        self.path, self._file = Path(path), os.fdopen(handle, "wb")
        lock(self._file)

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one more block, down to the disk."""
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        self._file.write(_HEAD.pack(len(content), _sum(self._store, content)) + content)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the file as it is, for a later run."""
        with suppress(OSError):  # of a full disk, when what is left in the buffer cannot be written
            self._file.close()

    @staticmethod
    def read_all(store: TensorStore) -> tuple[list[dict[str, Tensor]], dict[Path, int]]:
        """The blocks of all journals of a store, and the files they are from with their sizes."""
        blocks, sizes = [], {}
        for path in sorted(store.folder.glob(f"{store.key}.*.journal")):
            with suppress(OSError):
                if path.is_file():
                    content = path.read_bytes()
                    blocks += list(_blocks(store, content))
                    sizes[path] = len(content)
        return blocks, sizes

    @staticmethod
    def clear(read: Mapping[Path, int]) -> None:
        """Remove journals that were read, unless someone still writes them or has written more since."""
        for path, size in read.items():
            with suppress(OSError), path.open("rb") as file:
                if lock(file) and os.fstat(file.fileno()).st_size == size:
                    path.unlink()


def _blocks(store: TensorStore, content: bytes) -> Iterator[dict[str, Tensor]]:
    place = 0
    while place + _HEAD.size <= len(content):
        length, expected = _HEAD.unpack_from(content, place)
        place += _HEAD.size
        block = content[place : place + length]
        place += length
        if len(block) != length or _sum(store, block) != expected:
            return
        try:
            yield load(block)
        except (ValueError, KeyError, SafetensorError):
            return


def _sum(store: TensorStore, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=store.key.encode()).digest()
