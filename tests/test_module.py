"""The module in a plain Trainer: where training starts, what it leaves unchanged, and what it refuses."""

import csv
import math
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_dpo import (
    DPOLoss,
    DPOPLoss,
    FrozenReference,
    IntermediateLoss,
    IPOLoss,
    LoRA,
    PairBatch,
    PreferenceLoss,
    PreferenceModule,
    SFTLoss,
    WeightedLoss,
)
from lit_dpo.export import export
from lit_dpo.losses import log_ratios
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


@dataclass(frozen=True)
class OwnHinge(PreferenceLoss):
    """A loss of one's own: ``max(0, 1 - beta * h)``."""

    beta: float = 0.1

    def __call__(self, policy, reference):
        chosen, rejected = log_ratios(policy, reference)
        return (1 - self.beta * (chosen - rejected)).clamp(min=0)


class Watch(Callback):
    """Remember what is logged in training, and the modes that the models are in."""

    def __init__(self):
        self.logged, self.modes = [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
        reference = pl_module.reference.models()[0].training if pl_module.reference is not None else None
        self.modes.add((pl_module.policy.training, reference))


@pytest.fixture
def pairs(tmp_path):
    return runs.pairs_file(tmp_path, 22)


def validated(module, datamodule):
    return runs.trainer().validate(module, datamodule, verbose=False)[0]


# -- where training starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (DPOLoss(beta=0.3), math.log(2)),
        (DPOPLoss(), math.log(2)),
        (IPOLoss(beta=0.1), 25.0),
        (IPOLoss(beta=0.5, length_normalize=False), 1.0),
        (IntermediateLoss(DPOLoss(), layers=(0.5,)), math.log(2)),
        (OwnHinge(), 1.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["frozen", "lora"])
def test_nothing_is_preferred_before_the_first_step(pairs, loss, start, adapter):
    values = validated(runs.module(loss=loss, adapter=adapter), runs.data(pairs))
    assert values["val/loss"] == pytest.approx(start, rel=1e-6)
    assert values["val/rewards/ties"] == 1.0
    assert values["val/rewards/accuracies"] == 0.5
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "displacement"):
        assert values[f"val/{name}"] == 0.0


@pytest.mark.parametrize("adapter", [None, LoRA(rank=8)], ids=["full", "lora"])
def test_a_few_steps_teach_the_embedded_preferences(adapter):
    module = runs.module(lr=1e-2, optimizer=torch.optim.AdamW, adapter=adapter)
    run = runs.fit(module, runs.data(batch_size=16), max_steps=12, val_check_interval=6)
    values = run.callback_metrics
    assert values["val/rewards/accuracies"] > 0.85
    assert values["val/loss"] < 0.65
    assert values["val/rewards/ties"] == 0


@pytest.mark.every(5)
@pytest.mark.parametrize(
    "loss",
    [IPOLoss(), DPOPLoss(penalty=5.0), SFTLoss(), IntermediateLoss(), OwnHinge()],
    ids=lambda x: type(x).__name__,
)
def test_every_loss_falls(pairs, loss):
    module, data = runs.module(lr=3e-3, optimizer=torch.optim.AdamW, loss=loss), runs.data(pairs, batch_size=16)
    before = validated(module, data)["val/loss"]
    runs.fit(module, data, max_epochs=8, limit_val_batches=0)
    assert validated(module, data)["val/loss"] < before


# -- what training does not depend on ---------------------------------------------------------------------------------


def trained_exactly(pairs, batch_size, accumulate, loss=None, seed=0):
    """Weights and metrics after two epochs of SGD in float64, uneven last steps included."""
    module = runs.module(runs.NEOX, lr=0.02, dtype="float64", loss=loss or DPOLoss(beta=0.5))
    data = runs.data(pairs, batch_size=batch_size, eval_batch_size=3, seed=seed)
    watch = Watch()
    run = runs.fit(
        module,
        data,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[watch],
        log_every_n_steps=1,
        gradient_clip_val=5.0,
    )
    values = {k: v for k, v in run.callback_metrics.items() if k.startswith("val/")}
    losses = [{k: v for k, v in entry.items() if k != "train/tokens_per_second"} for entry in watch.logged]
    return run.global_step, runs.weights(module.policy), {k: v.double() for k, v in values.items()}, losses


@pytest.mark.every(3)
@pytest.mark.parametrize("loss", [None, WeightedLoss((IPOLoss(), SFTLoss())), IntermediateLoss()], ids=repr)
def test_gradient_accumulation_changes_nothing(pairs, loss):
    steps, weights, values, losses = trained_exactly(pairs, 8, 1, loss)
    assert steps == 6
    for batch_size, accumulate in ((4, 2), (2, 4)):
        found = trained_exactly(pairs, batch_size, accumulate, loss)
        assert found[0] == steps
        torch.testing.assert_close(found[1], weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(found[2], values, rtol=1e-6, atol=1e-9)
        assert found[3] == [pytest.approx(entry, rel=1e-6, abs=1e-9) for entry in losses]


def test_training_is_the_same_again(pairs):
    first, second = (trained_exactly(pairs, 8, 1) for _ in range(2))
    assert runs.same(first[1], second[1])
    other = trained_exactly(pairs, 8, 1, seed=1)
    assert not runs.same(first[1], other[1])


def test_a_batch_in_another_order_gives_the_same_loss_and_gradients(pairs):
    module, data = runs.module(runs.NEOX, dtype="float64", loss=DPOLoss(beta=0.5)), runs.data(pairs)
    runs.fit(module, data, max_steps=2, limit_val_batches=0)
    pairs_of = [data._sets["train"].pair(row) for row in (3, 8, 1, 12, 5)]
    orders = [pairs_of, pairs_of[::-1], pairs_of[2:] + pairs_of[:2]]

    def gradient(order):
        module.zero_grad()
        loss = module._step(PairBatch.from_lists(order), "train")
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in module.policy.parameters()])

    first, *others = [gradient(order) for order in orders]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)


def test_metrics_do_not_depend_on_the_batch_size(pairs):
    module = runs.module(runs.NEOX, dtype="float64")
    runs.fit(module, runs.data(pairs), max_steps=3, limit_val_batches=0)
    found = [validated(module, runs.data(pairs, validation=pairs, eval_batch_size=size)) for size in (1, 4, 5, 22, 64)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    assert found[0]["val/rewards/ties"] == 0


def test_rewards_are_the_means_over_the_pairs(pairs):
    """Against a plain loop over the predicted pairs."""
    module, data = runs.module(loss=DPOLoss(beta=0.5)), runs.data(pairs, validation=pairs, eval_batch_size=3)
    runs.fit(module, data, max_steps=3, limit_val_batches=0)
    values = validated(module, data)
    batches = runs.trainer().predict(module, data)
    rows = {}
    for batch in batches:
        for i, row in enumerate(batch["row_id"].tolist()):
            rows[row] = {name: value[i].item() for name, value in batch.items()}
    assert sorted(rows) == list(range(22))
    margins = [row["margin"] for row in rows.values()]
    assert values["val/rewards/margins"] == pytest.approx(sum(margins) / 22, rel=1e-5)
    assert values["val/rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 22)
    assert values["val/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 22, rel=1e-5)
    assert values["val/logps/chosen"] == pytest.approx(sum(r["logp_chosen"] for r in rows.values()) / 22, rel=1e-5)


# -- what trains, and how ---------------------------------------------------------------------------------------------


def test_adapters_alone_train(pairs):
    module = runs.module(adapter=LoRA(rank=2), lr=0.1)
    module.configure_model()
    before = runs.weights(module.policy)
    run = runs.fit(module, runs.data(pairs), max_steps=3)
    after = runs.weights(module.policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert sum(p.numel() for group in run.optimizers[0].param_groups for p in group["params"]) == sum(
        value.numel() for name, value in after.items() if "lora_" in name
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("loss", [DPOLoss(), IntermediateLoss(layers=(1,))], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(pairs, loss, adapter):
    found = []
    for checkpointing in (False, True):
        module = runs.module(loss=loss, adapter=adapter, gradient_checkpointing=checkpointing, lr=0.1)
        runs.fit(module, runs.data(pairs), max_steps=3)
        on = [getattr(m, "gradient_checkpointing", False) for m in module.policy.modules()]
        assert any(on) == checkpointing
        found.append(runs.weights(module.policy))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("saved", [False, True])  # a model that is read from a folder comes in eval mode
def test_dropout_is_off_and_modes_are_kept(pairs, tmp_path, saved):
    model = {**runs.LLAMA, "attention_dropout": 0.5}
    if saved:
        load_model(model, quickstart_tokenizer()).save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    module, watch = runs.module(model), Watch()
    runs.fit(module, runs.data(pairs), max_steps=4, val_check_interval=1, num_sanity_val_steps=1, callbacks=[watch])
    assert watch.modes == {(True, False)}
    assert all(part.p == 0 for part in module.modules() if isinstance(part, nn.Dropout))
    assert validated(module, runs.data(pairs)) == validated(module, runs.data(pairs))


def test_a_run_with_dropout_in_the_config_is_a_run_without(pairs):
    found = []
    for rate in (0.0, 0.5):
        module = runs.module({**runs.LLAMA, "attention_dropout": rate})
        runs.fit(module, runs.data(pairs), max_steps=3)
        found.append(runs.weights(module.policy))
    assert runs.same(*found)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (WeightedLoss((DPOLoss(), SFTLoss()), (1.0, 0.5)), {"dpo", "sft"}),
        (IntermediateLoss(layers=(1,)), {"last", "layers"}),
    ],
    ids=["weighted", "intermediate"],
)
def test_the_parts_of_a_loss_are_logged(pairs, loss, names):
    watch = Watch()
    run = runs.fit(runs.module(loss=loss), runs.data(pairs), max_epochs=1, log_every_n_steps=1, callbacks=[watch])
    for stage, values in (("val", run.callback_metrics), ("train", watch.logged[-1])):
        assert {name.split("/")[2] for name in values if name.startswith(f"{stage}/loss/")} == names
    if "sft" in names:
        total = run.callback_metrics["val/loss/dpo"] + 0.5 * run.callback_metrics["val/loss/sft"]
        torch.testing.assert_close(run.callback_metrics["val/loss"], total)


def test_training_is_logged_by_optimizer_steps(pairs, tmp_path):
    logger = CSVLogger(tmp_path, name=None)
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "logger": logger, "limit_val_batches": 0}
    runs.fit(runs.module(), runs.data(pairs, batch_size=2), max_epochs=1, **options)  # five steps of two batches
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) + 1 for row in rows] == [2, 4]
    assert float(rows[0]["train/loss"]) > float(rows[1]["train/loss"])
    assert float(rows[0]["train/tokens_per_second"]) > 0


def test_supervised_training_builds_no_reference(pairs):
    module = runs.module(loss=SFTLoss())
    run = runs.fit(module, runs.data(pairs), max_epochs=1)
    assert module.reference is None
    assert not [name for name in run.callback_metrics if "reference" in name or "displacement" in name]


def test_a_loss_of_ones_own_is_all_it_takes(pairs):
    run = runs.fit(runs.module(loss=OwnHinge(beta=0.2)), runs.data(pairs), max_epochs=1)
    assert 0 < run.callback_metrics["val/loss"] < 1


# -- checkpoints ------------------------------------------------------------------------------------------------------


LOSSES = [
    DPOLoss(beta=0.3, label_smoothing=0.1),
    WeightedLoss((IPOLoss(beta=0.2), SFTLoss()), (1.0, 0.25)),
    IntermediateLoss(DPOPLoss(penalty=3.0), layers=(1, 0.9), weight=0.1),
    OwnHinge(beta=0.7),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: type(x).__name__)
def test_a_checkpoint_holds_plain_values_and_builds_the_module_again(pairs, tmp_path, loss):
    module = runs.module(loss=loss)
    run = runs.fit(module, runs.data(pairs), max_steps=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["loss"]["class_path"].endswith(type(loss).__name__)
    assert all(name.startswith("policy.") for name in content["state_dict"])

    again = PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.loss.resolve(2) == loss.resolve(2)
    assert runs.same(runs.weights(again.policy), runs.weights(module.policy))
    assert runs.digest(again.reference.models()[0]) == runs.digest(module.reference.models()[0])
    assert validated(again, runs.data(pairs)) == validated(module, runs.data(pairs))


def test_a_checkpoint_with_adapters_builds_the_module_again(pairs, tmp_path):
    module = runs.module(adapter=LoRA(rank=2, alpha=8), lr=0.1)
    run = runs.fit(module, runs.data(pairs), max_steps=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.adapter == LoRA(rank=2, alpha=8)
    assert runs.same(runs.weights(again.policy), runs.weights(module.policy))


def test_a_checkpoint_remembers_its_reference(pairs, tmp_path):
    other = runs.module(init_seed=7)
    other.configure_model()
    export(other.policy, other.tokenizer, tmp_path / "other")
    module = runs.module(reference=FrozenReference(str(tmp_path / "other")))
    run = runs.fit(module, runs.data(pairs), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert runs.digest(again.reference.models()[0]) == runs.digest(other.policy)


def test_a_checkpoint_imports_nothing(pairs, tmp_path):
    run = runs.fit(runs.module(), runs.data(pairs), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    content["hyper_parameters"]["loss"]["class_path"] = "evil.Loss"
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"`evil\.Loss` is not known: import the module that defines it"):
        PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_options_given_to_load_from_checkpoint_win(pairs, tmp_path):
    run = runs.fit(runs.module(), runs.data(pairs), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PreferenceModule.load_from_checkpoint(tmp_path / "a.ckpt", loss=IPOLoss(beta=0.7))
    assert again.loss == IPOLoss(beta=0.7)


def test_a_run_continues_from_its_checkpoint(pairs, tmp_path):
    """At an epoch's end; the weights and the optimizer's state come back."""
    options = {"optimizer": torch.optim.AdamW, "lr": 1e-2}
    whole = runs.module(**options)
    runs.fit(whole, runs.data(pairs), max_epochs=4)
    run = runs.fit(runs.module(**options), runs.data(pairs), max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = runs.module(**options)
    runs.trainer(max_epochs=4).fit(rest, runs.data(pairs), ckpt_path=tmp_path / "half.ckpt")
    assert runs.same(runs.weights(rest.policy), runs.weights(whole.policy))


def test_options_are_kept_as_plain_values():
    module = runs.module(loss=IntermediateLoss(DPOLoss(beta=0.2), layers=(1, 0.5)), adapter=LoRA(rank=4))
    hparams = dict(module.hparams)
    assert hparams["model"] == runs.LLAMA
    assert hparams["adapter"] == {"rank": 4, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    assert hparams["loss"] == {
        "class_path": "lit_dpo.IntermediateLoss",
        "init_args": {
            "base": {
                "class_path": "lit_dpo.DPOLoss",
                "init_args": {"beta": 0.2, "label_smoothing": 0.0, "length_normalize": False},
            },
            "layers": [1, 0.5],
            "weight": 0.3,
            "combine": "convex",
            "detach_head": False,
        },
    }


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_rounded_positions_are_refused(pairs, precision):
    with pytest.raises(ValueError, match=r"makes long texts wrong: set the module's `dtype: bfloat16`"):
        runs.fit(runs.module(), runs.data(pairs), precision=precision)


def test_bf16_mixed_starts_at_log_2_and_trains(pairs):
    module = runs.module(lr=0.1)
    run = runs.trainer(precision="bf16-mixed", max_epochs=2)
    values = runs.trainer(precision="bf16-mixed").validate(module, runs.data(pairs), verbose=False)[0]
    assert values["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    run.fit(module, runs.data(pairs))
    assert run.callback_metrics["val/loss"] < math.log(2)
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}


def test_a_description_needs_a_tokenizer():
    with pytest.raises(ValueError, match="has no tokenizer of its own: set `tokenizer`"):
        PreferenceModule(runs.LLAMA)


def test_a_layer_out_of_range_is_named(pairs):
    with pytest.raises(ValueError, match=r"`layers` holds 7, but the decoder has 2 blocks"):
        runs.fit(runs.module(loss=IntermediateLoss(layers=(7,))), runs.data(pairs))


def test_endless_training_needs_a_schedule_of_known_length(pairs):
    module = PreferenceModule(runs.LLAMA, tokenizer="quickstart")
    with pytest.raises(ValueError, match=r"cannot know when training ends: .*`max_epochs`"):
        runs.fit(module, runs.data(pairs), max_epochs=-1)
