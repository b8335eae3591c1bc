"""Sequences whose values are read or made when they are asked for, so that data of any size fit into memory."""

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
from numpy.typing import NDArray

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


def those(numbers: Iterable[int], values: Sequence[T]) -> Each[T]:
    """The values of these numbers, each read when it is asked for; 8 bytes a number.

    >>> list(those([2, 0], ["a", "b", "c"]))
    ['c', 'a']
    """
    kept = numbers if isinstance(numbers, range | array) else array("q", numbers)
    return Each(len(kept), lambda place: values[kept[place]])


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


class Spool(Each[Any]):
    """Plain values in a file without a name, which the system removes when they are no longer used.

    In memory are their places alone, 8 bytes a value.

    >>> values = Spool()
    >>> values.append([1, "one"])
    >>> len(values), values[0]
    (1, [1, 'one'])
    """

    def __init__(self) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the values are asked for
        places = array("q")

        def read(number: int) -> Any:
            file.seek(places[number])
            return json.loads(file.readline())

        super().__init__(0, read)
        self._file, self._places, self._end = file, places, 0
        finalize(self, file.close)

    def append(self, value: Any) -> None:
        """One more value.

        Raises:
            OSError: It cannot be written.
        """
        line = json.dumps(value).encode() + b"\n"
        with naming(Path(tempfile.gettempdir()), "nothing was lost"):
            self._file.seek(self._end)
            self._file.write(line)
        self._places.append(self._end)
        self._end += len(line)

        self._count += 1


class Grouped:
    """Which values are equal, by a digest of each: 32 bytes a value while they come, 20 later.

    >>> equal = Grouped("banana")
    >>> equal.first.tolist(), equal.group.tolist(), [equal.of(number).tolist() for number in range(3)]
    ([0, 1, 2], [0, 1, 2, 1, 2, 1], [[0], [1, 3, 5], [2, 4]])

    Args:
        keys: Plain values.

    Attributes:
        first: Of each group the number of its first value, shape `(groups,)`, ascending.
        group: The number of each value's group, shape `(values,)`.
    """

    def __init__(self, keys: Iterable[Any]) -> None:
        digests = array("Q")
        for key in keys:
            digests.frombytes(blake2b(json.dumps(key).encode(), digest_size=16).digest())
        halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)  # (values, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first stands first
        new = np.ones(len(order), dtype=bool)
        new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
        firsts = order[new]  # (groups,), by digest
        self.first = np.sort(firsts)
        place = np.searchsorted(self.first, firsts)  # (groups,), by digest: which group it is in order
        self.group = np.empty(len(order), dtype=np.int64)
        self.group[order] = place[np.cumsum(new) - 1]
        self._order = np.argsort(self.group, kind="stable")
        self._ends = np.cumsum(np.bincount(self.group, minlength=len(self.first)))

    def of(self, number: int) -> NDArray[np.int64]:
        """The numbers of the values of one group, ascending, shape `(values of the group,)`."""
        start = self._ends[number - 1] if number else 0
        return self._order[start : self._ends[number]]


def different(values: Iterable[Any], key: Callable[[Any], Any]) -> Sequence[Any]:
    """Plain values without those whose key an earlier one has, in order; see `Spool`."""
    found = Spool()

    def keys() -> Iterator[Any]:
        for value in values:
            found.append(value)
            yield key(value)

    return those(Grouped(keys()).first, found)
