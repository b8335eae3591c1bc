"""What is done of a round, a line a prompt: a kill costs the line under way."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from weakref import finalize

from lit_dpo.checkpoints.locks import lock, unlock


class Lines(Mapping[int, Any]):
    """Values by number, appended to a file of JSON lines, which this process or a later one reads again.

    Every process has a file of its own, `NAME.RANK.jsonl`, and reads those of all. A line that was torn by a kill is
    cut off one's own file, and passed over in those of others. In memory are places in the files alone, 8 bytes a
    number.

    Args:
        folder: Where.
        name: Of the files.
        rank: Number of this process.

    Raises:
        OSError: The folder cannot be written to.
        ValueError: Another process writes under the same number.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.path = folder / f"{name}.{rank}.jsonl"
        self._folder, self._name = folder, name
        self._places = array("q")  # by number: where its line begins, times the files, plus the number of its file
        self._count = 0
        self._files: list[tuple[Path, BinaryIO]] = []
        self._ends: dict[Path, int] = {}  # of the last whole line
        finalize(self, _close, self._files)  # they are read as long as somebody asks for values
        self._file = self.path.open("ab", buffering=0)
        if lock(self._file) is False:
            self._file.close()
            raise ValueError(
                f"Another process writes to `{self.path}`, so this run is under way already: wait, or end it first."
            )
        self.refresh()
        self._own = [path for path, _ in self._files].index(self.path)
        if self.path.stat().st_size > self._ends[self.path]:
            os.truncate(self.path, self._ends[self.path])

    def refresh(self) -> None:
        """Read what other processes have written since."""
        for path in sorted(self._folder.glob(f"{self._name}.*.jsonl")):
            rank = path.name.removeprefix(f"{self._name}.").removesuffix(".jsonl")
            if path not in self._ends and rank.isdecimal():  # a copy that somebody made has another name
                self._files.append((path, path.open("rb")))
                self._ends[path] = 0
        for which, (path, file) in enumerate(self._files):
            file.seek(self._ends[path])
            for line in file:
                found = _value(line)
                if found is None:
                    break
                self._note(found[0], which, len(line))

    def _note(self, number: int, which: int, size: int) -> None:
        """Remember where the line stands that ends a file."""
        path, _ = self._files[which]
        while len(self._places) <= number:
            self._places.append(-1)
        self._count += self._places[number] < 0
        self._places[number] = self._ends[path] * _FILES + which
        self._ends[path] += size

    def append(self, number: int, value: Any) -> None:
        """Write one more line, out of this process's hands when this returns.

        Raises:
            OSError: It cannot be written; the lines before it are kept.
        """
        line = json.dumps([number, value], ensure_ascii=False).encode() + b"\n"
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self._note(number, self._own, len(line))

    def __getitem__(self, number: int) -> Any:
        if number not in self:
            raise KeyError(number)
        start, which = divmod(self._places[number], _FILES)
        file = self._files[which][1]
        file.seek(start)
        found = _value(file.readline())
        if found is None or found[0] != number:
            raise ValueError(f"`{file.name}` was changed while it was read: go on with the run, which reads it anew.")
        return found[1]

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and 0 <= number < len(self._places) and self._places[number] >= 0

    def __iter__(self) -> Iterator[int]:
        return (number for number, place in enumerate(self._places) if place >= 0)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Have all lines on the disk, and write no more; they can still be read.

        Raises:
            OSError: They cannot be written.
        """
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        finally:
            unlock(self._file)
            self._file.close()


_FILES = 1 << 16  # more than there are processes


def _close(files: list[tuple[Path, BinaryIO]]) -> None:
    for _, file in files:
        file.close()


def _value(line: bytes) -> tuple[int, Any] | None:
    """The number and the value of a whole line; `None` of one that was torn."""
    try:
        number, value = json.loads(line) if line.endswith(b"\n") else (None, None)
    except (ValueError, TypeError):
        return None
    return (number, value) if isinstance(number, int) and number >= 0 else None
