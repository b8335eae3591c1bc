"""Locks on open files, which end with the process that holds them."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl


def lock(file: BinaryIO | int, exclusive: bool = True) -> bool | None:
    """Hold a file, without waiting.

    Args:
        file: An open file, or its number.
        exclusive: Let nobody else hold it, rather than nobody who wants it for himself alone.

    Returns:
        Whether it was had; `None` where the system has no such locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(file: BinaryIO) -> None:
    """Hold a file no longer, nor have processes hold it that were forked meanwhile."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
