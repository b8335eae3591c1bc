"""The file of new pairs that a step trains on: written once, before training, and refused when it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_dpo.checkpoints.durable import replace_file, write_json
from lit_dpo.data.load import Rows
from lit_dpo.files import read_json

FILE = "pairs.jsonl"


def as_lines(rows: object, step: int) -> bytes:
    """New pairs as JSON lines.

    Args:
        rows: What a partition answered.
        step: The step it answered for, from 0.

    Raises:
        ValueError: It is no list of rows, it is empty, or a row holds more than plain values.
    """
    listed = isinstance(rows, Sequence) and not isinstance(rows, str | bytes) and len(rows) > 0
    if not listed or not all(isinstance(row, Mapping) for row in rows):  # type: ignore[attr-defined]
        raise ValueError(
            "`Partition.next` must give row numbers as a tensor, a list of new pairs, or `None`, and gave a "
            f"{type(rows).__name__} for step {step}: new pairs are dictionaries, at least one; the end is `None`."
        )
    try:
        lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) for row in rows]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"A new pair of step {step} holds no plain value ({error}): leave that out.") from error
    return "".join(f"{line}\n" for line in lines).encode()


def rows_of(content: bytes, step: int) -> Rows:
    """The pairs of JSON lines, as a source for the data module."""
    return Rows([json.loads(line) for line in content.decode().split("\n") if line], f"new pairs of step {step}")


def write(path: Path, content: bytes) -> None:
    """Write the file and its digest beside it, whole or not at all, and to the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(_record(path), {"sha256": hashlib.sha256(content).hexdigest()})  # the file counts with it alone
    with replace_file(path) as file:
        file.write(content)


def digest(path: Path, allow_changes: bool = False) -> str:
    """The file's digest, compared with the one that was written with it.

    Raises:
        ValueError: The file is not what was written.
    """
    record, found = _record(path), hashlib.sha256(path.read_bytes()).hexdigest()
    known = read_json(record).get("sha256") if record.exists() else None
    if found != known and not allow_changes:
        raise ValueError(
            f"`{path}` is not as the run has written it: restore it, or add --allow-changes (in Python: "
            "`datamodule.allow_changes = True`) to train on it as it is."
        )
    return found


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
