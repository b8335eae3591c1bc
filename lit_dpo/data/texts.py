"""The pairs of the pool as texts: read again, since only their token ids are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_dpo.data.encode import Encoded
from lit_dpo.data.load import EncodedRow, Encoder, load_pairs
from lit_dpo.data.pair import Pair, RowError
from lit_dpo.data.token_writer import digest

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule


def pool_pairs(data: PreferenceDataModule) -> list[Pair]:
    """The pairs that a data module trains on if nothing else is chosen, as texts, in the order of their row numbers.

    The sources are read and encoded once more, because what is too long is known by its tokens alone.

    Raises:
        ValueError: The data have changed since they were read.
    """
    noting = _Noting(data._encoder())
    load_pairs(data._given["train"], noting, into=noting, **data._options(data.reading))
    train = data.training.train
    if b"".join(noting.digests) != train.digest_bytes(numbers=False):
        raise ValueError("The training data have changed since this run has read them: start it again.")
    return [noting.kept[row] for row in data.training.pool.tolist()]


class _Noting:
    """Notes which pairs are kept; it stands in for the encoder and for what takes the encoded rows."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.kept: list[Pair] = []
        self.digests: list[bytes] = []  # of their ids
        self._asked: dict[int, tuple[Encoded, Pair]] = {}  # by the object, which is held so that no other has its place

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """Encode pairs."""
        found = self.encoder.many(pairs)
        self._asked = {id(one): (one, pair) for one, pair in zip(found, pairs, strict=True) if isinstance(one, Encoded)}
        return found

    def append(self, row: EncodedRow, /) -> None:
        """Note the pair of one encoded row."""
        encoded, pair = self._asked[id(row.encoded)]
        self.kept.append(pair)
        self.digests.append(
            digest([np.array(part, "<i4") for part in (encoded.prompt, encoded.chosen, encoded.rejected)])
        )
