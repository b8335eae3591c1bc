"""Models that Lightning Fabric has wrapped: scored under its precision, their gradients synchronised by its DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_dpo.pairs import PairBatch, PairLogps


def is_fabrics(model: Any) -> bool:
    """Whether a model is what `Fabric.setup` gives back."""
    return "_original_module" in getattr(model, "_modules", {})


def in_fabric(model: Any, run: Callable[[nn.Module, PairBatch], PairLogps], batch: PairBatch) -> PairLogps:
    """Score by the model inside of Fabric's wrapper, under the precision that Fabric was given.

    Args:
        model: The model as Fabric has wrapped it.
        run: Scores by the model inside.
        batch: B pairs on its device.

    Raises:
        ValueError: Fabric's strategy wraps the model in something other than DDP.
    """
    inner, outer = model._original_module, model._forward_module
    with model._strategy.precision.forward_context():
        if outer is inner:
            return run(inner, batch)
        if not isinstance(outer, DistributedDataParallel):
            raise ValueError(
                f"Under Fabric a model can be scored as it is or in DDP, not in {type(outer).__name__}: use the "
                "strategy `ddp`, or `lit-dpo fit` for sharded models."
            )
        own = vars(inner).pop("forward", None)

        def forward(batch: PairBatch) -> PairLogps:
            del inner.forward  # whatever is called from here on is the model's own
            return run(inner, batch)

        inner.forward = forward
        try:
            logps: PairLogps = outer(batch)  # DDP sees to gradients around `forward` alone
            return logps
        finally:
            vars(inner).pop("forward", None)
            if own is not None:
                inner.forward = own
