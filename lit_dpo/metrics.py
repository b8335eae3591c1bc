"""What is measured of every pair, and its exact mean over a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lit_dpo.losses import PreferenceLoss, implicit_rewards
from lit_dpo.pairs import PairLogps

SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""What a progress bar shows, under names as short as its line."""


def pair_metrics(loss: PreferenceLoss, losses: Tensor, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
    """Values worth averaging over pairs, under TRL's names where it has one, each of shape ``(batch,)``.

    ``rewards/accuracies`` is the share of pairs whose chosen reward lies above the rejected one; a tie counts one
    half, and ``rewards/ties`` is the share of ties. With a reference there are also ``displacement``, the share of
    pairs whose chosen completion became less likely than under the reference, ``reference/margins`` (nats) and
    ``reference/accuracies``. For a loss without a reference, rewards are plain log-probs times beta.

    ``length/longer`` is the share of pairs whose chosen completion has more tokens than the rejected one, and
    ``length/longer_won`` the share of pairs that are so and whose chosen reward lies above (a tie counts one half);
    their quotient is the accuracy among those pairs. ``length/shorter`` and ``length/shorter_won`` are the same for
    fewer tokens.

    Args:
        loss: Gives the scale of rewards and the names of its parts.
        losses: Its value for each pair, shape ``(batch,)``.
        policy: Log-probs under the policy.
        reference: Log-probs under the reference, or zeros.
    """
    policy = policy.detach()
    chosen, rejected = implicit_rewards(policy, reference, loss.beta)
    values = {
        "loss": losses.detach(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": _win(chosen - rejected),
        "rewards/ties": (chosen == rejected).to(chosen.dtype),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    if loss.needs_reference:
        values["displacement"] = (chosen < 0).to(chosen.dtype)
        values["reference/margins"] = reference.margin
        values["reference/accuracies"] = _win(reference.margin)
    difference = policy.chosen_tokens - policy.rejected_tokens
    for name, among in {"longer": difference > 0, "shorter": difference < 0}.items():
        values[f"length/{name}"] = among.to(chosen.dtype)
        values[f"length/{name}_won"] = torch.where(among, values["rewards/accuracies"], 0.0)
    values |= {f"loss/{name}": value for name, value in loss.parts(policy, reference).items()}
    return values


def _win(margin: Tensor) -> Tensor:
    """1 above zero, 0 below, one half at zero; NaN stays NaN."""
    return torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # the sign of NaN is 0


class PairMeans(Metric):
    """Means of named per-pair values over everything seen since the last reset, exact and in one reduction.

    Sums are kept in float64, so the means do not depend on batch size, batch order or number of processes. Pairs of
    weight zero count nowhere.

    >>> means = PairMeans()
    >>> means.update({"loss": torch.tensor([1.0, 3.0])})
    >>> means.update({"loss": torch.tensor([8.0, 99.0])}, weights=torch.tensor([1.0, 0.0]))
    >>> means.compute()["loss"].item()
    4.0
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()
        # One vector, so that one collective reduces all: the number of pairs, then a sum for every name.
        self.add_state("sums", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], weights: Tensor | None = None) -> None:
        """Add the values of some pairs, each of shape ``(batch,)``; a pair counts if its weight is not zero."""
        table = torch.stack(
            [torch.ones_like(next(iter(values.values()))), *values.values()]
        ).double()  # (names + 1, batch)
        if weights is not None:
            table = torch.where(weights != 0, table, 0.0)
        self.names = tuple(values)
        self.sums = self.sums + table.sum(1)  # the first update broadcasts from (1,)

    def compute(self) -> dict[str, Tensor]:
        """The mean of every name, 0-dimensional float32."""
        means = (self.sums[1:] / self.sums[0]).float()
        return dict(zip(self.names, means, strict=True))

    def kept(self, strategy: Strategy) -> dict[str, Any]:
        """Names and sums over all processes, for a checkpoint; every process takes part."""
        sums: Tensor = strategy.reduce(self.sums.clone(), reduce_op="sum")
        return {"names": list(self.names), "sums": sums.cpu()}

    def restore(self, state: Mapping[str, Any], rank: int) -> None:
        """Take up what `kept` gave; the first process holds it for all."""
        self.names = tuple(state["names"])
        self.sums = state["sums"].to(self.sums.device) * (rank == 0)
        self._update_count = 1  # else torchmetrics warns that nothing was added


def metric_names(loss: PreferenceLoss, validates: bool) -> set[str]:
    """Names of everything that a fit measures.

    Args:
        loss: With its decoder blocks settled.
        validates: Whether there is validation.
    """
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.long)
    single = PairLogps(zero, zero, one, one, tokens=torch.zeros(2), columns=dict.fromkeys(loss.columns, zero))
    nothing = replace(single, layers={int(layer): single for layer in loss.layers})
    stages = ("train", "val") if validates else ("train",)
    names = {f"{stage}/{name}" for stage in stages for name in pair_metrics(loss, zero, nothing, nothing)}
    return names | {"train/tokens_per_second", "train/grad_norm", "lr"}


def check_monitors(trainer: Trainer, loss: PreferenceLoss) -> None:
    """Refuse callbacks that watch a metric which this fit does not measure, before anything is computed.

    Without validation our own callbacks for it do nothing, which is said. Where a module or callback of the user's may
    log metrics of its own, no name can be known to be wrong.

    Raises:
        ValueError: There is no such metric.
    """
    watching = [c for c in trainer.callbacks if isinstance(c, EarlyStopping | ModelCheckpoint) and c.monitor]  # type: ignore[attr-defined]
    loggers = [trainer.lightning_module, loss, *trainer.callbacks]  # type: ignore[attr-defined]
    if not watching or any(type(each).__module__.partition(".")[0] not in ("lit_dpo", "lightning") for each in loggers):
        return
    validates = trainer.enable_validation
    names, everything = metric_names(loss, validates), metric_names(loss, True)
    idle = []
    for callback in watching:
        monitor = callback.monitor
        if monitor in names:
            continue
        name = type(callback).__name__
        if monitor in everything and type(callback).__module__.startswith("lit_dpo."):
            idle.append(f"`{name}`")
            continue
        why = "without validation there is none" if monitor in everything else "there is no such metric"
        raise ValueError(f"`{name}` watches `{monitor}`, and {why}: name one of {', '.join(sorted(names))}.")
    if idle:
        rank_zero_info(
            f"There is no validation, so {' and '.join(idle)} can do nothing: training goes on to its end, and the "
            "policy to export is the last one."
        )
