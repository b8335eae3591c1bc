"""Memory of this process, and of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


class Memory:
    """Memory of this process in bytes: on a GPU what is allocated there, else the resident set.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def now(self) -> int:
        """What is taken."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else _status("VmRSS")

    @property
    def peak(self) -> int:
        """The most since `restart`, or since the process began."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")

    def restart(self) -> None:
        """Measure the peak anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def room(self) -> int | None:
        """The most that this process may take; `None` where that cannot be told."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        with suppress(OSError):
            found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
            return None if found is None else self.now + 1024 * int(found[1])
        return None


def _status(name: str) -> int:
    with suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return 1024 * int(found[1])
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
