"""Every private part of Lightning and torchmetrics that is touched, with its reason; Lightning 2.6.6, torchmetrics 1.9.

`tests/test_lightning_private.py` fails where one of them has moved, and where one is not needed any more. What the
command line needs besides stands in `lit_dpo.cli.private`.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric


def leave_signals(trainer: Trainer) -> None:
    """Keep a Trainer from installing signal handlers; there is no option for it.

    Its own put a SIGTERM off until the next batch, exchange messages from within the handler, for which the other
    processes wait at another place, and at a SIGUSR1 save in the middle of a step. Can go with
    `test_a_trainer_still_takes_signals`.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer of a module, if it has one; the public `module.trainer` raises without.

    Can go with `test_a_module_without_a_trainer_still_raises`.
    """
    return module._trainer


def accumulates(trainer: Trainer) -> bool:
    """Whether half an optimizer step is in the gradients, after a batch.

    Can go with `test_loops_still_tell_nothing_in_public`.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that has just been trained on.

    Can go with `test_loops_still_tell_nothing_in_public`.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and trainer.limit_val_batches != 0


def mark_updated(metric: Metric) -> None:
    """Let a metric whose state was restored know that something was added to it, lest it warns that nothing was.

    Can go with `test_a_restored_metric_still_warns`.
    """
    metric._update_count = 1


def _nothing() -> None:
    pass
