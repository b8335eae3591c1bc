"""How far a run is, on one line of the terminal, and a line of text for every validation."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from lit_dpo.metrics import SHOWN

_INTERVAL = 0.1  # seconds between two drawings: more often costs time and shows nothing more


class ProgressLine(ProgressBar):
    """One line that shows epoch, batches, time left, loss, accuracy, margin and tokens a second.

    It is drawn on a terminal only, and removed when its loop is done, so that results stand alone. Whatever is printed
    or logged meanwhile appears above it. Every validation of a fit is printed as a line of text, in a pipe too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress | None = None
        self._enabled = True
        self._task: Any = None
        self._loop = ""
        self._metrics: tuple[str, ...] = ()
        self._measured = -1
        self._drawn = 0.0
        self._redirected = ExitStack()

    def disable(self) -> None:
        """Show nothing from now on."""
        self._close()
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        if self._enabled:
            (self.progress.console if self.progress else Console()).print(*args, **kwargs)

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; read the metrics only where new ones were logged, for reading waits for the device."""
        step, every = trainer.global_step, getattr(trainer, "log_every_n_steps", 1) or 1
        if step != self._measured and step % every == 0:
            self._measured = step
            if self._visible():
                self._metrics = tuple(_short(name, float(v)) for name, v in trainer.progress_bar_metrics.items())
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self._advance(
            f"Epoch {trainer.current_epoch + 1}{epochs}", batch_idx + 1, _batches_of_epoch(trainer, batch_idx)
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal to the results."""
        self._close()

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count the batch."""
        self._current_eval_dataloader_idx = dataloader_idx
        self._advance("Validation", batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation of a fit; one of the first rows alone is only a test that it works."""
        if trainer.state.fn != "fit":
            self._close()
        elif not trainer.sanity_checking or trainer.num_sanity_val_steps == math.inf:
            found = {short: trainer.callback_metrics.get(f"val/{name}") for name, short in SHOWN.items()}
            values = ", ".join(_short(name, float(value)) for name, value in found.items() if value is not None)
            self.print(f"Validation at step {trainer.global_step}: {values}", highlight=False, soft_wrap=True)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count the batch."""
        self._current_eval_dataloader_idx = dataloader_idx
        self._advance("Test", batch_idx + 1, self.total_test_batches_current_dataloader)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal to the results."""
        self._close()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count the batch."""
        self._current_eval_dataloader_idx = dataloader_idx
        self._advance("Predicting", batch_idx + 1, self.total_predict_batches_current_dataloader)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal to the results."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the error."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    # -- the line -----------------------------------------------------------------------------------------------------

    def _visible(self) -> bool:
        """Whether there is a terminal to draw on, whatever `FORCE_COLOR` says."""
        return self._enabled and sys.stdout.isatty() and (self.progress is not None or Console().is_interactive)

    def _advance(self, loop: str, done: int, total: float) -> None:
        if not self._visible():
            return
        progress = self.progress or self._open()
        whole = None if math.isinf(total) else int(total)
        if loop != self._loop:
            progress.reset(self._task, description=loop, completed=done - 1, total=whole)
        new, now = loop != self._loop, time.monotonic()
        self._loop = loop
        metrics = self._metrics if loop.startswith("Epoch") else ()
        progress.update(self._task, completed=done, total=whole, metrics=metrics)
        if new or done == whole or now - self._drawn > _INTERVAL:
            self._drawn = now
            progress.refresh()

    def _open(self) -> Progress:
        one_line: dict[str, Any] = {"no_wrap": True, "overflow": "crop"}
        console = Console()
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(**one_line)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=40)),
            MofNCompleteColumn(table_column=Column(**one_line)),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(**one_line)),
            _Metrics(console, table_column=Column(**one_line)),
            console=console,
            auto_refresh=False,  # no thread, which a worker process could be forked beside
            transient=True,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),
        )
        before = (sys.stdout, sys.stderr)
        self.progress.start()
        after = (sys.stdout, sys.stderr)  # what prints above the line
        for handler in _handlers():  # they hold the streams that were there before
            for old, new in zip(before, after, strict=True):
                if handler.stream is old is not new:
                    self._redirected.callback(handler.setStream, old)
                    handler.setStream(new)
        self._task = self.progress.add_task("", total=None, metrics=())
        return self.progress

    def _close(self) -> None:
        self._redirected.close()
        if self.progress is not None:
            self.progress.stop()
        self.progress, self._loop = None, ""


class _Metrics(ProgressColumn):
    """As many of the metrics, each `name value`, as the terminal is wide enough for."""

    def __init__(self, console: Console, table_column: Column) -> None:
        super().__init__(table_column)
        self.console = console

    def render(self, task: Task) -> Text:
        room = self.console.width - len(f"{task.description} ---- {task.completed:.0f}/{task.total or 0:.0f} 0:00:00 ")
        shown = ""
        for metric in task.fields["metrics"]:
            longer = f"{shown} {metric}".strip()
            if len(longer) <= room:
                shown = longer
        return Text(shown)


def _short(name: str, value: float) -> str:
    """A metric in a few characters: `loss 0.693`, or `12k tokens/s`."""
    if name.endswith("/s"):
        return f"{value:.0f} {name}" if value < 10_000 else f"{value / 1000:.0f}k {name}"
    return f"{name} {value:.3g}"


def _batches_of_epoch(trainer: Trainer, batch_idx: int) -> float:
    """Batches of the epoch under way; `max_steps` may end it early."""
    batches: float = trainer.num_training_batches
    if trainer.max_steps < 0:
        return batches
    every = trainer.accumulate_grad_batches
    return min(batches, ((batch_idx + 1) // every + trainer.max_steps - trainer.global_step) * every)


def _handlers() -> set[logging.StreamHandler[Any]]:
    """The handlers of all loggers that write to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return {handler for handler in handlers if isinstance(handler, logging.StreamHandler)}


def finish_progress(trainer: Trainer) -> None:
    """Stop a progress bar of rich that is still drawn, such as Lightning's own, which would overwrite what follows.

    Lightning stops its bar only when the Trainer is torn down, after callbacks have said what a run has come to.
    """
    progress = getattr(getattr(trainer, "progress_bar_callback", None), "progress", None)
    if progress is not None:
        progress.stop()
