"""How far the sampling or judging of a round is, on one line of the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_INTERVAL = 0.1  # seconds between two drawings


@contextmanager
def progress(what: str, prompts: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A line that shows prompts, completions a second and the time left; nothing in a pipe.

    Args:
        what: Is done, such as `Sampling`.
        prompts: How many there are to do.
        shown: Whether to draw on a terminal.

    Yields:
        To be called with how many prompts, and completions of theirs, are done more.
    """
    console = Console()
    if not shown or not prompts or not (sys.stdout.isatty() and console.is_interactive):
        yield lambda prompts, completions: None
        return
    once = Column(no_wrap=True, overflow="crop")
    bar = Progress(
        TextColumn("{task.description}", table_column=once),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=40)),
        MofNCompleteColumn(table_column=once),
        TextColumn("{task.fields[speed]:,.0f} completions/s", table_column=once),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=once),
        console=console,
        auto_refresh=False,  # no thread beside those of the model
        transient=True,
        expand=True,
        redirect_stderr=sys.stderr.isatty(),
    )
    start = drawn = time.monotonic()
    done = 0
    with bar:
        task = bar.add_task(what, total=prompts, speed=0.0)

        def advance(prompts: int, completions: int) -> None:
            nonlocal done, drawn
            done, now = done + completions, time.monotonic()
            bar.update(task, advance=prompts, speed=done / max(now - start, 1e-9))
            if now - drawn > _INTERVAL:
                drawn = now
                bar.refresh()

        bar.refresh()
        yield advance
