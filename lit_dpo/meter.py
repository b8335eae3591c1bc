"""What a run measures: values of single pairs, means that are logged, their history, and its speed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lit_dpo.gradients import SeenPairs
from lit_dpo.losses import PreferenceLoss
from lit_dpo.metrics import SHOWN, PairMeans, pair_metrics
from lit_dpo.pairs import PairBatch, PairLogps


def completes_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step ends with this batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def logs_now(trainer: Trainer) -> bool:
    """Whether the optimizer step under way is one that is logged."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
    return (trainer.global_step + 1) % interval == 0


@dataclass(frozen=True)
class StepPairs:
    """What a training step has found of each of its pairs, for callbacks; nothing of it is computed twice.

    All tensors are detached and on the device: reading them as numbers waits for it. With accumulation these are the
    pairs of one batch, not of the whole optimizer step; of several processes each has its own.

    Args:
        row_ids: Row numbers, shape `(batch,)`.
        losses: Loss of each pair, its weight included, shape `(batch,)`.
        chosen_rewards: Implicit rewards of the chosen completions, shape `(batch,)`.
        rejected_rewards: The same of the rejected ones; `None` if the loss never looks at them.
        weights: 0 for a pair that only fills a batch up, shape `(batch,)`; `None` if there is no such pair.
        policy: Log-probs under the policy, before the step.
        reference: Log-probs under the reference, zeros without one.
    """

    row_ids: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor | None
    weights: Tensor | None
    policy: PairLogps
    reference: PairLogps


class History:
    """Logged values as plain numbers, one dictionary for each time that something was logged, `step` first.

    Reading a value waits for the device, so values are kept as they are until `settle` is called where it has been
    waited for already.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._settled = 0

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Add values that were logged after so many optimizer steps."""
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": step, **values})

    def settle(self) -> list[dict[str, Any]]:
        """All rows, every value a number."""
        for row in self._rows[self._settled :]:
            row.update({name: float(value) for name, value in row.items() if isinstance(value, Tensor)})
        self._settled = max(0, len(self._rows) - 1)  # more may come to the last one
        return self._rows

    def dump(self) -> str:
        """The rows as text, for a checkpoint."""
        return json.dumps(self.settle())

    def load(self, text: object) -> None:
        """Take up the rows of a checkpoint.

        Raises:
            ValueError: It holds something else.
        """
        rows = json.loads(text) if isinstance(text, str) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
            raise ValueError(
                "The checkpoint's `history` is no list of logged values: give one written by `lit-dpo fit`."
            )
        self._rows, self._settled = rows, len(rows)


class Meter:
    """Collects what the steps of a module find, and logs it for the module.

    Attributes:
        last: Of the last training step.
        seen: Of the batches in the optimizer step under way.
        history: All that this fit has logged.
    """

    def __init__(self) -> None:
        self.last: StepPairs | None = None
        self.seen: list[SeenPairs] = []
        self.history = History()
        self._means = {stage: PairMeans() for stage in ("train", "val", "test")}  # no modules of the model's
        self._tokens, self._since = 0, 0.0

    def forget(self) -> None:
        """Start anew, as for another fit."""
        self._means["train"].reset()
        self.seen, self.history = [], History()

    def restart_clock(self) -> None:
        """Count tokens a second from now on."""
        self._tokens, self._since = 0, time.perf_counter()

    def add(
        self,
        stage: str,
        batch: PairBatch,
        loss: PreferenceLoss,
        losses: Tensor,
        policy: PairLogps,
        reference: PairLogps,
        rejected: bool,
    ) -> None:
        """Add a batch to the means of a stage, and keep its pairs if it is one of training.

        Args:
            stage: `train`, `val` or `test`.
            batch: The pairs, as they were scored.
            loss: What was computed.
            losses: Its value for each pair, shape `(batch,)`.
            policy: Log-probs under the policy.
            reference: The same under the reference.
            rejected: Whether rejected completions were scored.
        """
        with torch.no_grad():
            values = pair_metrics(loss, losses, policy, reference, rejected)
            self._means[stage].update(values, batch.weights)
        if stage == "train":
            self._tokens += sum(map(sum, batch.shape))
            rewards = values["rewards/chosen"], values.get("rewards/rejected")
            both = policy.detach(), reference
            self.last = StepPairs(batch.row_ids, values["loss"], *rewards, batch.weights, *both)
            self.seen.append(SeenPairs(batch.row_ids, values["loss"], *both))

    def log(self, module: LightningModule, stage: str) -> None:
        """Log the means of a stage since the last time, and in training how many tokens a second there were."""
        trainer, means = module.trainer, self._means[stage]
        values: dict[str, Any] = {f"{stage}/{name}": value for name, value in means.compute().items()}
        bar = {short: values.get(f"train/{name}") for name, short in SHOWN.items()}
        if stage == "train":
            now = time.perf_counter()
            bar["tokens/s"] = speed = self._tokens * trainer.world_size / (now - self._since)
            values["train/tokens_per_second"] = speed
            self._tokens, self._since = 0, now
        for name, value in values.items():
            # The means are of all processes already; `sync_dist` only tells Lightning not to warn that they are not.
            module.log(name, value, batch_size=1, sync_dist=stage != "train")
        for name, value in bar.items():
            if value is not None:
                module.log(name, value, prog_bar=True, logger=False, batch_size=1)
        a_few = trainer.sanity_checking and trainer.num_sanity_val_steps != math.inf
        if trainer.state.fn == "fit" and not a_few:
            self.history.add(trainer.global_step + (stage == "train"), values)
        means.reset()
        if stage == "val":  # which is no training time
            self.restart_clock()

    def log_step(self, module: LightningModule, norm: Tensor, rate: float) -> None:
        """Log the gradient's norm and the learning rate, once the device has been waited for."""
        values: dict[str, Tensor | float] = {"train/grad_norm": norm, "lr": rate}
        for name, value in values.items():
            module.log(name, value, batch_size=1)
        self.history.add(module.trainer.global_step + 1, values)
        self.history.settle()

    def kept(self, strategy: Strategy) -> dict[str, Any]:
        """What a checkpoint holds of it; every process takes part."""
        return {**self._means["train"].kept(strategy), "history": self.history.dump()}

    def restore(self, state: Mapping[str, Any], rank: int) -> None:
        """Take up what `kept` gave."""
        self._means["train"].restore(state, rank)
        if "history" in state:  # release 0.1.0 kept none
            self.history.load(state["history"])

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take the sums to where a module goes."""
        for means in self._means.values():
            means._apply(fn)
