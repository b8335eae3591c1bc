"""What the name of a data set says besides its path: split, configuration, revision, files."""

from __future__ import annotations

import re
from pathlib import Path


def split_off(spec: str) -> tuple[str, str | None]:
    """`name:split` -> name and split, unless a file is really called that."""
    name, colon, split = spec.rpartition(":")
    if not colon or not re.fullmatch(r"\w+", split) or Path(spec).expanduser().exists():
        return spec, None
    return name, split


def bracketed(name: str) -> tuple[str, dict[str, str]]:
    """A hub name and what its brackets say of configuration, revision and files.

    >>> bracketed("org/set[en, revision=v1]")
    ('org/set', {'name': 'en', 'revision': 'v1'})
    """
    match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]*)\]", name)
    if match is None:
        return name, {}
    options: dict[str, str] = {}
    for part in match[2].split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key, value = (key, value) if equals else ("name", key)
        if key not in ("name", "revision", "data_files", "data_dir") or not value or key in options:
            raise ValueError(
                f"`{name}`: brackets hold a configuration, `revision=`, `data_files=` and `data_dir=`, each once, not "
                f"`{part.strip()}`."
            )
        options[key] = value
    return match[1], options
