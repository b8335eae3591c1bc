"""The checkpoint to resume from, and what happens when a run is asked to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_dpo.checkpoints.durable import refuse_unwritable
from lit_dpo.checkpoints.foreign import refuse_foreign
from lit_dpo.checkpoints.io import keep_as, make_durable
from lit_dpo.checkpoints.verify import write_shards_manifest
from lit_dpo.lightning_private import accumulates, validates_now
from lit_dpo.watch import PeerLostError, failed, follow_launcher, leave, watch_over

Handler = Callable[[int, FrameType | None], Any] | int | None
_OTHERS = ("SIGHUP", "SIGUSR1")  # signals that may be somebody else's already


class Stopped(SystemExit):
    """A run ended because a signal asked it to, with everything saved.

    Its status is as a shell reports it: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP, 138 for SIGUSR1.

    Args:
        number: The signal.
        checkpoint: What to resume from.
        step: Optimizer steps done.
    """

    def __init__(self, number: int, checkpoint: Path, step: int) -> None:
        super().__init__(128 + number)
        self.name, self.checkpoint, self.step = signal.Signals(number).name, checkpoint, step


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt` to resume from, and save it before stopping when asked to.

    It is written after every validation, every `every_n_steps` optimizer steps, and at the end of training. The one
    before it stays as `previous.ckpt`. SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 are noted; after the optimizer step under
    way (and its validation, if one is due) the run saves and exits with 128 + the signal's number: 143, 130, 129, 138.
    A second Ctrl-C does not wait. A SIGHUP that is ignored (`nohup`) or handled already, and such a SIGUSR1, are left
    alone. Before training and after it signals do what they do to any program: there is nothing to save.

    Of several processes any one may get the signal. If one of them fails or is killed, the others end too.

    Resuming from it continues the run bit for bit: same rows, losses, learning rates and weights.

    Args:
        every_n_steps: Optimizer steps between two saves besides those after validations; `None` makes none.
        dirpath: Folder; `None` is `checkpoints` in the run's folder.

    Raises:
        ValueError: `every_n_steps` is less than 1.
        OSError: (at the start of training) `dirpath` cannot be written to, has not enough space, or holds a
            `last.ckpt` of somebody else's.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self._folder = Path()
        self._signal: int | None = None
        self._handlers: dict[int, Handler] = {}
        self._terminals: list[int] = []
        self._saved_step = -1
        self._due = self._leaving = False
        follow_launcher()  # from now on, that is before there are connections

    # -- saving -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and have checkpoints written durably, and the processes end together."""
        watch_over(trainer)
        if stage != "fit":
            return
        folder = self.dirpath or f"{trainer.log_dir or trainer.default_root_dir}/checkpoints"
        if "://" in str(folder):
            raise ValueError(f"`LastCheckpoint` writes to local folders alone, not to `{folder}`: set its `dirpath`.")
        self._folder = Path(trainer.strategy.broadcast(str(folder)))
        make_durable(trainer)
        # What the other callbacks know of this moment must be in the checkpoint. (A new list: this one is being gone
        # through.)
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether a checkpoint could be written at all; all processes raise if the first one cannot."""
        problem = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            parameters = list(pl_module.parameters())
            size = sum(p.numel() * p.element_size() for p in parameters)
            size += sum(2 * p.numel() * p.element_size() for p in parameters if p.requires_grad)  # AdamW's moments
            try:
                refuse_foreign(self._folder, trainer.ckpt_path)
                refuse_unwritable(self._folder, size)
            except OSError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise OSError(problem)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop where it is due, after an optimizer step that no validation follows."""
        if accumulates(trainer):
            return
        stop = self._asked_to_stop(trainer)
        every = self.every_n_steps
        self._due |= stop or (every is not None and trainer.global_step % every == 0)
        # A second resume from a checkpoint of an epoch's last batch goes wrong in Lightning 2.6, hence its end.
        if not self._due or trainer.is_last_batch:
            return
        # A checkpoint from before a validation would have Lightning leave this validation out when it resumes.
        if not validates_now(trainer):
            self._save(trainer)
            self._leaving = stop  # at the next batch: the metrics of this one are not logged yet

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop, if everything is saved."""
        if self._leaving:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if asked to."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if accumulates(trainer) or trainer.is_last_batch:
            self._due = True  # later: half an optimizer step is in the gradients, which no checkpoint holds
            return
        self._save(trainer)
        if self._asked_to_stop(trainer):
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop where it was due at the last batch of the epoch, or at the validation after it."""
        stop = self._asked_to_stop(trainer)
        if (self._due or stop) and trainer.global_step != self._saved_step:
            self._save(trainer)
        if stop:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training, unless it is saved already."""
        if trainer.global_step and trainer.global_step != self._saved_step:
            self._save(trainer)
        self._give_signals_back()

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_step, self._due = trainer.global_step, False
        save_last(trainer, self._folder)

    # -- signals ------------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note signals from here on; nothing but the reference pass and loading comes before."""
        self._take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note signals, where there was no sanity check."""
        self._saved_step, self._due, self._leaving = -1, False, False
        self._take_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the signals as they were, and let the other processes know."""
        self._give_signals_back()
        if isinstance(exception, Stopped):
            return
        try:
            failed(exception)
        except PeerLostError:
            for logger in trainer.loggers:
                logger.finalize("failed")
            raise

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals as they were."""
        self._give_signals_back()

    def _take_signals(self) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self._signal = None
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # the last two are not there on Windows
            if number is None or (name in _OTHERS and signal.getsignal(number) != signal.SIG_DFL):
                continue
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        for fd in self._terminals:
            if not os.isatty(fd):  # the terminal is gone: writing to it, as a progress bar does, would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was; the others learn the signal's number."""
        if trainer.world_size > 1:
            numbers = trainer.strategy.all_gather(torch.tensor(self._signal or 0, device=trainer.strategy.root_device))
            self._signal = int(numbers.max()) or None
        return self._signal is not None

    def _stop(self, trainer: Trainer) -> None:
        number = self._signal
        assert number is not None
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier("stopped")
        leave()
        raise Stopped(number, self._folder / "last.ckpt", trainer.global_step)

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def save_last(trainer: Trainer, folder: Path, save: Callable[[Path], None] | None = None) -> None:
    """Write `last.ckpt`, and keep the one that stood there as `previous.ckpt`; all processes take part.

    Args:
        trainer: Whose state is saved.
        folder: Where.
        save: Writes something else in place of that state.
    """
    path = folder / "last.ckpt"
    if trainer.is_global_zero and path.exists():
        keep_as(path, folder / "previous.ckpt")
    trainer.strategy.barrier("previous checkpoint kept")  # shards are written by all
    if save is not None:
        save(path)
    else:
        trainer.save_checkpoint(path, weights_only=False)  # all of the state; Lightning prints a line if not told
    if trainer.is_global_zero and path.is_dir():
        write_shards_manifest(path)
