"""Validation against the first model of a run, so that its steps compare."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_dpo.losses import per_pair
from lit_dpo.metrics import PairMeans, pair_metrics
from lit_dpo.models import ModelDescription, load_model
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.pretrained import Loading


class FirstModelMetrics(Callback):
    """Log the validation metrics as measured from the first model too: `val/first/NAME` beside each `val/NAME`.

    In stepwise training `val/` is measured from the reference of the step, and so it begins at zero in each one. What
    is measured from one and the same model compares between steps and between runs.

    The first validation loads the model and scores the validation pairs with it: one forward pass, and the memory of
    one more model until it is over, whole on each process also where the policy is sharded. After that only its
    log-probs are kept, a few numbers a pair, or one a token for a loss over tokens.

    Args:
        model: The first model: a hub name, a folder, or a description.
        loading: Its revision, attention and quantization.
    """

    logs_under: ClassVar[str] = "val/first/"

    def __init__(self, model: str | ModelDescription, loading: Loading = Loading()) -> None:  # noqa: B008 - frozen
        self.model, self.loading = model, loading
        self._known: dict[tuple[int, ...], PairLogps] = {}  # by the row numbers of a batch
        self._loaded: nn.Module | None = None
        self._means = PairMeans()
        self._hook: RemovableHandle | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what the module computes of each batch."""
        self._means = PairMeans().to(pl_module.device)
        self._hook = pl_module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[PairBatch], output: tuple[PairLogps, PairLogps]) -> None:
        assert isinstance(module, PreferenceModule)
        (batch,), (policy, _) = args, output
        first = replace(self._score(module, batch), columns=batch.columns)
        losses = per_pair(module.loss, policy, first)  # (batch,)
        losses = losses * batch.columns.get("weight", torch.ones_like(losses))
        self._means.update(pair_metrics(module.loss, losses, policy, first), batch.weights)

    def _score(self, module: PreferenceModule, batch: PairBatch) -> PairLogps:
        key = tuple(batch.row_ids.tolist())
        if key not in self._known:
            if self._loaded is None:
                options = (module.dtype_name, module.init_seed, self.loading)
                model: nn.Module = load_model(self.model, module.tokenizer, *options)
                self._loaded = model.requires_grad_(False).to(module.device)
            self._known[key] = module.scorer(self._loaded, batch)
        return self._known[key]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the validation pairs."""
        for name, value in self._means.compute().items():
            # The means are of all processes already; `sync_dist` only tells Lightning not to warn that they are not.
            pl_module.log(f"{self.logs_under}{name}", value, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the model go."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the model go."""
        self._leave()

    def _leave(self) -> None:
        self._loaded = None
        if self._hook is not None:
            self._hook.remove()
