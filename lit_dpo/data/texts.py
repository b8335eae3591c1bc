"""The pairs of the pool as texts: read again, since only their token ids are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_dpo.data.encode import Encoded
from lit_dpo.data.load import EncodedRow, Encoder, load_pairs
from lit_dpo.data.pair import Pair, RowError
from lit_dpo.data.streams import Each, Spool
from lit_dpo.data.token_writer import digest

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule


def pool_pairs(data: PreferenceDataModule) -> Sequence[Pair]:
    """The pairs that a data module trains on if nothing else is chosen, as texts, in the order of their row numbers.

    The sources are read and encoded once more, because what is too long is known by its tokens alone. The texts are
    then in a file without a name, not in memory.

    Raises:
        ValueError: The data have changed since they were read.
    """
    noting = _Noting(data._encoder())
    load_pairs(data._given["train"], noting, into=noting, **data._options(data.reading))
    if bytes(noting.digests) != data.training.train.digest_bytes(numbers=False):
        raise ValueError("The training data have changed since this run has read them: start it again.")
    pool = data.training.pool
    return Each(len(pool), lambda number: pair_of(noting.kept[int(pool[number])]))


def values_of(pair: Pair) -> dict[str, Any]:
    """A pair as plain values."""
    return {field.name: getattr(pair, field.name) for field in fields(pair)}


def pair_of(values: Mapping[str, Any]) -> Pair:
    """The pair again."""
    return Pair(**{**values, "notes": tuple(map(tuple, values["notes"]))})


class _Noting:
    """Notes which pairs are kept; it stands in for the encoder and for what takes the encoded rows."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.kept = encoder, Spool()
        self.digests = bytearray()  # of their ids, one after the other
        self._asked: dict[int, tuple[Encoded, Pair]] = {}  # by the object, which is held so that no other has its place

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """Encode pairs."""
        found = self.encoder.many(pairs)
        self._asked = {id(one): (one, pair) for one, pair in zip(found, pairs, strict=True) if isinstance(one, Encoded)}
        return found

    def append(self, row: EncodedRow, /) -> None:
        """Note the pair of one encoded row."""
        encoded, pair = self._asked[id(row.encoded)]
        self.kept.append(values_of(pair))
        self.digests += digest([np.array(part, "<i4") for part in (encoded.prompt, encoded.chosen, encoded.rejected)])
