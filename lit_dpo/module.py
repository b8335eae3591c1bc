"""The LightningModule: a policy, a reference, and a loss object."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_dpo.adapters import LoRA
from lit_dpo.assembly import Assembly, settled_form
from lit_dpo.checkpoints.foreign import believe_all
from lit_dpo.gradients import (
    SeenPairs,
    clip,
    gradient_norm,
    refuse_broken_state,
    refuse_foreign_state,
    refuse_nonfinite,
)
from lit_dpo.hparams import alive, plain
from lit_dpo.losses import DPOLoss, PreferenceLoss, implicit_rewards, per_pair, refuse_missing
from lit_dpo.metrics import SHOWN, PairMeans, check_monitors, pair_metrics
from lit_dpo.models import Dtype, ModelDescription
from lit_dpo.pairs import PairBatch, PairLogps, pair_data
from lit_dpo.pretrained import trusts_remote_code
from lit_dpo.references.adapter import AdapterReference
from lit_dpo.references.base import Reference, Start
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.resume import rescale, seeded, validate_between_steps
from lit_dpo.schedules import WarmupDecay, bind, rebind
from lit_dpo.scoring.audit import check_rows
from lit_dpo.scoring.score import BatchForm, Scorer
from lit_dpo.strategies import leave_batches
from lit_dpo.tokenizers import load_tokenizer
from lit_dpo.version import __version__

STATE = "lit_dpo"
"""Our part of a checkpoint."""


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
        form: ``flat`` computes no padding and each prompt once; ``padded`` serves every model; ``auto`` picks.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        max_tokens: Tokens of the flat line to compute at once. A batch of more is computed in parts, most of them again
            in the backward pass: the same gradient, and the longest batch of an epoch no longer decides what memory
            it takes. Not for sharded models.
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
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-6, weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = WarmupDecay,
        dtype: Dtype = "float32",
        form: BatchForm = "auto",
        gradient_checkpointing: bool = False,
        max_tokens: int | None = None,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("A `model` described by its config has no tokenizer of its own: set `tokenizer`.")
        # From a checkpoint these come as plain values.
        loss, reference = alive(loss), alive(reference)
        adapter = LoRA(**adapter) if isinstance(adapter, dict) else adapter
        self.model, self.loss, self.adapter, self.dtype_name = model, loss, adapter, dtype
        self.tokenizer_source = tokenizer or str(model)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.form, self.gradient_checkpointing, self.init_seed = form, gradient_checkpointing, init_seed
        self.max_tokens = max_tokens
        self.reference = self._default_reference() if reference is None else reference
        self.policy: nn.Module | None = None
        self.means = {stage: PairMeans() for stage in ("train", "val", "test")}  # no modules of the model's
        self._settled: BatchForm | None = None
        self._prepared_for: str | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokens, self._since = 0, 0.0
        self._bound: WarmupDecay | None = None  # the schedule whose length is the run's
        self._seen: list[SeenPairs] = []  # in the optimizer step under way
        options = {"model": model, "loss": loss, "reference": reference, "adapter": adapter, "tokenizer": tokenizer}
        options |= {"dtype": dtype, "init_seed": init_seed, "trust_remote_code": trusts_remote_code()}  # for the record
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

    def setup(self, stage: str) -> None:
        """Forget what an earlier fit has measured and not logged yet, such as that of the partition before."""
        leave_batches(self.trainer.strategy)
        if stage == "fit":
            self._means("train").reset()

    def configure_model(self) -> None:
        """Load policy and reference, once, and settle how many decoder blocks the loss can name."""
        if self.policy is not None:
            return
        self.hparams["trust_remote_code"] = trusts_remote_code()
        assembly = self._assembly()
        if assembly.sharded and self.max_tokens is not None:
            raise ValueError(
                "`max_tokens` is not for sharded models: use `gradient_checkpointing`, or a smaller `batch_size` with "
                "`accumulate_grad_batches`, which makes the same optimizer steps."
            )
        policy, self.loss = assembly.build(self.loss)
        self.policy = policy.train()  # from_pretrained leaves it in eval mode, and Lightning keeps modes

    def _assembly(self) -> Assembly:
        return Assembly(
            self.model,
            self.tokenizer,
            self.dtype_name,
            self.init_seed,
            self.adapter,
            self.reference,
            self.gradient_checkpointing,
            self._trainer,
            self.device_mesh,
        )

    def restart_from(self, model: str | ModelDescription) -> None:
        """Forget the policy; the next run loads it from another folder, as the reference. Adapters start anew."""
        self.model, self.policy, self._settled, self._prepared_for = model, None, None, None
        self.hparams["model"] = model

    # -- the one step -------------------------------------------------------------------------------------------------

    @property
    def scorer(self) -> Scorer:
        """How policy and reference are scored: as the loss asks, in the form that was settled."""
        form = self._settled or self.form
        return Scorer(self.loss.layers, self.loss.detach_head, form, self.max_tokens, self.loss.needs_tokens)

    def forward(self, batch: PairBatch) -> tuple[PairLogps, PairLogps]:
        """Log-probs of a batch under policy and reference, with the numbers of its rows.

        A loss without a reference gets zeros for it.
        """
        assert self.policy is not None
        scorer = self.scorer
        with torch.no_grad():
            reference = None if self.reference is None else self.reference.score(self.policy, batch, scorer)
        policy = scorer(self.policy, batch)
        reference = reference or policy.detach().zeros()
        return replace(policy, columns=batch.columns), replace(reference, columns=batch.columns)

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        refuse_missing(self.loss, batch.columns)
        policy, reference = self(batch)
        losses = per_pair(self.loss, policy, reference)  # (batch,)
        if "weight" in batch.columns:
            losses = losses * batch.columns["weight"]
        if stage == "train":
            self._seen.append(SeenPairs(batch.row_ids, losses.detach(), policy.detach(), reference))
        with torch.no_grad():
            self._means(stage).update(pair_metrics(self.loss, losses, policy, reference), batch.weights)
        return losses.mean() if batch.weights is None else (batch.weights * losses).mean()

    def _means(self, stage: str) -> PairMeans:
        return self.means[stage]

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss over the pairs of a batch; every ``log_every_n_steps`` steps log the means since then.

        (Not in `on_train_batch_end`: a checkpoint that a callback writes there would miss what is logged after it.)
        """
        self._tokens += len(batch.input_ids)
        with seeded(self.device, self.init_seed, self.trainer.fit_loop.total_batch_idx, self.global_rank):
            loss = self._step(batch, "train")
        if self._completes_step(batch_idx) and (self.trainer.global_step + 1) % self._log_interval == 0:
            self._log_means("train")
            now = time.perf_counter()
            speed = self._tokens * self.trainer.world_size / (now - self._since)
            self.log("train/tokens_per_second", speed, batch_size=1)
            self.log("tokens/s", speed, prog_bar=True, logger=False, batch_size=1)
            self._tokens, self._since = 0, now
        return loss

    @property
    def _log_interval(self) -> int:
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
        return interval

    def _completes_step(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch

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
            "chosen_tokens": policy.chosen_tokens,
            "rejected_tokens": policy.rejected_tokens,
        }
        real = slice(None) if batch.weights is None else batch.weights != 0
        return {name: value[real].cpu() for name, value in values.items()}

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _log_means(self, stage: str) -> None:
        means = self._means(stage)
        values = {f"{stage}/{name}": value for name, value in means.compute().items()}
        for name, value in values.items():
            # The means are of all processes already; `sync_dist` only tells Lightning not to warn that they are not.
            self.log(name, value, batch_size=1, sync_dist=stage != "train")
        for name, short in SHOWN.items() if stage == "train" else ():
            self.log(short, values[f"train/{name}"], prog_bar=True, logger=False, batch_size=1)
        means.reset()

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """After an optimizer step free the gradients."""
        if not self._completes_step(batch_idx):
            return
        # Lightning zeroes after the next forward pass; until then the gradients would stand beside its activations.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation pairs."""
        self._log_means("val")
        self._tokens, self._since = 0, time.perf_counter()  # validation is no training time

    def on_test_epoch_end(self) -> None:
        """Log the means over the test pairs."""
        self._log_means("test")

    # -- the optimizer step -------------------------------------------------------------------------------------------

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient, refuse it unless it is finite, and clip it alike under every strategy.

        Raises:
            FloatingPointError: Loss or gradient is NaN or infinite; no weight has changed then.
            ValueError: The optimizer is fused and gradients are scaled float16.
        """
        seen, self._seen = self._seen, []
        norm = gradient_norm(self.policy, optimizer)
        # Scaled float16 gradients overflow now and then, and their scaler skips such a step by itself.
        refuse_nonfinite(self.trainer, self.policy, seen, None if self.trainer.precision == "16-mixed" else norm)
        if (self.trainer.global_step + 1) % self._log_interval == 0:
            self.log("train/grad_norm", norm, batch_size=1)
            self.log("lr", optimizer.param_groups[0]["lr"], batch_size=1)
        if gradient_clip_val:
            clip(optimizer, norm, gradient_clip_val, gradient_clip_algorithm, self.trainer.precision)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs besides Lightning's own state; every process takes part.

        Raises:
            FloatingPointError: A weight or optimizer state is not finite; nothing is written then.
        """
        refuse_broken_state(self.trainer, self.policy)
        means, data = self._means("train"), pair_data(self.trainer)
        checkpoint[STATE] = {
            **means.kept(self.trainer.strategy),
            "chat_template": None if data is None else data.chat_template,
            **self.facts(),
        }

    def facts(self) -> dict[str, Any]:
        """What a model card tells of the run so far, as plain values; see `lit_dpo.export.model_card`."""
        data = pair_data(self.trainer)
        metrics = {name: float(v) for name, v in self.trainer.callback_metrics.items() if name.startswith("val/")}
        packages = {"lit_dpo": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "data": None if data is None else data.sources,
            "step": self.trainer.global_step,
            "step_layout": self._step_layout(),
            "metrics": metrics,
            "versions": {name: str(version) for name, version in packages.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the means of the present logging interval, and fit the counters to this run's processes.

        Raises:
            ValueError: To go on, the run would need another number of pairs an optimizer step.
        """
        if self._trainer is not None:
            believe_all(self.trainer, checkpoint)
        state = checkpoint.get(STATE)
        if state is None or self._trainer is None or self.trainer.state.fn != "fit":
            return
        if type(self.trainer.datamodule).__qualname__ not in checkpoint:  # type: ignore[attr-defined]
            rank_zero_info("The checkpoint keeps nothing of its rows, so whether they have changed cannot be noticed.")
        layout = self._step_layout()
        if layout is not None and state["step_layout"] is not None:
            rescale(checkpoint["loops"], state["step_layout"], layout)
        self._means("train").restore(state, self.global_rank)

    def _step_layout(self) -> dict[str, int] | None:
        data = pair_data(self.trainer)
        return data.step_layout() if data is not None and self.trainer.state.fn == "fit" else None

    # -- start of a run -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        refuse_broken_state(self.trainer, self.policy)
        assert self.policy is not None
        if self._settled is None:
            self._settled = settled_form(self.trainer, self.policy, self.form)
            rank_zero_info(f"Objective: the mean over pairs of {self.loss.formula()}")
            name = type(self.reference).__name__ if self.reference else "none"
            rank_zero_info(f"Loss: {self.loss!r}; reference: {name}")
        assert self.trainer.state.fn is not None
        stage = self.trainer.state.fn.value  # `str` of it would give the name of the enumeration too
        if self._prepared_for == stage:
            return
        self._prepared_for = stage
        if self.loss.needs_reference and self.reference is None:
            raise ValueError(
                f"`{type(self.loss).__name__}` needs a reference, and the module's was taken away: leave "
                "`module.reference` in its place, or use a loss that needs none, such as `SFTLoss`."
            )
        if data := pair_data(self.trainer):
            if stage != "predict":  # which calls no loss
                refuse_missing(self.loss, data.values)
            models = [self.policy, *(self.reference.models() if self.reference is not None else [])]
            check_rows(models, data.reference_sets(stage))
        if self.reference is not None:
            self.reference.prepare(Start(self.trainer, self.policy, self._assembly().load, self.scorer))

    def on_fit_start(self) -> None:
        """Audit the scoring, settle the form of batches, and let the reference get ready.

        Raises:
            ValueError: A callback watches a metric that does not exist, or the loss needs a reference and has none.
        """
        check_monitors(self.trainer, self.loss)
        self._prepared_for = None  # the partition may have changed
        self._seen = []
        self._start()
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_start(self) -> None:
        """Fit a restored schedule to this run, and move validations to the ends of optimizer steps.

        (There a checkpoint holds all there is; in the middle of one, half a step is in the gradients.)
        """
        trainer = self.trainer
        refuse_foreign_state(trainer)
        refuse_broken_state(trainer, self.policy)  # the optimizer's restored state too
        if self._bound is not None:
            rebind(self._bound, trainer)
        validate_between_steps(trainer)

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
            bind(scheduler, self.trainer)
            self._bound = scheduler
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreferenceModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for means in self.means.values():
            means._apply(fn)
        if self.reference is not None:
            self.reference.move(fn, recurse)
        return self
