"""What decides the pairs of a round, and the refusal to go on under anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import write_json
from lit_dpo.data import new_pairs
from lit_dpo.files import read_json

FILE = "round_options.json"
_JUDGE = {"judge", "function", "code", "command", "files", "model", "weights"}  # what says which judge it is


def begin(folder: Path, values: Mapping[str, Any], allow_changes: bool = False) -> None:
    """Note what decides a round when it begins, and compare with that when it goes on.

    Args:
        folder: Of the round.
        values: Plain values by name.
        allow_changes: Go on with another judge; what was judged is kept.

    Raises:
        ValueError: The round was begun with others; a table of them is printed.
    """
    path, identity = folder / FILE, dict(json.loads(json.dumps(values)))
    done = (folder / new_pairs.FILE).exists()
    if not path.exists() and not done:
        write_json(path, identity)
        return
    known = read_json(path) if path.exists() else {}
    names = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
    if not names:
        return
    if is_first():
        table = Table("option", "the round", "this run", title="Changed since the round was begun")
        for name in names:
            table.add_row(*(Text(text) for text in (name, _shown(known.get(name)), _shown(identity.get(name)))))
        Console().print(table)
    judge = known and not done and _JUDGE.issuperset(names)
    if judge and allow_changes:
        if is_first():
            write_json(path, identity)
        return
    remedy = "undo that, or start in a new folder"
    if done or judge:
        kept = "train on its pairs as they are" if done else "keep what was judged"
        remedy = f"undo that, start in a new folder, or {kept} with --allow-changes"
    raise ValueError(f"The round in `{folder}` was begun with another {', '.join(names)}: {remedy}.")


def _shown(value: object) -> str:
    """A value for a person; of a digest so much as tells it from another."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", str(value))
