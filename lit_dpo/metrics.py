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

from lit_dpo.lightning_private import mark_updated
from lit_dpo.losses import PreferenceLoss, implicit_rewards
from lit_dpo.pairs import PairBatch, PairLogps

SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""What a progress bar shows, under names as short as its line."""


def pair_metrics(
    loss: PreferenceLoss, losses: Tensor, policy: PairLogps, reference: PairLogps, rejected: bool = True
) -> dict[str, Tensor]:
    """Values worth averaging over pairs, under TRL's names where it has one, each of shape `(batch,)`.

    `rewards/accuracies` is the share of pairs whose chosen reward lies above the rejected one; a tie counts one
    half, and `rewards/ties` is the share of ties. With a reference there are also `displacement`, the share of
    pairs whose chosen completion became less likely than under the reference, `reference/margins` (nats) and
    `reference/accuracies`. For a loss without a reference, rewards are plain log-probs times beta.

    `length/longer` is the share of pairs whose chosen completion has more tokens than the rejected one, and
    `length/longer_won` the share of pairs that are so and whose chosen reward lies above (a tie counts one half);
    their quotient is the accuracy among those pairs. `length/shorter` and `length/shorter_won` are the same for
    fewer tokens.

    Args:
        loss: Gives the scale of rewards and its own named terms.
        losses: Its value for each pair, shape `(batch,)`.
        policy: Log-probs under the policy.
        reference: Log-probs under the reference, or zeros.
        rejected: Whether the rejected completions were scored; if not, nothing that needs them is measured.
    """
    policy = policy.detach()
    chosen, other = implicit_rewards(policy, reference, loss.beta)
    values = {"loss": losses.detach(), "rewards/chosen": chosen}
    if rejected:
        values |= {
            "rewards/rejected": other,
            "rewards/margins": chosen - other,
            "rewards/accuracies": _win(chosen - other),
            "rewards/ties": (chosen == other).to(chosen.dtype),
        }
    values["logps/chosen"] = policy.chosen
    if rejected:
        values["logps/rejected"] = policy.rejected
    if loss.needs_reference:
        values["displacement"] = (chosen < 0).to(chosen.dtype)
        values["reference/margins"] = reference.margin
        values["reference/accuracies"] = _win(reference.margin)
    if rejected:
        difference = policy.chosen_tokens - policy.rejected_tokens
        for name, among in {"longer": difference > 0, "shorter": difference < 0}.items():
            values[f"length/{name}"] = among.to(chosen.dtype)
            values[f"length/{name}_won"] = torch.where(among, values["rewards/accuracies"], 0.0)
    values |= {f"loss/{name}": value for name, value in loss.terms(policy, reference).items()}
    return values


def _win(margin: Tensor) -> Tensor:
    """1 above zero, 0 below, one half at zero; NaN stays NaN."""
    return torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # the sign of NaN is 0


def predictions(
    loss: PreferenceLoss, batch: PairBatch, policy: PairLogps, reference: PairLogps | None, tokens: bool = False
) -> dict[str, Any]:
    """What `predict` gives of each pair, on the CPU: a tensor of shape `(batch,)` a name.

    `row_id`, `reward_chosen`, `reward_rejected`, `margin`, then log-probs in nats: `logp_chosen`,
    `logp_rejected`, and with a reference `reference_logp_chosen` and `reference_logp_rejected`; and the lengths
    `chosen_tokens` and `rejected_tokens`. Of single tokens,
    if asked for, there are `tokens_chosen`, `tokens_rejected`, `reference_tokens_chosen` and
    `reference_tokens_rejected`, each a list of one tensor a pair.

    Args:
        loss: Gives the scale of rewards.
        batch: The pairs; those of weight zero are left out.
        policy: Log-probs under the policy.
        reference: The same under the reference; `None` if there is none.
        tokens: Give those of single tokens, which must have been kept.
    """
    chosen, rejected = implicit_rewards(policy, policy.zeros() if reference is None else reference, loss.beta)
    values = {"row_id": batch.row_ids, "reward_chosen": chosen, "reward_rejected": rejected}
    values["margin"] = chosen - rejected
    real = slice(None) if batch.weights is None else batch.weights.cpu() != 0
    sources = {"": policy} | ({} if reference is None else {"reference_": reference})
    for prefix, logps in sources.items():
        values |= {f"{prefix}logp_chosen": logps.chosen, f"{prefix}logp_rejected": logps.rejected}
    values |= {"chosen_tokens": policy.chosen_tokens, "rejected_tokens": policy.rejected_tokens}
    found: dict[str, Any] = {name: value.cpu()[real] for name, value in values.items()}
    kept = torch.arange(len(batch))[real].tolist()
    for prefix, logps in sources.items() if tokens else ():
        parts = [part.cpu() for part in logps.split_tokens()]
        for place, side in enumerate(("chosen", "rejected")):
            found[f"{prefix}tokens_{side}"] = [parts[2 * pair + place] for pair in kept]
    return found


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
        """Add the values of some pairs, each of shape `(batch,)`; a pair counts if its weight is not zero."""
        table = torch.stack(
            [torch.ones_like(next(iter(values.values()))), *values.values()]
        ).double()  # (names + 1, batch)
        if weights is not None:
            table = torch.where(weights != 0, table, 0.0)
        if len(self.sums) > 1 and self.names != tuple(values):  # restored from a run that measured something else
            found = dict(zip(self.names, self.sums[1:], strict=True))
            zero = torch.zeros_like(self.sums[0])
            self.sums = torch.stack([self.sums[0], *(found.get(name, zero) for name in values)])
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
        mark_updated(self)


def metric_names(loss: PreferenceLoss, validates: bool, rejected: bool | None = None) -> set[str]:
    """Names of everything that a fit measures.

    Args:
        loss: The loss, its depths resolved to block numbers.
        validates: Whether there is validation.
        rejected: Whether rejected completions are scored in training; `None` is if the loss needs them.
    """
    rejected = loss.needs_rejected if rejected is None else rejected
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.long)
    single = PairLogps(zero, zero, one, one, tokens=torch.zeros(2), columns=dict.fromkeys(loss.columns, zero))
    nothing = replace(single, layers={int(layer): single for layer in loss.layers})
    scored = {"train": rejected, "val": True} if validates else {"train": rejected}
    names = {
        f"{stage}/{name}" for stage, both in scored.items() for name in pair_metrics(loss, zero, nothing, nothing, both)
    }
    return names | {"train/tokens_per_second", "train/grad_norm", "lr"}


def check_monitors(trainer: Trainer, loss: PreferenceLoss, rejected: bool | None = None) -> None:
    """Refuse callbacks that watch a metric which this fit does not measure, before anything is computed.

    Without validation our own callbacks for it do nothing, which is said. Where a module or callback of the user's may
    log metrics of its own, no name can be known to be wrong.

    Args:
        trainer: Of the fit.
        loss: With its decoder blocks settled.
        rejected: As for `metric_names`.

    Raises:
        ValueError: There is no such metric.
    """
    watching = [c for c in trainer.callbacks if isinstance(c, EarlyStopping | ModelCheckpoint) and c.monitor]  # type: ignore[attr-defined]
    loggers = [trainer.lightning_module, loss, *trainer.callbacks]  # type: ignore[attr-defined]
    if not watching or any(type(each).__module__.partition(".")[0] not in ("lit_dpo", "lightning") for each in loggers):
        return
    validates = trainer.enable_validation
    under = [c.logs_under for c in trainer.callbacks if hasattr(c, "logs_under")]  # type: ignore[attr-defined]
    names, everything = (
        {*found, *(f"{prefix}{name[4:]}" for prefix in under for name in found if name.startswith("val/"))}
        for found in (metric_names(loss, validates, rejected), metric_names(loss, True, rejected))
    )
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
