"""Encoding of many rows: on all processors, with a bar that shows how far it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.load import Encoder
from lit_dpo.data.rows import Pair, RowError
from lit_dpo.processes import rank_zero_only

MANY = 4096  # rows: so many are encoded here before other processes are worth their start
_PIECE = 64  # rows that a process encodes at a time
_encoder: PairEncoder | None = None  # of a process that encodes for another one


class SpreadEncoder:
    """A `PairEncoder` on all processors, once there are many rows: the results are the same, in the same order.

    The processes are forked, as those of a `DataLoader` are, so on Linux alone; elsewhere, and for the first rows, only
    the tokenizer itself uses all processors. They end with the process that they encode for, however it ends.

    Args:
        encoder: What to spread.
        processes: How many; `None` means as many as there are processors for this process.
    """

    def __init__(self, encoder: PairEncoder, processes: int | None = None) -> None:
        self.encoder = encoder
        self.processes = processes or (len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1)
        self._pool: ProcessPoolExecutor | None = None
        self._done = 0

    def __enter__(self) -> SpreadEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """As `PairEncoder.many`."""
        self._done += len(pairs)
        if self._done < MANY or self.processes < 2 or len(pairs) <= _PIECE:
            return self.encoder.many(pairs)
        if self._pool is None:
            fork = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.processes, fork, _begin, (self.encoder, os.getpid()))
        pieces = [pairs[start : start + _PIECE] for start in range(0, len(pairs), _PIECE)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # Python 3.12 warns of threads
                return [result for piece in self._pool.map(_encode, pieces) for result in piece]
        except BrokenProcessPool:  # one was killed, as for want of memory: it goes on here
            self.processes = 1
            return self.encoder.many(pairs)


def _begin(encoder: PairEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End soon after the first process: until then its files stay locked, as a fork shares them."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _encode(pairs: Sequence[Pair]) -> list[Encoded | RowError]:
    assert _encoder is not None
    return _encoder.many(pairs)


class ShownEncoder:
    """An encoder whose rows are counted on the terminal of the first process, if they are many.

    Args:
        encoder: What encodes.
        total: Says how many rows there will be, or `None` if that is not known.
    """

    def __init__(self, encoder: Encoder, total: Callable[[], int | None]) -> None:
        self.encoder, self.total = encoder, total
        self._bar: Progress | None = None
        self._task: Any = None
        self._done = 0

    def __enter__(self) -> ShownEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """As of the encoder."""
        found = self.encoder.many(pairs)
        self._done += len(pairs)
        if self._done >= MANY:
            self._show()
        return found

    @rank_zero_only
    def _show(self) -> None:
        console = Console(stderr=True)
        if self._bar is None and console.is_terminal:
            shown = (BarColumn(), MofNCompleteColumn(), TextColumn("rows, left:"), TimeRemainingColumn())
            self._bar = Progress("Encoding", *shown, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
