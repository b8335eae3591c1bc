"""What a run has learned, and which command comes next."""

from __future__ import annotations

import math
import shlex
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "displacement")


class RunSummary(Callback):
    """Print a table of the first, the best and the last validation at the end of training, and what to do next.

    With ``num_sanity_val_steps: -1`` the first one is from before training. The best is ranked as the run's checkpoint
    callback ranks, or by reward accuracy without one.
    """

    def __init__(self) -> None:
        self._history: list[tuple[int, dict[str, float]]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of the validations before."""
        return {"history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the validations before."""
        self._history = [(step, dict(values)) for step, values in state_dict["history"]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the values of this validation; those from before the first step if they are of the whole split."""
        if not trainer.sanity_checking or trainer.num_sanity_val_steps == math.inf:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._history.append((trainer.global_step, values))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process."""
        if trainer.is_global_zero and self._history:
            console = Console()
            console.print(self._table(trainer))
            console.print(self._next(trainer), soft_wrap=True, highlight=False)

    def _table(self, trainer: Trainer) -> Table:
        callback = trainer.checkpoint_callback
        monitor = getattr(callback, "monitor", None) or "val/rewards/accuracies"
        sign = -1 if getattr(callback, "mode", "max") == "min" else 1
        best = max(self._history, key=lambda entry: sign * entry[1].get(monitor, -sign * math.inf))
        columns = {"first": self._history[0], "best": best, "last": self._history[-1]}
        table = Table("", title="Validation")
        for title, (step, _) in columns.items():
            table.add_column(f"{title}\n(step {step})", justify="right")
        for name in _SHOWN:
            values = [values.get(f"val/{name}") for _, values in columns.values()]
            if any(value is not None for value in values):
                table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values))
        return table

    @staticmethod
    def _next(trainer: Trainer) -> str:
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not path:
            return "No best checkpoint was kept; add `BestCheckpoint` to `trainer.callbacks` to keep the best policy."
        return f"Best checkpoint: {path}\nNext: {shlex.join(['lit-dpo', 'export', path, 'OUTPUT_DIR'])}"
