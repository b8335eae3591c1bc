"""Files of somebody else's: only regular ones are opened, and only so much of them is read as was expected."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

_LARGEST_JSON = 64 << 20  # bytes; a manifest of ten thousand shards has one or two million


def refuse_special(path: str | Path, links: bool = True) -> None:
    """Refuse what is no regular file: a pipe would be waited for, a device never ends. Nothing is opened.

    Args:
        path: The file.
        links: A symbolic link to a regular file will do.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is a folder, a pipe, a socket, a device, or a link that may not be one.
    """
    mode = os.stat(path, follow_symlinks=links).st_mode
    if not stat.S_ISREG(mode):
        names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFLNK: "symbolic link"}
        kind = names.get(stat.S_IFMT(mode), "device")
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
