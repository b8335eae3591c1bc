"""The LightningModule: a policy, a reference, and a loss object."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.hparams import alive, plain
from lit_dpo.losses import DPOLoss, PreferenceLoss, implicit_rewards
from lit_dpo.metrics import PairMeans, pair_metrics
from lit_dpo.models import Dtype, LoRA, ModelDescription, load_model, load_tokenizer
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.reference import AdapterReference, FrozenReference, Reference, Start
from lit_dpo.schedules import WarmupDecay
from lit_dpo.scoring import Layout, choose_layout, decoder_parts, score
from lit_dpo.strategies import shard


class PreferenceModule(LightningModule):
    """Preference-tunes a causal language model with any `PreferenceLoss`.

    The training objective is the mean of the loss over pairs, whatever the batch size, accumulation or number of
    processes. Logged under ``train/``, ``val/`` and ``test/``: see `lit_dpo.metrics.pair_metrics`.

    Args:
        model: The policy to start from: a hub name, a local folder, or a description such as
            ``{model_type: llama, hidden_size: 256, ...}`` for random weights.
        loss: The objective; its repr is printed at the start of a run.
        reference: Where reference log-probs come from. ``None`` is `AdapterReference` with an adapter, else
            `FrozenReference`; a loss that needs no reference gets none.
        adapter: Train low-rank adapters instead of all weights.
        tokenizer: Hub name or folder of the tokenizer; ``None`` takes that of `model`.
        optimizer: Makes the optimizer from the trained parameters.
        lr_scheduler: Makes the schedule from the optimizer, stepped once an optimizer step; ``None`` keeps the
            learning rate constant.
        dtype: Of the weights. Keep float32 and set the Trainer's ``precision: bf16-mixed`` to compute in bfloat16: at
            the usual learning rates a bfloat16 weight does not move.
        layout: ``flat`` computes no padding and each prompt once; ``padded`` serves every model; ``auto`` picks.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        init_seed: Seed of the random weights of a description, and of adapters.

    Raises:
        ValueError: An option is out of its range, or (when the models are built) there is no such model.
    """

    def __init__(
        self,
        model: str | ModelDescription,
        loss: PreferenceLoss = DPOLoss(),  # noqa: B008 - frozen
        reference: Reference | None = None,
        adapter: LoRA | None = None,
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = WarmupDecay,
        dtype: Dtype = "float32",
        layout: Layout = "auto",
        gradient_checkpointing: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("A `model` described by its config has no tokenizer of its own: set `tokenizer`.")
        # From a checkpoint these come as plain values.
        loss, reference = alive(loss), alive(reference)
        adapter = LoRA(**adapter) if isinstance(adapter, dict) else adapter
        self.model, self.loss, self.adapter, self.dtype_name = model, loss, adapter, dtype
        self.tokenizer_source = tokenizer or str(model)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.layout, self.gradient_checkpointing, self.init_seed = layout, gradient_checkpointing, init_seed
        self.reference = self._default_reference() if reference is None else reference
        self.policy: nn.Module | None = None
        self.means = nn.ModuleDict({f"{stage}_means": PairMeans() for stage in ("train", "val", "test")})
        self._settled: Layout | None = None
        self._prepared_for: str | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokens, self._since = 0, 0.0
        options = {"model": model, "loss": loss, "reference": reference, "adapter": adapter, "tokenizer": tokenizer}
        options |= {"dtype": dtype, "init_seed": init_seed}
        self.save_hyperparameters({name: plain(value) for name, value in options.items()})

    def _default_reference(self) -> Reference | None:
        if not self.loss.needs_reference:
            return None
        return FrozenReference() if self.adapter is None else AdapterReference()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_source)
        return self._tokenizer

    def configure_model(self) -> None:
        """Load policy and reference, once, and settle how many decoder blocks the loss can name."""
        if self.policy is not None:
            return
        base = self._load()
        self.loss = self.loss.resolve(len(decoder_parts(base).blocks))
        if self.reference is not None:
            self.reference.build(base, self.tokenizer, self.dtype_name)
        policy: nn.Module = base if self.adapter is None else self.adapter.attach(base, self.init_seed)
        if self.gradient_checkpointing:
            older = base.gradient_checkpointing_enable  # the one name in transformers 5.17, deprecated in 5.23
            getattr(base, "activation_checkpointing_enable", older)({"use_reentrant": False})
        if self.reference is not None:
            self.reference.check(policy)
        if self.device_mesh is not None:
            for model in (policy, *(self.reference.models() if self.reference is not None else [])):
                shard(model, self.device_mesh["data_parallel"], self.trainer.precision)
        self.policy = policy.train()  # from_pretrained leaves it in eval mode, and Lightning keeps modes

    def _load(self) -> PreTrainedModel:
        return load_model(self.model, self.tokenizer, self.dtype_name, self.init_seed)

    def restart_from(self, model: str | ModelDescription) -> None:
        """Forget the policy; the next run loads it from another folder, as the reference. Adapters start anew."""
        self.model, self.policy, self._settled, self._prepared_for = model, None, None, None
        self.hparams["model"] = model

    # -- the one step -------------------------------------------------------------------------------------------------

    def forward(self, batch: PairBatch) -> tuple[PairLogps, PairLogps]:
        """Log-probs of a batch under policy and reference; a loss without a reference gets zeros for it."""
        assert self.policy is not None
        layout = self._settled or self.layout
        reference = None
        if self.reference is not None:
            reference = self.reference.score(self.policy, batch, self.loss.layers, layout)
        policy = score(self.policy, batch, self.loss.layers, detach_head=self.loss.detach_head, layout=layout)
        return policy, reference or policy.detach().zeros()

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        policy, reference = self(batch)
        losses = self.loss(policy, reference)  # (batch,)
        with torch.no_grad():
            self._means(stage).update(pair_metrics(self.loss, losses, policy, reference), batch.weights)
        return losses.mean() if batch.weights is None else (batch.weights * losses).mean()

    def _means(self, stage: str) -> PairMeans:
        means = self.means[f"{stage}_means"]
        assert isinstance(means, PairMeans)
        return means

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss over the pairs of a batch."""
        self._tokens += len(batch.input_ids)
        return self._step(batch, "train")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the means of ``val/``."""
        self._step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the means of ``test/``."""
        self._step(batch, "test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Per-pair rewards and log-probs, each of shape ``(batch,)``, fillers of weight zero left out."""
        policy, reference = self(batch)
        chosen, rejected = implicit_rewards(policy, reference, self.loss.beta)
        values = {
            "row_id": batch.row_ids,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": chosen - rejected,
            "logp_chosen": policy.chosen,
            "logp_rejected": policy.rejected,
        }
        real = slice(None) if batch.weights is None else batch.weights != 0
        return {name: value[real].cpu() for name, value in values.items()}

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _log_means(self, stage: str) -> None:
        means = self._means(stage)
        values = {f"{stage}/{name}": value for name, value in means.compute().items()}
        shown = {f"{stage}/{name}" for name in ("loss", "rewards/accuracies", "rewards/margins")}
        for name, value in values.items():
            # The means are of all processes already; `sync_dist` only tells Lightning not to warn that they are not.
            self.log(name, value, prog_bar=name in shown, batch_size=1, sync_dist=stage != "train")
        means.reset()

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """After an optimizer step free the gradients; every ``log_every_n_steps`` steps log the means since then."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        # Lightning zeroes after the next forward pass; until then the gradients would stand beside its activations.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
        if self.trainer.global_step % interval == 0:
            self._log_means("train")
            now = time.perf_counter()
            speed = self._tokens * self.trainer.world_size / (now - self._since)
            self.log("train/tokens_per_second", speed, prog_bar=True, batch_size=1)
            self._tokens, self._since = 0, now

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation pairs."""
        self._log_means("val")
        self._tokens, self._since = 0, time.perf_counter()  # validation is no training time

    def on_test_epoch_end(self) -> None:
        """Log the means over the test pairs."""
        self._log_means("test")

    # -- start of a run -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._settled is None:
            self._settle()
        stage = str(self.trainer.state.fn)
        if self.reference is not None and self._prepared_for != stage:
            assert self.policy is not None
            layers = tuple(int(layer) for layer in self.loss.layers)
            layout = self._settled or self.layout
            self.reference.prepare(Start(self.trainer, self.policy, self._load, layers, layout))
            self._prepared_for = stage

    def _settle(self) -> None:
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"`precision: {self.trainer.precision}` rounds rotary positions too and makes long texts wrong: "
                "set the module's `dtype: bfloat16` and leave the Trainer at `32-true`, or use `bf16-mixed`."
            )
        assert self.policy is not None
        self._settled, reason = choose_layout(self.policy, self.layout)
        if reason is not None:
            rank_zero_info(f"Scoring pairs as padded rows: {reason}.")
        rank_zero_info(f"Loss: {self.loss!r}; reference: {type(self.reference).__name__ if self.reference else 'none'}")

    def on_fit_start(self) -> None:
        """Audit the scoring, settle the layout, and let the reference get ready."""
        self._prepared_for = None  # the partition may have changed
        self._start()
        self._tokens, self._since = 0, time.perf_counter()

    def on_validation_start(self) -> None:
        """As `on_fit_start`, for a run of its own."""
        self._start()

    def on_test_start(self) -> None:
        """As `on_fit_start`."""
        self._start()

    def on_predict_start(self) -> None:
        """As `on_fit_start`."""
        self._start()

    def configure_optimizers(self) -> Any:
        """The optimizer over trained parameters, and the schedule bound to the number of optimizer steps."""
        assert self.policy is not None
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupDecay) and scheduler.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if steps == math.inf:
                raise ValueError(
                    "`lr_scheduler` cannot know when training ends: set the Trainer's `max_epochs` or `max_steps`, or "
                    "`lr_scheduler.total_steps`."
                )
            scheduler.bind(int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreferenceModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.reference is not None:
            self.reference.move(fn, recurse)
        return self
