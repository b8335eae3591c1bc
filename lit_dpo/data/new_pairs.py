"""The file of new pairs that a step trains on: written once, before training, and refused when it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lit_dpo.checkpoints.durable import forget_parts_of_the_dead, naming, new_file, part_beside, put, write_json
from lit_dpo.data.load import Rows
from lit_dpo.files import read_json

FILE = "pairs.jsonl"


def lines(rows: object, step: int) -> Iterator[bytes]:
    """New pairs as JSON lines, one after the other.

    Args:
        rows: What a partition answered.
        step: The step it answered for, from 0.

    Raises:
        ValueError: It is no list of rows, it is empty, or a row holds more than plain values.
    """
    listed = isinstance(rows, Sequence) and not isinstance(rows, str | bytes) and len(rows) > 0
    for row in rows if listed else [None]:  # type: ignore[attr-defined]
        if not isinstance(row, Mapping):
            raise ValueError(
                "`Partition.next` must give row numbers as a tensor, a list of new pairs, or `None`, and gave a "
                f"{type(rows).__name__} for step {step}: new pairs are dictionaries, at least one; the end is `None`."
            )
        try:
            yield json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"A new pair of step {step} holds no plain value ({error}): leave that out.") from error


class _AsLines:
    """New pairs as they will be read back, whenever they are asked for."""

    def __init__(self, rows: object, step: int) -> None:
        self.rows, self.step = rows, step

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (json.loads(line) for line in lines(self.rows, self.step))


def rows_of(rows: object, step: int) -> Rows:
    """New pairs as a source for the data module; see `lines`."""
    return Rows(_AsLines(rows, step), f"new pairs of step {step}")


def write(path: Path, rows: object, step: int) -> None:
    """Write the file and its digest beside it, whole or not at all, and to the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_parts_of_the_dead(path)
    with naming(path.parent, "what was done of the step is kept"), part_beside(path) as part:
        with new_file(part) as file:
            file.writelines(lines(rows, step))
        write_json(_record(path), {"sha256": _digest(part)})  # the file counts with it alone
        put(part, path)


def digest(path: Path, allow_changes: bool = False) -> str:
    """The file's digest, compared with the one that was written with it.

    Raises:
        ValueError: The file is not what was written.
    """
    record, found = _record(path), _digest(path)
    known = read_json(record).get("sha256") if record.exists() else None
    if found != known and not allow_changes:
        raise ValueError(
            f"`{path}` is not as the run has written it: restore it, or add --allow-changes (in Python: "
            "`datamodule.allow_changes = True`) to train on it as it is."
        )
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
