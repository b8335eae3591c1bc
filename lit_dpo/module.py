"""The LightningModule: a policy, a reference, and a loss object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_dpo.adapters import LoRA
from lit_dpo.assembly import Assembly, check_run, check_source, default_reference, settled_form
from lit_dpo.checkpoints.foreign import believe_all
from lit_dpo.gradients import clip, gradient_norm, refuse_broken_state, refuse_foreign_state, refuse_nonfinite
from lit_dpo.hparams import alive, plain
from lit_dpo.lightning_private import attached_trainer
from lit_dpo.losses import DPOLoss, PreferenceLoss, per_pair, refuse_functions, refuse_missing
from lit_dpo.meter import Meter, StepPairs, completes_step, logs_now
from lit_dpo.metrics import check_monitors, predictions
from lit_dpo.models import Dtype, ModelSource, Quantization
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.pretrained import Attention, Loading, trusts_remote_code
from lit_dpo.references.base import Reference, Start, scored_by
from lit_dpo.resume import fit_counters, run_facts, seeded, validate_between_steps
from lit_dpo.schedules import WarmupDecay, bind, rebind
from lit_dpo.scoring.chosen import chosen_alone
from lit_dpo.scoring.score import BatchForm, Scorer
from lit_dpo.strategies import leave_batches
from lit_dpo.tokenizers import TokenizerSource, load_tokenizer

STATE = "lit_dpo"  # our part of a checkpoint


class PreferenceModule(LightningModule):
    """Preference-tunes a causal language model with any `PreferenceLoss`.

    The training objective is the mean of the loss over pairs, whatever the batch size, accumulation or number of
    processes. Logged under `train/`, `val/` and `test/`: see `lit_dpo.metrics.pair_metrics`.

    Args:
        model: The policy to start from: a hub name, a local folder, or a description such as
            `{model_type: llama, hidden_size: 256, ...}` for random weights. In Python also a loaded transformers
            model, which is trained as it is, in its place; checkpoints do not hold it, and ask for it again.
        loss: The objective; its repr is printed at the start of a run.
        reference: Where reference log-probs come from. `None` is `AdapterReference` with an adapter, else
            `FrozenReference`; a loss that needs no reference gets none.
        adapter: Train low-rank adapters instead of all weights.
        tokenizer: Hub name or folder of the tokenizer; `None` takes that of `model`. In Python also the object.
        optimizer: Makes the optimizer from the trained parameters.
        lr_scheduler: Makes the schedule from the optimizer, once an optimizer step; `None`: a constant rate.
        dtype: Dtype of the weights. Keep float32 and set the Trainer's `precision: bf16-mixed` to compute in
            bfloat16: at the usual learning rates a bfloat16 weight does not move.
        revision: Branch, tag or commit of a hub name, for model and tokenizer; `None` is its main branch.
        attn_implementation: Attention of the padded form, and of generation; with it `auto` is `padded`, since the
            flat form has an attention of its own. `None` is transformers' choice.
        quantization: Load the frozen weights under an `adapter` quantized: options of bitsandbytes, such as
            `{load_in_4bit: true, bnb_4bit_quant_type: nf4}`, or `{quant_type: Int8WeightOnlyConfig}` of torchao.
        form: `flat` computes no padding and each prompt once; `padded` serves every model; `auto` picks.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        max_tokens: Tokens of the flat line to compute at once. A batch of more is computed in parts, most of them again
            in the backward pass: the same gradient, and the longest batch of an epoch no longer decides what memory
            it takes. Not for sharded models.
        init_seed: Seed of the random weights of a description, and of adapters.
        predict_tokens: Let `predict` give the log-prob of every completion token too.

    Raises:
        ValueError: An option is out of its range, or (when the models are built) there is no such model.
    """

    def __init__(
        self,
        model: ModelSource,
        loss: PreferenceLoss = DPOLoss(),  # noqa: B008 - frozen
        reference: Reference | None = None,
        adapter: LoRA | None = None,
        tokenizer: TokenizerSource | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-6, weight_decay=0.0, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = WarmupDecay,
        dtype: Dtype = "float32",
        revision: str | None = None,
        attn_implementation: Attention | None = None,
        quantization: Quantization | None = None,
        form: BatchForm = "auto",
        gradient_checkpointing: bool = False,
        max_tokens: int | None = None,
        init_seed: int = 0,
        predict_tokens: bool = False,
    ) -> None:
        super().__init__()
        Scorer(form=form, max_tokens=max_tokens)  # refuses what is out of range
        # From a checkpoint these come as plain values.
        loss, reference = alive(loss), alive(reference)
        adapter = LoRA(**adapter) if isinstance(adapter, dict) else adapter
        refuse_functions("loss", loss)
        self.loading = Loading(revision, attn_implementation, quantization)
        check_source(model, tokenizer, self.loading, form, dtype, adapter)
        self.model: ModelSource
        object.__setattr__(self, "model", model)  # an object is no submodule: it is the policy, and in checkpoints once
        self.loss, self.adapter, self.dtype_name = loss, adapter, dtype
        self._tokenizer, self._given_tokenizer = tokenizer or str(model), tokenizer
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.form: BatchForm = form if attn_implementation is None else "padded"
        self.gradient_checkpointing, self.init_seed = gradient_checkpointing, init_seed
        self.max_tokens, self.predict_tokens = max_tokens, predict_tokens
        self.reference = default_reference(loss, adapter) if reference is None else reference
        self.policy: nn.Module | None = None
        self._meter = Meter()
        self._settled: BatchForm | None = None
        self._prepared_for: str | None = None
        self._bound: WarmupDecay | None = None  # the schedule whose length is the run's
        options = {"model": model, "loss": loss, "reference": reference, "adapter": adapter, "tokenizer": tokenizer}
        options |= {f.name: getattr(self.loading, f.name) for f in fields(Loading)}
        options |= {"dtype": dtype, "init_seed": init_seed, "trust_remote_code": trusts_remote_code()}  # for the record
        self.save_hyperparameters({name: plain(value) for name, value in options.items()})

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded at first use."""
        if isinstance(self._tokenizer, str):
            own = self._given_tokenizer is None
            self._tokenizer = load_tokenizer(self._tokenizer, self.loading.revision if own else None)
        return self._tokenizer

    @property
    def objects(self) -> dict[str, Any]:
        """Model and tokenizer if they were given as objects, by the names under which they must be given again."""
        given = (("model", self.model), ("tokenizer", self._given_tokenizer))
        return {name: value for name, value in given if hasattr(value, "save_pretrained")}

    def setup(self, stage: str) -> None:
        """Forget what an earlier fit has measured and not logged yet, such as that of the partition before."""
        leave_batches(self.trainer.strategy)
        if stage == "fit":
            self._meter.forget()

    def configure_model(self) -> None:
        """Load policy and reference, once, and settle how many decoder blocks the loss can name."""
        if self.policy is not None:
            return
        self.hparams["trust_remote_code"] = trusts_remote_code()
        policy, self.loss = self._assembly().build(self.loss)
        self.policy = policy.train()  # from_pretrained leaves it in eval mode, and Lightning keeps modes
        moving = [] if self.reference is None else self.reference.moving()
        self.moving_references = nn.ModuleList(model for one in moving for model in one.models())  # for checkpoints

    def _assembly(self) -> Assembly:
        what = self.model, self.loading, self.tokenizer, self.dtype_name, self.init_seed, self.adapter, self.reference
        return Assembly(*what, self.gradient_checkpointing, self.max_tokens, attached_trainer(self), self.device_mesh)

    def restart_from(self, model: ModelSource) -> None:
        """Forget the policy; the next run loads it from another folder, as the reference. Adapters start anew."""
        if not isinstance(model, str | dict) and hasattr(self.policy, "peft_config"):
            self.policy.unload()  # type: ignore[union-attr, operator]  # peft has put its layers into the object itself
        if model != self.model:  # another one has no revision
            self.loading = replace(self.loading, revision=None)
        object.__setattr__(self, "model", model)
        self.policy, self._settled, self._prepared_for = None, None, None
        self.hparams.update(model=plain(model), revision=self.loading.revision)
        if isinstance(model, str) and isinstance(self.hparams["tokenizer"], dict):
            self.hparams["tokenizer"] = None  # an object before, which has been saved in this folder

    @property
    def scorer(self) -> Scorer:
        """How policy and reference are scored: as the loss asks, in the form that was settled."""
        form, trainer = self._settled or self.form, attached_trainer(self)
        per_token = self.loss.needs_tokens or (self.predict_tokens and trainer is not None and trainer.predicting)
        return Scorer(self.loss.layers, self.loss.detach_head, form, self.max_tokens, per_token)

    @property
    def scores_rejected(self) -> bool:
        """Whether rejected completions are scored in training; in validation they always are."""
        return self.loss.needs_rejected or self.reference is not None

    @property
    def last_pairs(self) -> StepPairs | None:
        """What the last training step has found of each of its pairs, for callbacks."""
        return self._meter.last

    @property
    def history(self) -> list[dict[str, Any]]:
        """All that this fit has logged, also before it was resumed, as numbers; `step` counts optimizer steps."""
        return self._meter.history.settle()

    def forward(self, batch: PairBatch) -> tuple[PairLogps, PairLogps]:
        """Log-probs of a batch under policy and reference, zeros without one, with the numbers of its rows."""
        assert self.policy is not None
        scorer = self.scorer
        with torch.no_grad():
            reference = None if self.reference is None else scored_by(self.reference, self.policy, batch, scorer)
        policy = scorer(self.policy, batch)
        reference = reference or policy.detach().zeros()
        return replace(policy, columns=batch.columns), replace(reference, columns=batch.columns)

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        refuse_missing(self.loss, batch.columns)
        both = stage != "train" or self.scores_rejected
        scored = batch if both else chosen_alone(batch)
        policy, reference = self(scored)
        losses = per_pair(self.loss, policy, reference)  # (batch,)
        if "weight" in batch.columns:
            losses = losses * batch.columns["weight"]
        self._meter.add(stage, scored, self.loss, losses, policy, reference, both)
        return losses.mean() if batch.weights is None else (batch.weights * losses).mean()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss over the pairs of a batch; every `log_every_n_steps` steps log the means since then."""
        with seeded(self.device, self.init_seed, self.trainer.fit_loop.total_batch_idx, self.global_rank):
            loss = self._step(batch, "train")
        if completes_step(self.trainer, batch_idx) and logs_now(self.trainer):
            self._meter.log(self, "train")  # here, since a callback may save a checkpoint before `on_train_batch_end`
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the means of `val/`."""
        self._step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch to the means of `test/`."""
        self._step(batch, "test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Rewards and log-probs of each pair, see `predictions`; fillers of weight zero are left out."""
        policy, reference = self(batch)
        return predictions(self.loss, batch, policy, None if self.reference is None else reference, self.predict_tokens)

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Free the gradients after a step, not after the next forward pass as Lightning does, beside activations."""
        for optimizer in self.trainer.optimizers if completes_step(self.trainer, batch_idx) else ():
            optimizer.zero_grad()

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation pairs."""
        self._meter.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test pairs."""
        self._meter.log(self, "test")

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
        seen, self._meter.seen = self._meter.seen, []
        norm = gradient_norm(self.policy, optimizer)
        # Scaled float16 gradients overflow now and then, and their scaler skips such a step by itself.
        refuse_nonfinite(self.trainer, self.policy, seen, None if self.trainer.precision == "16-mixed" else norm)
        if logs_now(self.trainer):
            self._meter.log_step(self, norm, optimizer.param_groups[0]["lr"])
        if gradient_clip_val:
            clip(optimizer, norm, gradient_clip_val, gradient_clip_algorithm, self.trainer.precision)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the reference know of the step (here, so that whatever is saved after the step holds both)."""
        super().optimizer_step(*args, **kwargs)
        if self.reference is not None and self.policy is not None:
            self.reference.follow(self.policy, self.trainer.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs besides Lightning's own state; every process takes part.

        Raises:
            FloatingPointError: A weight or optimizer state is not finite; nothing is written then.
        """
        refuse_broken_state(self.trainer, self.policy)
        checkpoint[STATE] = {**self._meter.kept(self.trainer.strategy), **run_facts(self.trainer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the means of the present logging interval, and fit the counters to this run's processes.

        Raises:
            ValueError: To go on, the run would need another number of pairs an optimizer step.
        """
        state, trainer = checkpoint.get(STATE), attached_trainer(self)
        if trainer is not None:
            believe_all(trainer, checkpoint)
        if state is None or trainer is None or trainer.state.fn != "fit":
            return
        fit_counters(trainer, checkpoint, state["step_layout"])
        self._meter.restore(state, self.global_rank)

    def _start(self) -> None:
        """Refuse what cannot run, settle the form of batches, and let the reference get ready; once a stage."""
        refuse_broken_state(self.trainer, self.policy)
        assert self.policy is not None
        if self._settled is None:
            self._settled = settled_form(self.trainer, self.policy, self.form, self.loading)
            reference = type(self.reference).__name__ if self.reference else "none"
            rank_zero_info(f"Objective: the mean over pairs of {self.loss.formula()}")
            rank_zero_info(f"Loss: {self.loss!r}; reference: {reference}")
        assert self.trainer.state.fn is not None
        stage = self.trainer.state.fn.value  # `str` of it would give the name of the enumeration too
        if self._prepared_for != stage:
            self._prepared_for = stage
            check_run(self.trainer, self.policy, self.loss, self.reference, stage)
            if self.reference is not None:
                self.reference.prepare(Start(self.trainer, self.policy, self._assembly().load, self.scorer))

    def on_fit_start(self) -> None:
        """Audit the scoring, settle the form of batches, and let the reference get ready.

        Raises:
            ValueError: A callback watches a metric that does not exist, or the loss needs a reference and has none.
        """
        check_monitors(self.trainer, self.loss, self.scores_rejected)
        self._prepared_for = None  # the partition may have changed
        self._meter.seen = []
        self._start()
        self._meter.restart_clock()

    def on_train_start(self) -> None:
        """Fit a restored schedule to this run, and move validations to the ends of optimizer steps."""
        refuse_foreign_state(self.trainer)
        refuse_broken_state(self.trainer, self.policy)  # the optimizer's restored state too
        if self._bound is not None:
            rebind(self._bound, self.trainer)
        validate_between_steps(self.trainer)

    on_validation_start = on_test_start = on_predict_start = _start

    def configure_optimizers(self) -> Any:
        """The optimizer over trained parameters, and the schedule bound to the number of optimizer steps."""
        assert self.policy is not None
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._bound = bind(scheduler, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreferenceModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._meter.move(fn)
        if self.reference is not None:
            self.reference.move(fn, recurse)
        return self
