"""Named tensors on disk, written whole or not at all, and checked when read.

Two files for each identity, `<key>.safetensors` and `<key>.json`; the key is the hash of the identity, which names
everything that decides the values. While values are being computed, those that are there already stand in a journal
beside them, `<key>.<random>.journal`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_dpo.checkpoints.durable import replace_file
from lit_dpo.checkpoints.locks import lock
from lit_dpo.files import refuse_special

FORMAT = 1
_PATIENCE = 10.0  # seconds to wait for another process that reads or writes; then go on, as sums tell of a mixture


def cache_folder() -> Path:
    """`$LIT_DPO_CACHE`, or `~/.cache/lit_dpo`.

    Raises:
        OSError: The user has no home folder.
    """
    try:
        return Path(os.environ.get("LIT_DPO_CACHE") or "~/.cache/lit_dpo").expanduser()
    except RuntimeError as error:
        raise OSError("there is no home folder for the cache: set the environment variable LIT_DPO_CACHE") from error


class TensorStore:
    """One set of named tensors.

    Args:
        folder: Where; made when first written, readable by its owner alone.
        identity: Everything that decides the values.

    Attributes:
        data: The file of the tensors.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, object]) -> None:
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}, sort_keys=True))
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(folder)
        self.data, self.header = self.folder / f"{self.key}.safetensors", self.folder / f"{self.key}.json"

    def read(
        self, problem: Callable[[Mapping[str, Tensor]], str | None] = lambda tensors: None
    ) -> tuple[dict[str, Tensor] | None, str | None]:
        """The tensors, or none; and what is wrong with the files, if anything.

        Args:
            problem: Says what is wrong with the tensors for whoever wrote them: sums are no signatures, and a file may
                be somebody else's.
        """
        with _locked(self.folder, exclusive=False):
            return self._read(problem)

    def _read(
        self, problem: Callable[[Mapping[str, Tensor]], str | None] = lambda tensors: None
    ) -> tuple[dict[str, Tensor] | None, str | None]:
        try:
            if not self.header.exists():
                return None, None
            refuse_special(self.data)
            refuse_special(self.header)
            content = self.data.read_bytes()
            if self.header.read_bytes() != self._header(content):
                return None, "its checksum or identity does not match"
            tensors = load(content)
            wrong = problem(tensors)
            return (tensors, None) if wrong is None else (None, wrong)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            return None, str(error)

    def write(
        self,
        tensors: Mapping[str, Tensor],
        merge: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Replace the files.

        Args:
            tensors: What to write.
            merge: Makes of what is there now (another run may have written it meanwhile) and `tensors` what to write.
        """
        self.make_folder()
        with _locked(self.folder, exclusive=True):
            there = self._read()[0] if merge else None
            if merge and there is not None:
                tensors = merge(there, tensors)
            content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            for path, written in ((self.data, content), (self.header, self._header(content))):
                with replace_file(path, private=True) as file:
                    file.write(written)

    def make_folder(self) -> None:
        """Make the folder, for its owner alone."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _header(self, content: bytes) -> bytes:
        record = {"identity": self.identity, "sha256": hashlib.sha256(content).hexdigest()}
        return json.dumps(record, sort_keys=True, indent=1).encode()


@contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """Keep other processes from a folder's files for a moment; where that cannot be, go on all the same."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # it is not there, or this is Windows, which does not open folders
        yield
        return
    try:
        end = time.monotonic() + _PATIENCE
        while lock(handle, exclusive) is False and time.monotonic() < end:
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)
