"""Building policy and reference, wherever a run's strategy wants them, and settling how they are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_dpo.adapters import LoRA, refuse_tied_adapters
from lit_dpo.hparams import refuse_absent
from lit_dpo.losses import PreferenceLoss, refuse_missing
from lit_dpo.models import Dtype, ModelSource, check_object, empty_model, load_model, refuse_full_tuning
from lit_dpo.pair_data import pair_data
from lit_dpo.pretrained import Loading
from lit_dpo.references.adapter import AdapterReference
from lit_dpo.references.base import Filling, Reference
from lit_dpo.references.frozen import FrozenReference
from lit_dpo.scoring.audit import calm, choose_form
from lit_dpo.scoring.decoder import decoder_parts
from lit_dpo.scoring.score import BatchForm
from lit_dpo.scoring.sizes import check_rows
from lit_dpo.strategies import copy_shards, fill, shard, wrap


def check_source(
    model: ModelSource,
    tokenizer: object,
    loading: Loading,
    form: BatchForm,
    dtype: Dtype,
    adapter: LoRA | None,
) -> None:
    """Refuse a model that could not be loaded or trained as it is asked for, before anything is loaded.

    Raises:
        ValueError: An object is missing that a checkpoint asks for, the model has no tokenizer, an option would be
            ignored, or weights were to be trained that cannot be.
    """
    refuse_absent("model", model)
    refuse_absent("tokenizer", tokenizer)
    if tokenizer is None and not isinstance(model, str):
        raise ValueError("A `model` that is no name and no folder has no tokenizer of its own: set `tokenizer`.")
    loading.check(model)
    if loading.attn_implementation is not None and form == "flat":
        raise ValueError(
            "`form: flat` has an attention of its own, for which `attn_implementation` would change nothing: leave one "
            "of the two out."
        )
    if loading.quantization is not None:
        refuse_full_tuning(adapter)
    if not isinstance(model, str | dict):
        check_object(model, dtype, adapter)


def default_reference(loss: PreferenceLoss, adapter: LoRA | None) -> Reference | None:
    """The reference of a run that names none."""
    if not loss.needs_reference:
        return None
    return FrozenReference() if adapter is None else AdapterReference()


@dataclass(frozen=True)
class Assembly:
    """What a policy and the reference beside it are made of, and where they are going to live.

    Args:
        model: What the policy starts from; a loaded model becomes the policy itself.
        loading: Its revision, attention and quantization.
        tokenizer: Its tokenizer, which fills in what a description leaves out.
        dtype: Of the weights.
        init_seed: Seed of random weights and adapters.
        adapter: Low-rank adapters for the policy.
        reference: Built beside the policy.
        gradient_checkpointing: Recompute the policy's activations in the backward pass.
        max_tokens: Of a part of a batch; `None` computes a batch at once.
        trainer: Of the run under way; `None` outside one.
        mesh: The processes to shard the models over, as FSDP2 does; `None` without.
    """

    model: ModelSource
    loading: Loading
    tokenizer: PreTrainedTokenizerBase
    dtype: Dtype
    init_seed: int
    adapter: LoRA | None
    reference: Reference | None
    gradient_checkpointing: bool
    max_tokens: int | None
    trainer: Trainer | None
    mesh: DeviceMesh | None

    @property
    def sharded(self) -> bool:
        """Whether the models will be sharded over processes."""
        return self.mesh is not None or self._fsdp1 is not None

    @property
    def _fsdp1(self) -> FSDPStrategy | None:
        strategy = None if self.trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, FSDPStrategy) else None

    def load(self) -> PreTrainedModel:
        """The starting weights, as a model of its own.

        Raises:
            ValueError: There is no such model, or it was given as an object and has been training since.
        """
        if isinstance(self.model, PreTrainedModel):
            raise ValueError(
                "The starting weights are asked for again, and the `model` that was given as an object has been "
                "training: give a folder or a name, or use `FrozenReference`, which keeps a copy."
            )
        return load_model(self.model, self.tokenizer, self.dtype, self.init_seed, self.loading)

    def _check_sharded(self) -> None:
        """Refuse what cannot be sharded over processes."""
        if self.max_tokens is not None:
            raise ValueError(
                "`max_tokens` is not for sharded models: use `gradient_checkpointing`, or a smaller `batch_size` with "
                "`accumulate_grad_batches`, which makes the same optimizer steps."
            )
        if self.loading.quantization is not None:
            raise ValueError("A quantized model cannot be sharded: leave `quantization` out, or use `strategy: ddp`.")
        if isinstance(self.model, PreTrainedModel):
            raise ValueError(
                "A `model` given as an object cannot be sharded over processes, each of which would hold all of "
                "it: save it with `save_pretrained` and give the folder."
            )

    def build(self, loss: PreferenceLoss) -> tuple[nn.Module, PreferenceLoss]:
        """The policy, and the loss with its decoder blocks settled; the reference is built on the way.

        Raises:
            ValueError: There is no such model; or it would be sharded, and was given as an object, is quantized, or
                batches were to be computed in parts.
        """
        if self.sharded:
            self._check_sharded()
        if self.mesh is not None:
            return self._built_on_shards(loss)
        return self._built(self.model if isinstance(self.model, PreTrainedModel) else self.load(), loss)

    def _built(self, base: PreTrainedModel, loss: PreferenceLoss) -> tuple[nn.Module, PreferenceLoss]:
        """The policy made of a freshly loaded model, and the reference beside it."""
        loss = loss.resolve(len(decoder_parts(base).blocks))
        if self.reference is not None:
            self.reference.build(base, self.tokenizer, self.dtype)
        policy = self._adapted(base)
        if self.gradient_checkpointing:
            older = base.gradient_checkpointing_enable  # the one name in transformers 5.17, deprecated in 5.23
            getattr(base, "activation_checkpointing_enable", older)({"use_reentrant": False})
        if self.reference is not None:
            self.reference.check(policy)
        if (strategy := self._fsdp1) is not None:
            assert self.trainer is not None
            precision = self.trainer.precision
            if self.reference is not None:
                self.reference.replace_models(lambda model: wrap(model, strategy, precision))
            policy = wrap(policy, strategy, precision)
        return policy, loss

    def _built_on_shards(self, loss: PreferenceLoss) -> tuple[nn.Module, PreferenceLoss]:
        """The same, sharded: the first process reads the weights, the others receive their shares."""
        assert self.mesh is not None
        assert self.trainer is not None
        assert not isinstance(self.model, PreTrainedModel)  # refused by `build`
        trainer, device = self.trainer, self.trainer.strategy.root_device
        with torch.device("meta"):
            policy, loss = self._built(empty_model(self.model, self.tokenizer, self.dtype, self.loading), loss)
        for model in (policy, *(self.reference.models() if self.reference is not None else [])):
            shard(model, self.mesh["data_parallel"], trainer.precision)

        def from_first(model: nn.Module, load: Callable[[], nn.Module]) -> None:
            fill(model, load() if trainer.is_global_zero else None, device)

        def from_shards(source: nn.Module, target: nn.Module) -> None:
            copy_shards(source, target, device)

        from_first(policy, lambda: self._adapted(self.load()))
        if self.reference is not None:
            self.reference.fill(policy, Filling(from_first, from_shards))
        return policy, loss

    def _adapted(self, base: PreTrainedModel) -> nn.Module:
        if self.adapter is None:
            return base
        policy = self.adapter.attach(base, self.init_seed)
        refuse_tied_adapters(policy)
        return policy


def settled_form(trainer: Trainer, policy: nn.Module, form: BatchForm, loading: Loading) -> BatchForm:
    """Audit how a policy is scored under a run's precision, calm its training mode, and settle the form of batches.

    Raises:
        ValueError: The precision, or the form that was asked for, cannot serve.
    """
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"`precision: {trainer.precision}` rounds rotary positions too and makes long texts wrong: "
            "set the module's `dtype: bfloat16` and leave the Trainer at `32-true`, or use `bf16-mixed`."
        )
    if trainer.precision == "64-true":
        raise ValueError(
            "`precision: 64-true` changes batches and the default dtype, which they do not allow: set the module's "
            "`dtype: float64` and leave the Trainer at `32-true`."
        )
    settled, reason = choose_form(policy, form)
    if trainer.precision != "32-true":  # the first audit was the strict one, this is of the run's own kernels
        with trainer.precision_plugin.forward_context():
            settled, again = choose_form(policy, settled)
        reason = reason or again
    if loading.attn_implementation is not None:
        reason = f"`attn_implementation: {loading.attn_implementation}` is theirs, and the flat form has its own"
    if reason is not None:
        rank_zero_info(f"Scoring pairs as padded rows: {reason}.")
    if noisy := calm(policy, settled):
        rank_zero_info(f"As in evaluation, since training would be random otherwise: {', '.join(noisy)}.")
    return settled


def check_run(
    trainer: Trainer, policy: nn.Module, loss: PreferenceLoss, reference: Reference | None, stage: str
) -> None:
    """Refuse a run whose loss or models cannot do with what they get.

    Args:
        trainer: Knows the data.
        policy: As built.
        loss: What is to be computed.
        reference: Beside the policy.
        stage: `fit`, `validate`, `test` or `predict`.

    Raises:
        ValueError: The loss needs a reference or columns that are not there, or the models cannot read the rows.
    """
    if loss.needs_reference and reference is None:
        raise ValueError(
            f"`{type(loss).__name__}` needs a reference, and the module's was taken away: leave "
            "`module.reference` in its place, or use a loss that needs none, such as `SFTLoss`."
        )
    if data := pair_data(trainer):
        if stage != "predict":  # which calls no loss
            refuse_missing(loss, data.values)
        check_rows([policy, *(reference.models() if reference is not None else [])], data.reference_sets(stage))
