"""Early stopping and best checkpoint by reward accuracy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_dpo.checkpoints.foreign import believe
from lit_dpo.checkpoints.io import make_durable


class RewardEarlyStopping(EarlyStopping):
    """Stop when the share of validation pairs with the right order of rewards no longer rises.

    As long as the policy has not moved, every pair is a tie and the accuracy of one half means nothing; such a
    validation is ignored.

    Args:
        monitor: Metric to watch.
        patience: Validations without improvement before training stops.
        min_delta: Smallest rise that counts as one.
        mode: `max` or `min`.
        check_finite: Stop as soon as the metric is NaN or infinite.
        verbose: Log every decision.
    """

    def __init__(
        self,
        monitor: str = "val/rewards/accuracies",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "max",
        check_finite: bool = True,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            monitor,
            min_delta,
            patience,
            verbose,
            mode,
            check_finite=check_finite,
            check_on_train_epoch_end=False,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric, unless every pair is a tie."""
        if not all_ties(trainer):
            super().on_validation_end(trainer, pl_module)


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the best validation reward accuracy, written durably.

    It is there to export from; to resume, `LastCheckpoint` keeps the newest one.

    Args:
        monitor: Metric to rank checkpoints by.
        mode: `max` or `min`.
        save_top_k: How many of the best to keep; -1 keeps all.
        dirpath: Folder; `None` is `checkpoints` in the run's folder.
    """

    def __init__(
        self,
        monitor: str = "val/rewards/accuracies",
        mode: str = "max",
        save_top_k: int = 1,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=f"step={{step}}-{monitor.rpartition('/')[2]}={{{monitor}:.3f}}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a resumed run may write one again, the same
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and have checkpoints written durably."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            make_durable(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint says, but for files that are not in this callback's own folder."""
        super().load_state_dict(believe(state_dict, self))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless every pair is a tie: nothing has been learned then."""
        if not all_ties(trainer):
            super().on_validation_end(trainer, pl_module)


def all_ties(trainer: Trainer) -> bool:
    """Whether policy and reference gave every validation pair the same rewards."""
    ties = trainer.callback_metrics.get("val/rewards/ties")
    return ties is not None and float(ties) == 1.0
