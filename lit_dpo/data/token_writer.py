"""Rows into a file of encoded rows, block by block as they come: a kill costs the block under way."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lit_dpo.checkpoints.locks import lock
from lit_dpo.data.encode import Encoded
from lit_dpo.data.load import EncodedRow
from lit_dpo.data.places import split_place
from lit_dpo.data.token_blocks import Array, Block, enough, pack, record
from lit_dpo.data.token_store import Names, TokenStore, map_file
from lit_dpo.pairs import PairBatch
from lit_dpo.references.table import content_keys

FLAGS = [field.name for field in fields(Encoded) if isinstance(field.default, int)]  # small numbers and truth values
_BITS = 4  # of each
_DIGEST = 16  # bytes of a row's hash


class TokenWriter:
    """Takes encoded rows in their order; in the end it is a `TokenStore` of them.

    Blocks wait in memory until there are `worth` rows, and then go to a new file in the folder. As long as the blocks
    are those of a file that is there already, nothing is written at all.

    Args:
        folder: Where the file goes; `None` keeps all in memory.
        name: What its name begins with; it ends in `.part` until `finish`.
        seal: What the file belongs to; see `pack`.
        follow: Files whose rows may be those to come.
        worth: Rows that are worth a file.

    Attributes:
        path: The file that is being written, once there is one.
        problem: Why no file is written, if one should be.
    """

    def __init__(
        self,
        folder: Path | None = None,
        name: str = "",
        seal: bytes = b"",
        follow: Sequence[TokenStore] = (),
        worth: int = 0,
    ) -> None:
        self._folder, self._name, self._seal, self._worth = folder, name, seal, worth
        self._follow = list(follow)
        self._rows: list[tuple[EncodedRow, bytes]] = []
        self._blocks: list[Block] = []
        self._packed_rows = 0
        self._waiting, self._written = bytearray(), 0
        self._file: BinaryIO | None = None
        self._sources: dict[str, int] = {}
        self._places: dict[tuple[str, ...], int] = {}
        self._values: list[str] = []
        self.path: Path | None = None
        self.problem: OSError | None = None

    def __len__(self) -> int:
        return self._packed_rows + len(self._rows)

    def append(self, row: EncodedRow, key: bytes = bytes(16)) -> None:
        """One more row.

        Args:
            row: All rows have numbers of the same columns.
            key: Of what was encoded, for later runs to find it by; 16 bytes.
        """
        if not len(self):
            self._values = sorted(row.values)
        self._rows.append((row, key))
        if len(self._rows) >= enough(len(self)):
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        records, ids = self._packed()
        content, block = pack(records, ids, self._seal)
        self._rows = []
        before = self._follow
        self._follow = [store for store in before if self._is_next(store, block)]
        if before and not self._follow:  # the rows go another way now
            for known in before[0].blocks[: len(self._blocks)]:
                self._keep(before[0].bytes_of(known))
        start = self._blocks[-1].end if self._blocks else 0
        self._blocks.append(block._replace(start=start))
        self._packed_rows += block.rows
        if not self._follow:
            self._keep(content)

    def _is_next(self, store: TokenStore, block: Block) -> bool:
        number = len(self._blocks)
        return number < len(store.blocks) and store.blocks[number][1:] == block[1:]

    def _keep(self, content: bytes) -> None:
        """A block behind those that are kept so far."""
        self._waiting += content
        if self._folder is None or self.problem or len(self) < self._worth:
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                handle, path = tempfile.mkstemp(prefix=f"{self._name}.", suffix=".part", dir=self._folder)
                self._file, self.path = os.fdopen(handle, "w+b", buffering=0), Path(path)
                lock(self._file)
            _write(self._file, self._waiting)
            self._written += len(self._waiting)
            self._waiting = bytearray()
        except OSError as error:  # of a full disk: in memory then
            self.problem = error
            if self._file is not None and self.path is not None:
                self._file.seek(0)
                self._waiting = bytearray(self._file.read(self._written)) + self._waiting
                self.abandon()
                self.path.unlink(missing_ok=True)
                self.path = None

    def finish(self) -> TokenStore:
        """The rows: those of a file that is there already, of the new file (still a `.part`), or in memory."""
        self._flush()
        names = Names(list(self._sources), list(self._places), self._values)
        for store in self._follow:
            # A part is not taken over, as another process may still write to it.
            whole = store.path is not None and store.path.suffix != ".part" and store.size == len(store.content)
            if whole and len(store.blocks) == len(self._blocks):
                return TokenStore(store.content, store.blocks, names, store.path)
        for known in self._follow[0].blocks[: len(self._blocks)] if self._follow else ():
            self._keep(self._follow[0].bytes_of(known))
        self._follow = []
        if self.path is None or self._file is None:
            return TokenStore(self._waiting, self._blocks, names)
        os.fsync(self._file.fileno())
        return TokenStore(map_file(self.path), self._blocks, names, self.path)

    def abandon(self) -> None:
        """Write no more; what is in the file stays for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _packed(self) -> tuple[Array, Array]:
        """The rows as records and token ids."""
        rows = [row for row, _ in self._rows]
        found = np.zeros(len(rows), record(len(self._values)))
        parts = [
            [np.array(part, "<i4") for part in (row.encoded.prompt, row.encoded.chosen, row.encoded.rejected)]
            for row in rows
        ]
        ids = np.concatenate([part for three in parts for part in three])
        found["lengths"] = [[len(part) for part in three] for three in parts]
        plain = [digest(three) for three in parts]
        found["plain"] = _words(plain)
        found["key"] = _words([key for _, key in self._rows])
        found["prompt"] = _words([row.encoded.prompt_key.ljust(16, b"\0") for row in rows])
        found["flags"] = [flags(row.encoded) for row in rows]
        found["source"] = [self._sources.setdefault(row.source, len(self._sources)) for row in rows]
        places = [split_place(row.row) for row in rows]
        found["place"] = [self._places.setdefault(texts, len(self._places)) for texts, _ in places]
        found["numbers"] = [numbers for _, numbers in places]
        found["values"] = np.array([[row.values[name] for name in self._values] for row in rows]).reshape(len(rows), -1)
        found["digest"] = found["plain"]
        if self._values:
            numbered = zip(parts, found["values"].tolist(), strict=True)
            found["digest"] = _words([digest(three, dict(zip(self._values, v, strict=True))) for three, v in numbered])
        starts = np.cumsum([0, *found["lengths"].sum(1)[:-1]])
        found["largest"] = np.maximum.reduceat(np.where(ids < 0, ~ids, ids), starts)
        lengths = torch.from_numpy(found["lengths"].astype(np.int64))
        batch = PairBatch.from_tokens(torch.from_numpy(ids), lengths, torch.arange(len(rows)))
        found["content"] = content_keys(batch).numpy()
        return found, ids


def digest(parts: Sequence[Array], numbers: Mapping[str, float] | None = None) -> bytes:
    """A hash of a row's token ids, their boundaries, and its numbers with their columns' names; 16 bytes.

    Args:
        parts: Token ids of prompt, chosen and rejected, int32.
        numbers: By column name, in the order of the names.
    """
    found = hashlib.blake2b(str([len(part) for part in parts]).encode(), digest_size=_DIGEST)
    for part in parts:
        found.update(part.tobytes())
    for item in (numbers or {}).items():
        found.update(repr(item).encode())
    return found.digest()


def flags(encoded: Encoded) -> int:
    """What a record keeps of the small numbers of a row."""
    return sum(min(int(getattr(encoded, name)), 15) << (_BITS * place) for place, name in enumerate(FLAGS))


def of_flags(kept: int) -> dict[str, int | bool]:
    """The small numbers of a row, by the names of `Encoded`'s fields."""
    defaults = {field.name: field.default for field in fields(Encoded)}
    numbers = {name: (kept >> (_BITS * place)) & 15 for place, name in enumerate(FLAGS)}
    return {name: bool(number) if isinstance(defaults[name], bool) else number for name, number in numbers.items()}


def _words(hashes: Sequence[bytes]) -> Array:
    """Hashes of 16 bytes as pairs of numbers, shape `(n, 2)`."""
    return np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)


def _write(file: BinaryIO, content: bytes | bytearray) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
