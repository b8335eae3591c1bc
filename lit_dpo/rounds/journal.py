"""What is done of a round, a line a prompt: a kill costs the line under way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """Values by number, appended to a file of JSON lines, which a later process reads again.

    Every process has a file of its own, `NAME.RANK.jsonl`, and reads those of all. A line that was torn by a kill is
    cut off one's own file, and passed over in those of others.

    Args:
        folder: Where.
        name: Of the files.
        rank: Number of this process.

    Raises:
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.path = folder / f"{name}.{rank}.jsonl"
        self.known: dict[int, Any] = {}
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            size = 0
            with path.open("rb") as file:
                for line in file:
                    try:
                        number, value = json.loads(line) if line.endswith(b"\n") else (None, None)
                    except (ValueError, TypeError):
                        break
                    if not isinstance(number, int):
                        break
                    self.known[number] = value
                    size += len(line)
            if path == self.path and path.stat().st_size > size:
                os.truncate(path, size)
        self._file = self.path.open("ab")

    def append(self, number: int, value: Any) -> None:
        """Write one more line, out of this process's hands when this returns."""
        self._file.write(json.dumps([number, value], ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.known[number] = value

    def close(self) -> None:
        """Have all lines on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
