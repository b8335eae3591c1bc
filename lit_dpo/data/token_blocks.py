"""The format of a file of token ids: a sequence of blocks.

A block is a head, the records of up to `BLOCK` rows, and their token ids one after the other (a token that is not
scored as `~id`, below 0); the head says how many there are and carries a sum over them. So a file that was cut short by
a kill holds every block that was finished, and damage costs the block it is in. Nothing in a file is executed, and
every number in it that says where to read is checked before it is used.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024  # rows
HEAD = struct.Struct("<8sIIQ16s")  # magic, rows, numbers a row, tokens, sum
MAGIC = b"litdpo\0\1"

Array = NDArray[Any]


def record(values: int) -> np.dtype[Any]:
    """The layout of a row's record.

    Args:
        values: Numbers that each row has.
    """
    return np.dtype(
        [
            ("key", "<u8", 2),  # of what was encoded: prompt and completions as text or turns; 0 if it is not known
            ("prompt", "<u8", 2),  # of the prompt before it was cut
            ("digest", "<u8", 2),  # of token ids, boundaries and numbers
            ("plain", "<u8", 2),  # of token ids and boundaries
            ("content", "<i8", 2),  # of token ids and boundaries, as reference log-probs are found by
            ("lengths", "<i4", 3),  # tokens of prompt, chosen, rejected
            ("largest", "<i4"),  # of its token ids
            ("flags", "<u4"),  # 4 bits for each small number and truth value of `Encoded`
            ("source", "<i4"),  # number of the data set's name
            ("place", "<i4"),  # number of the text around the numbers in the row's location
            ("numbers", "<i8", 2),  # the last two numbers in the row's location
            ("values", "<f8", (values,)),
        ]
    )


class Block(NamedTuple):
    """One block of a file: where it begins, how many rows, numbers a row and tokens it has, and its sum."""

    start: int
    rows: int
    values: int
    tokens: int
    sum: bytes

    @property
    def records(self) -> int:
        """Where its records begin, in bytes."""
        return self.start + HEAD.size

    @property
    def ids(self) -> int:
        """Where its token ids begin, in bytes."""
        return self.records + self.rows * record(self.values).itemsize

    @property
    def end(self) -> int:
        """Where the next one begins, in bytes."""
        return self.ids + 4 * self.tokens


def enough(done: int) -> int:
    """How many rows make a chunk or a block, after so many: few at first, so that a kill never costs a large share."""
    return max(64, min(BLOCK, done // 32))


def pack(records: Array, ids: Array, seal: bytes) -> tuple[bytes, Block]:
    """The bytes of a block, and what it is at the start of a file.

    Args:
        records: Of `record`'s type, one a row.
        ids: Token ids of these rows one after the other, int32.
        seal: Goes into the sum: what the file belongs to.
    """
    body = records.tobytes() + ids.tobytes()
    values = records["values"].shape[1]
    block = Block(0, len(records), values, len(ids), _sum(body, seal))
    return HEAD.pack(MAGIC, block.rows, values, block.tokens, block.sum) + body, block


def _sum(body: bytes, seal: bytes) -> bytes:
    found = hashlib.sha256(seal)  # for which processors have instructions
    found.update(body)
    return found.digest()[:16]


@dataclass(frozen=True)
class Check:
    """What a block has to fulfil. Sums are no signatures, and a file may be somebody else's; so numbers are looked at.

    Args:
        seal: As in `pack`.
        vocabulary: Token ids are below it.
    """

    seal: bytes
    vocabulary: int

    def passes(self, body: bytes, block: Block) -> bool:
        """Whether the records and ids of a block are those that were written, and in bounds."""
        if len(body) != block.end - block.records or _sum(body, self.seal) != block.sum:
            return False
        ids = np.frombuffer(body, "<i4", block.tokens, block.ids - block.records)
        return self.fits(body, block) and -self.vocabulary <= int(ids.min()) and int(ids.max()) < self.vocabulary

    def fits(self, body: bytes, block: Block) -> bool:
        """Whether the records alone name places in the block; nothing else is read of it."""
        rows = np.frombuffer(body, record(block.values), block.rows)
        lengths = rows["lengths"].astype(np.int64)
        return bool((lengths > 0).all()) and int(lengths.sum()) == block.tokens and int(rows["largest"].min()) >= 0
