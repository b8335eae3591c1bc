"""What a run trains, what it has learned, and which command comes next."""

from __future__ import annotations

import math
import shlex
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from rich.console import Console
from rich.table import Table

from lit_dpo.callbacks.findings import findings
from lit_dpo.callbacks.progress import finish_progress
from lit_dpo.module import PreferenceModule

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "displacement")


class RunSummary(Callback):
    """Print a table of the first, the best and the last validation at the end of training, and what to do next.

    Between the two stands what the validations show, in a sentence each; see `lit_dpo.callbacks.findings`; and before
    it, which metric ended the run, if early stopping did. With `num_sanity_val_steps: -1` the first validation is from
    before training. The best is ranked as the run's checkpoint callback ranks, or by reward accuracy without one.
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
        finish_progress(trainer)
        if trainer.is_global_zero and self._history:
            console = Console()
            console.print(self._table(trainer))
            for sentence in [*_stopped_early(trainer), *findings(self._history, _validated(trainer))]:
                console.print(sentence, highlight=False, markup=False)
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
        if not path and getattr(trainer.checkpoint_callback, "monitor", None):
            return "No best checkpoint was kept, as no validation gave one: validate more often, or train for longer."
        if not path:
            return "No best checkpoint was kept; add `BestCheckpoint` to `trainer.callbacks` to keep the best policy."
        return f"Best checkpoint: {path}\nNext: {shlex.join(['lit-dpo', 'export', path, 'OUTPUT_DIR'])}"


def _stopped_early(trainer: Trainer) -> list[str]:
    """What early stopping says, if it is what ended the run, before its last step."""
    reasons = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks if trainer.should_stop]
    said = [reason.removesuffix(" Signaling Trainer to stop.") for reason in reasons if reason]
    if not said or trainer.global_step >= trainer.estimated_stepping_batches:
        return []
    return [f"Stopped early, at step {trainer.global_step}: {reason}" for reason in said]


def _validated(trainer: Trainer) -> int | None:
    """How many pairs a validation is over, if all of a known split."""
    split = getattr(getattr(getattr(trainer, "datamodule", None), "training", None), "validation", None)
    return len(split) if split is not None and trainer.limit_val_batches == 1.0 else None


class PolicyLine(Callback):
    """Say at the start of a fit what is trained: its class, its parameters, and how many of them learn."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line on the first process."""
        assert isinstance(pl_module, PreferenceModule)
        policy: Any = pl_module.policy
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        line = f"Policy: {type(model).__name__.removeprefix('FSDP')}"
        if not isinstance(trainer.strategy, FSDPStrategy):  # which leaves a process its own share of the parameters
            size = sum(p.numel() for p in policy.parameters())
            trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
            line += f", {_count(size)} parameters, {'all' if trained == size else _count(trained)} of them trained"
        if trainer.is_global_zero:
            Console().print(line, highlight=False, soft_wrap=True)


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"
