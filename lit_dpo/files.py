"""Files of somebody else's: only regular ones are opened, and only so much of them is read as was expected."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

_LARGEST_JSON = 64 << 20  # bytes; a manifest of ten thousand shards has one or two million


def refuse_special(path: str | Path) -> None:
    """Refuse what is no regular file: a pipe would be waited for, a device never ends. Nothing is opened.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is a folder, a pipe, a socket, a device or the like.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        names = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
        kind = next((name for test, name in names if test(mode)), "device")
        raise ValueError(f"`{path}` is a {kind}, and only regular files are read: give a regular file in its place.")


def read_json(path: Path) -> dict[str, Any]:
    """A small file with a JSON object.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, too large, or no JSON object.
    """
    refuse_special(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"`{path.name}` has more than {_LARGEST_JSON:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"`{path.name}` is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path.name}` holds no JSON object")
    return content
