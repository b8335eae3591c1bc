"""Encoded rows in one file that is mapped into memory: 4 bytes a token, and one fixed record a row."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lit_dpo.data.places import join_place
from lit_dpo.data.token_blocks import BLOCK, HEAD, MAGIC, Array, Block, Check, record
from lit_dpo.files import refuse_special

_RELEASE = 1024  # rows read before the pages that they touched are given back: a touched row maps up to 64 KiB more


@dataclass(frozen=True)
class Names:
    """What the numbers in the records stand for.

    Args:
        sources: Names of data sets.
        places: Texts around the numbers in rows' locations; see `lit_dpo.data.places`.
        values: Names of the rows' numbers.
    """

    sources: Sequence[str] = ()
    places: Sequence[tuple[str, ...]] = ()
    values: Sequence[str] = ()


@dataclass
class TokenStore:
    """Encoded rows, in a mapped file or in memory.

    Args:
        content: The bytes of the file.
        blocks: Those to use, in order.
        names: What the numbers in the records stand for.
        path: The file; `None` if the bytes are in memory.
        check: What the token ids of a block have to fulfil when they are first read; `None` if they are known to.

    Attributes:
        starts: Where the token ids of each row begin, in units of 4 bytes, shape `(rows,)` int64.
        lengths: Tokens of prompt, chosen and rejected, shape `(rows, 3)` int64.
    """

    content: mmap.mmap | bytes | bytearray
    blocks: Sequence[Block]
    names: Names = field(default_factory=Names)
    path: Path | None = None
    check: Check | None = None

    def __post_init__(self) -> None:
        self._words = np.frombuffer(self.content, "<i4", len(self.content) // 4) if self.blocks else np.empty(0, "<i4")
        self._touched = 0
        self._checked = np.full(len(self.blocks), self.check is None)
        self._by_key: tuple[Array, Array] | None = None
        self._firsts = [0, *accumulate(block.rows for block in self.blocks)]
        self.lengths: Array = self.column("lengths").astype(np.int64)
        total = self.lengths.sum(1)
        counts = [block.rows for block in self.blocks]
        first = np.repeat([block.ids // 4 for block in self.blocks], counts).astype(np.int64)
        before = np.repeat(np.cumsum([0, *(block.tokens for block in self.blocks)])[:-1], counts).astype(np.int64)
        self.starts: Array = first + (total.cumsum() - total) - before

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def size(self) -> int:
        """Bytes of the file that are used."""
        return self.blocks[-1].end if self.blocks else 0

    def column(self, name: str) -> Array:
        """One entry of every row's record, copied out of the file; shape `(rows, ...)`."""
        kind = record(self.blocks[0].values if self.blocks else 0)
        found = np.empty((len(self), *kind[name].shape), kind[name].base)
        for block, first in zip(self.blocks, self._firsts, strict=False):
            records = np.frombuffer(self.content, kind, block.rows, block.records)
            found[first : first + block.rows] = records[name]
            self._touch(block.rows)
        return found

    def find(self, keys: Array) -> Array:
        """Row numbers of keys, shape `(n,)`; -1 where no row has the key.

        Args:
            keys: As the records hold them, shape `(n, 2)`.
        """
        if self._by_key is None:
            known = self.column("key")
            order = known[:, 0].argsort(kind="stable")
            self._by_key = known[order], order
        known, order = self._by_key
        places = np.searchsorted(known[:, 0], keys[:, 0]).clip(max=len(known) - 1)
        there = (known[places] == keys).all(1) & keys.any(1)
        return np.where(there, order[places], -1)

    def record(self, row: int) -> Any:
        """The record of a row."""
        number = bisect_right(self._firsts, row) - 1
        block = self.blocks[number]
        kind = record(block.values)
        return np.frombuffer(self.content, kind, 1, block.records + (row - self._firsts[number]) * kind.itemsize)[0]

    def place(self, row: int) -> str:
        """The location of a row, such as `path/file.jsonl:17`."""
        found = self.record(row)
        return join_place(self.names.places[found["place"]], found["numbers"].tolist())

    def parts(self, row: int) -> list[Array]:
        """Token ids of prompt, chosen and rejected of a row, int32."""
        return np.split(self.ids([row]), self.lengths[row].cumsum()[:2])

    def ids(self, rows: Sequence[int]) -> Array:
        """Token ids of these rows one after the other, int32, copied out of the file.

        Raises:
            ValueError: The file is damaged.
        """
        if not self._checked.all():
            self._look_at(rows)
        sizes = self.lengths[rows].sum(1)
        spans = zip(self.starts[rows].tolist(), sizes.tolist(), strict=True)
        found = np.concatenate([self._words[start : start + size] for start, size in spans])
        self._touch(len(rows))
        return found

    def _look_at(self, rows: Sequence[int]) -> None:
        """Compare the blocks of these rows with their sums, once each."""
        assert self.check is not None
        for number in np.unique(np.searchsorted(self._firsts, rows, side="right") - 1).tolist():
            if self._checked[number]:
                continue
            block = self.blocks[number]
            if not self.check.passes(bytes(self.content[block.records : block.end]), block):
                raise ValueError(f"`{self.path}` is damaged: remove it, and start again to have its rows encoded anew.")
            self._checked[number] = True
            self._touch(block.rows)

    def bytes_of(self, block: Block) -> bytes:
        """A block as it stands in the file."""
        found = bytes(self.content[block.start : block.end])
        self._touch(block.rows)
        return found

    def _touch(self, rows: int) -> None:
        """Now and then let go of the pages that were touched.

        They stay in the system's cache, and count no more as this process's; read again, they are mapped again.
        """
        self._touched += rows
        if self._touched >= _RELEASE and isinstance(self.content, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            self.content.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that is spawned: the file's name in the place of its bytes."""
        if self.path is None:
            return TokenStore, (self.content, self.blocks, self.names)
        return _reopened, (self.path, self.blocks, self.names, self.check)


def _reopened(path: Path, blocks: Sequence[Block], names: Names, check: Check | None) -> TokenStore:
    content = map_file(path)
    heads = (content[block.start : block.records] for block in blocks)
    if any(HEAD.unpack(head)[1:] != block[1:] for head, block in zip(heads, blocks, strict=True)):
        raise ValueError(f"The token ids in `{path}` were replaced by another run: start this one again.")
    return TokenStore(content, blocks, names, path, check)


def map_file(path: Path) -> mmap.mmap:
    """A file, read-only.

    Raises:
        OSError: It cannot be read.
        ValueError: It is empty, or no regular file.
    """
    refuse_special(path)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)


def open_blocks(path: Path, seal: bytes, vocabulary: int, later: bool = False) -> tuple[TokenStore | None, bool]:
    """The rows of a file that are fit for use: those of the blocks before the first one that is torn or damaged.

    Every byte is read and compared with the sums, by all processors.

    Args:
        path: The file.
        seal: As in `pack`.
        vocabulary: Token ids are below it.
        later: Look at the records alone, and at each block as a whole when one of its rows is first read.

    Returns:
        The rows, none if there are none, and whether that is all of the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, or empty.
    """
    content, check = map_file(path), Check(seal, vocabulary)
    blocks: list[Block] = []
    place = 0
    while place + HEAD.size <= len(content):
        magic, rows, values, tokens, found = HEAD.unpack_from(content, place)
        block = Block(place, rows, values, tokens, found)
        first = blocks[0] if blocks else block
        if magic != MAGIC or not 0 < rows <= BLOCK or values != first.values or block.end > len(content):
            break
        blocks.append(block)
        place = block.end
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:

        def fit(block: Block) -> bool:
            end = block.ids if later else block.end
            if hasattr(os, "pread"):
                body = os.pread(file.fileno(), end - block.records, block.records)
            else:
                body = content[block.records : end]
            return check.fits(body, block) if later else check.passes(body, block)

        good = list(threads.map(fit, blocks))
    if False in good:
        blocks = blocks[: good.index(False)]
    store = TokenStore(content, blocks, path=path, check=check if later else None) if blocks else None
    return store, store is not None and store.size == len(content)


def names_of(given: Mapping[str, Any], store: TokenStore) -> Names:
    """The names in a header, if they are names for these rows.

    Raises:
        ValueError: They are not.
    """
    sources, places, values = (given.get(name) for name in ("sources", "places", "values"))
    for texts in (sources, values, *(places if isinstance(places, list) else [None])):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it has no names")
    assert isinstance(sources, list)
    assert isinstance(places, list)
    assert isinstance(values, list)
    limits = {"source": len(sources), "place": len(places)}
    numbers = {name: store.column(name) for name in limits}
    known = all(numbers[name].min() >= 0 and numbers[name].max() < limit for name, limit in limits.items())
    if not known or len(values) != store.blocks[0].values or not all(1 <= len(parts) <= 3 for parts in places):
        raise ValueError("its names do not fit its rows")
    return Names(sources, [tuple(parts) for parts in places], values)
