"""Whether the configuration of a run that resumes is still the one it was started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

_IGNORED = ("ckpt_path", "predictions", "threads", "trainer.default_root_dir")
_RESTORED = ("model.optimizer", "model.lr_scheduler")
_RENAMED = {"layout": "form"}  # options of the model since 0.1.0


def refuse_changes(
    saved: Path | None, current: str, allowed: bool, completed: Callable[[Mapping[str, Any]], str | None]
) -> list[str]:
    """Compare the configuration of a run that resumes with the saved one, and show what differs.

    Args:
        saved: The `config.yaml` of the run; nothing is compared if there is none.
        current: The configuration of this run as yaml.
        allowed: Go on nevertheless.
        completed: Makes of an earlier configuration, as nested values, the yaml that it would be written as today, the
            options that have come since at their defaults; `None` if it cannot be read today.

    Returns:
        The names of the options that differ.

    Raises:
        ValueError: They differ, and that was not allowed.
    """
    if saved is None:
        return []
    values = _renamed(yaml.safe_load(saved.read_text(encoding="utf-8")))
    old = _flat(yaml.safe_load(completed(values) or "null") or values)
    new = _flat(yaml.safe_load(current))
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n) and not n.startswith(_IGNORED)]
    if not names:
        return []
    table = Table("option", "checkpoint", "this run", "in force", title="Changed since the checkpoint")
    for name in names:
        restored = name.startswith(_RESTORED)  # Lightning restores both as they were
        table.add_row(name, *(str(values.get(name)) for values in (old, new, old if restored else new)))
    Console().print(table)
    if not allowed:
        raise ValueError(
            f"The configuration differs from that of the run to resume in {', '.join(names)}: undo that, or add "
            "--allow-changes."
        )
    return names


def _renamed(values: Any) -> Any:
    """A configuration under today's names of its options."""
    if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
        return values
    return {**values, "model": {_RENAMED.get(name, name): value for name, value in values["model"].items()}}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}
