"""Sequences whose values are read or made when they are asked for, so that a round of any size fits into memory."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload
from weakref import finalize

import numpy as np

from lit_dpo.checkpoints.durable import naming

T = TypeVar("T")


class Each(Sequence[T]):
    """A value for each number from 0, made anew whenever it is asked for.

    >>> squares = Each(4, lambda number: number**2)
    >>> len(squares), squares[-1], squares[1:3], list(squares)
    (4, 9, [1, 4], [0, 1, 4, 9])

    Args:
        count: How many there are.
        make: Gives the value of a number.
    """

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        place = range(self._count)[number]
        return self._make(place) if isinstance(place, int) else [self._make(n) for n in place]


class Streamed(Sequence[T]):
    """Values of a stream that can be begun again; counted by whoever makes it.

    Args:
        count: How many there are.
        stream: Gives them from the beginning.
    """

    def __init__(self, count: int, stream: Callable[[], Iterator[T]]) -> None:
        self._count, self._stream = count, stream

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return self._stream()

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return list(self)[number]
        return next(islice(self, range(self._count)[number], None))


def different(values: Iterable[Any], key: Callable[[Any], Any]) -> Sequence[Any]:
    """Plain values without those whose key an earlier one has, in order.

    They are in a file without a name, which the system removes when it is no longer used.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the values are asked for
    places, digests = array("q"), array("Q")
    with naming(Path(tempfile.gettempdir()), "nothing was lost"):
        for value in values:
            places.append(file.tell())
            digests.frombytes(blake2b(json.dumps(key(value)).encode(), digest_size=16).digest())
            file.write(json.dumps(value).encode() + b"\n")
        file.flush()
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)  # (values, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first stands first
    new = np.ones(len(order), dtype=bool)
    new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    kept = np.sort(order[new])

    def read(number: int) -> Any:
        file.seek(places[int(kept[number])])
        return json.loads(file.readline())

    found = Each(len(kept), read)
    finalize(found, file.close)
    return found
