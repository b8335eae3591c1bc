"""Named tensors on disk, written whole or not at all, and checked when read.

Two files for each identity, ``<key>.safetensors`` and ``<key>.json``; the key is the hash of the identity, which names
everything that decides the values.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_dpo.files import refuse_special

FORMAT = 1


def cache_folder() -> Path:
    """``$LIT_DPO_CACHE``, or ``~/.cache/lit_dpo``.

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
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(folder)
        self.data, self.header = self.folder / f"{key}.safetensors", self.folder / f"{key}.json"

    def read(
        self, problem: Callable[[Mapping[str, Tensor]], str | None] = lambda tensors: None
    ) -> tuple[dict[str, Tensor] | None, str | None]:
        """The tensors, or none; and what is wrong with the files, if anything.

        Args:
            problem: Says what is wrong with the tensors for whoever wrote them: sums are no signatures, and a file may
                be somebody else's.
        """
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

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the files."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        _replace(self.data, content)
        _replace(self.header, self._header(content))

    def _header(self, content: bytes) -> bytes:
        record = {"identity": self.identity, "sha256": hashlib.sha256(content).hexdigest()}
        return json.dumps(record, sort_keys=True, indent=1).encode()


def _replace(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old file or the new one, never a part."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
