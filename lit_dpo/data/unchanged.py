"""Whether data files are those of an earlier run, told without reading them where the system can tell."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from lit_dpo.data.read import files_of
from lit_dpo.files import refuse_special

_PIECE = 32 << 20  # bytes of a data file that are hashed together
_SETTLED = 2_000_000_000  # nanoseconds; no file system's clock is coarser


def stamp(path: Path, settled: bool = True) -> list[int] | None:
    """Numbers of a file that are others once it was written to or replaced; nothing of it is read.

    They are its device, its inode, its size, and the times at which its content and its entry last changed. A program
    can set the former time, and not the latter, which version control relies on in the same way.

    Args:
        path: The file.
        settled: Give no numbers of a file that changed in the last two seconds, because another change could have the
            same time.

    Returns:
        The numbers; `None` where they cannot be relied on, as on Windows, which keeps no such time.

    Raises:
        OSError: There is no such file.
    """
    found = path.stat()
    if os.name != "posix" or (settled and time.time_ns() - found.st_ctime_ns < _SETTLED):
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class Sources:
    """The data files of a run.

    Args:
        specs: Names of the data sets.
        load: What is done with their rows, as plain values.
        known: `stamps` of an earlier run. A file whose stamp is among them is not read.

    Attributes:
        digest: A hash of the content of the files and of all that is done with them; `None` where that cannot be told.
        stamps: For each file its stamp and the hashes of its content; files without a stamp are left out.
    """

    def __init__(self, specs: Sequence[str], load: Mapping[str, object], known: object = None) -> None:
        self.digest: str | None = None
        self.stamps: dict[str, list[Any]] = {}
        self._before: dict[Path, list[int] | None] = {}
        try:
            found = [files_of(spec) for spec in specs]
            options = json.dumps(load, sort_keys=True)
            files = [path for group in found for path in group or ()]
            sums = self._sums(files, known if isinstance(known, dict) else {})
        except (OSError, ValueError, TypeError):
            return  # whoever reads the rows says what is wrong
        if files and None not in found:
            record = [options, list(specs), _code(), [[str(path), sums[path]] for path in files]]
            self.digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()

    def doubt(self) -> None:
        """Know nothing any more if a file was written to since: rows that were read by now may be those of before."""
        try:
            same = all(stamp(path, settled=False) == before for path, before in self._before.items())
        except OSError:
            same = False
        if not same:
            self.digest, self.stamps = None, {}

    def _sums(self, files: Sequence[Path], known: Mapping[str, Any]) -> dict[Path, list[str]]:
        """Hashes of the pieces of files, by all processors."""
        stamps = {}
        for path in files:
            refuse_special(path)
            stamps[path], self._before[path] = stamp(path), stamp(path, settled=False)
        kept = {path: known[str(path)][1] for path in files if stamps[path] and _is_of(stamps[path], known, path)}
        read = [path for path in dict.fromkeys(files) if path not in kept]
        pieces = [(path, start) for path in read for start in range(0, path.stat().st_size or 1, _PIECE)]
        sums: dict[Path, list[str]] = {path: [] for path in read}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for (path, _), value in zip(pieces, threads.map(_piece, pieces), strict=True):
                sums[path].append(value)
        sums |= kept
        self.stamps = {str(path): [stamps[path], sums[path]] for path in files if stamps[path]}
        return sums


def _is_of(mine: object, known: Mapping[str, Any], path: Path) -> bool:
    """Whether hashes that are known are those of a file with this stamp."""
    entry = known.get(str(path))
    return isinstance(entry, list) and len(entry) == 2 and entry[0] == mine and isinstance(entry[1], list)


def _piece(of: tuple[Path, int]) -> str:
    path, start = of
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return hashlib.sha256(file.read(_PIECE)).hexdigest()


@cache
def _code() -> str:
    """A hash of the code that makes rows of data files, so that another release reads them anew."""
    folder = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
