"""The guard before the optimizer step, clipping, and that no broken weights are saved."""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.utils import clip_grad_norm_

from lit_dpo import CachedReference, FrozenReference
from lit_dpo.callbacks import ExportModel, LastCheckpoint
from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.checkpoints.shards import read_shards
from lit_dpo.cli import main
from lit_dpo.gradients import clip_to_norm, gradient_norm
from tests import runs
from tests.test_cli import command

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


class Spoil(Callback):
    """At one batch of training, spoil a value, and remember the weights from before."""

    def __init__(self, batch, monkeypatch, what, value):
        self.batch, self.monkeypatch, self.what, self.value = batch, monkeypatch, what, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx != self.batch:
            return
        self.rows = batch.row_ids.tolist()
        self.weights = runs.weights(pl_module.policy)
        self.state = {key: {k: v.clone() for k, v in s.items()} for key, s in trainer.optimizers[0].state.items()}
        if self.what == "gradient":
            weight = next(pl_module.policy.parameters())
            weight.register_hook(lambda grad: grad * self.value)
            return
        original = pl_module.forward

        def forward(batch):
            policy, reference = original(batch)
            whose, which = self.what.split(".")
            found = {"policy": policy, "reference": reference}
            values = getattr(found[whose], which)
            values = torch.where(torch.arange(len(values)) == 1, self.value, values)
            found[whose] = replace(found[whose], **{which: values})
            return found["policy"], found["reference"]

        self.monkeypatch.setattr(pl_module, "forward", forward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["policy.chosen", "policy.rejected", "reference.chosen", "reference.rejected"])
def test_the_pair_and_the_side_are_named_and_no_weight_changes(tmp_path, monkeypatch, what, value):
    spoil = Spoil(3, monkeypatch, what, value)
    module = runs.module(optimizer=torch.optim.AdamW, lr=1e-2)
    data = runs.data(runs.pairs_file(tmp_path), batch_size=4, validation_fraction=0.2)
    with pytest.raises(FloatingPointError) as stop:
        runs.fit(module, data, max_epochs=2, callbacks=[spoil], accumulate_grad_batches=2)
    text = str(stop.value)
    row = spoil.rows[1]
    whose, which = what.split(".")
    assert f"pairs.jsonl:{row + 1} (row {row}): {whose}'s log-prob of {which} {value}" in text
    assert "before optimizer step 2, process 0" in text
    assert text.count("(row ") == 1
    assert runs.same(runs.weights(module.policy), spoil.weights)


def test_a_gradient_that_is_not_finite_names_all_rows_of_the_step(tmp_path, monkeypatch):
    spoil = Spoil(2, monkeypatch, "gradient", math.nan)
    module, data = runs.module(optimizer=torch.optim.AdamW, lr=1e-2), runs.data(runs.pairs_file(tmp_path), batch_size=4)
    with pytest.raises(FloatingPointError, match="the gradient is not finite") as stop:
        runs.fit(module, data, max_epochs=2, callbacks=[spoil])
    assert all(f"(row {row})" in str(stop.value) for row in spoil.rows)
    assert str(stop.value).count("(row ") == 4
    assert runs.same(runs.weights(module.policy), spoil.weights)


def test_a_cached_nan_is_found_too(tmp_path, monkeypatch):
    """A row of which the reference gives NaN, as a poisoned cache would hold."""
    reference = CachedReference(str(tmp_path / "cache"))
    original = reference.prepare

    def prepare(start):
        original(start)
        reference._table.columns["last"][4, 1] = math.nan

    monkeypatch.setattr(reference, "prepare", prepare)
    module = runs.module(reference=reference)
    with pytest.raises(FloatingPointError, match=r"pairs\.jsonl:\d+ \(row \d+\): reference's log-prob of rejected nan"):
        runs.fit(module, runs.data(runs.pairs_file(tmp_path), batch_size=4), max_epochs=1, limit_val_batches=0)


def test_clipping_is_what_torch_does(tmp_path):
    def trained(own):
        class Clip(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                if not own:
                    clip_grad_norm_(pl_module.policy.parameters(), 0.5)

        module, data = runs.module(reference=FrozenReference()), runs.data(runs.pairs_file(tmp_path), batch_size=4)
        runs.fit(module, data, max_epochs=1, callbacks=[Clip()], gradient_clip_val=0.5 if own else None)
        return runs.weights(module.policy)

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-7)


def test_the_norm_by_hand():
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(3)),
    ]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1)
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    norm = gradient_norm(None, optimizer)
    assert float(norm) == 7
    clip_to_norm(optimizer, norm, 14.0)
    assert parameters[0].grad.tolist() == [2.0, 3.0]
    clip_to_norm(optimizer, norm, 3.5)
    assert parameters[0].grad.tolist() == pytest.approx([1.0, 1.5])
    assert parameters[1].grad.tolist() == pytest.approx([3.0])


def test_clipping_by_value_still_works(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.extend(float(p.grad.abs().max()) for p in pl_module.policy.parameters() if p.grad is not None)

    module, data = runs.module(), runs.data(runs.pairs_file(tmp_path), batch_size=4)
    runs.fit(module, data, callbacks=[Look()], gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert seen
    assert max(seen) <= 1e-3 + 1e-9


def test_a_fused_optimizer_and_scaled_gradients_do_not_go_together(monkeypatch):
    module = runs.module()
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    trainer = SimpleNamespace(precision="16-mixed", global_step=0, log_every_n_steps=10)
    monkeypatch.setattr(type(module), "trainer", trainer)
    plain, fused = (torch.optim.AdamW([weight], fused=fused) for fused in (False, True))
    module.configure_gradient_clipping(plain, 1.0, "norm")
    assert float(weight.grad.norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="set its `fused: false`"):
        module.configure_gradient_clipping(fused, 1.0, "norm")


# -- no broken weights leave the run ----------------------------------------------------------------------------------


SAVING = {"enable_checkpointing": True}


def finite(path):
    """Whether every number in a checkpoint is, looked at one by one."""
    content = torch.load(path, weights_only=True)
    states = [list(state.values()) for state in content["optimizer_states"][0]["state"].values()]
    tensors = [*content["state_dict"].values(), *(value for state in states for value in state)]
    return all(math.isfinite(number) for tensor in tensors for number in tensor.flatten().tolist())


def test_a_step_that_breaks_the_weights_saves_and_exports_nothing(tmp_path, capsys):
    more = ("--model.optimizer.lr", 1e39, "--trainer.max_steps", 1, "--model.lr_scheduler", "null")
    more += ("--trainer.callbacks+", "ExportModel")
    with pytest.raises(SystemExit) as stop:
        main(command("fit", tmp_path, "dpo", *more))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "is not finite after optimizer step 1" in text
    assert "There is no finite checkpoint to resume from" in text
    assert "Traceback" not in text
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".part")]


class Break(Callback):
    """After an optimizer step, break one number of the weights or of the optimizer's state."""

    def __init__(self, step, what, value=math.nan):
        self.step, self.what, self.value = step, what, value

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step != self.step:
            return
        weight = list(pl_module.policy.parameters())[3]
        tensor = weight if self.what == "weight" else trainer.optimizers[0].state[weight][self.what]
        tensor.data.view(-1)[7] = self.value


@pytest.mark.parametrize(
    ("what", "value"), [("weight", math.nan), ("weight", -math.inf), ("exp_avg", math.nan), ("exp_avg_sq", math.inf)]
)
def test_what_is_not_finite_is_never_saved_over_a_good_checkpoint(tmp_path, what, value):
    callbacks = [Break(3, what, value), LastCheckpoint(1, str(tmp_path)), ExportModel(str(tmp_path / "export"))]
    module = runs.module(optimizer=torch.optim.AdamW)
    with pytest.raises(FloatingPointError) as stop:
        runs.fit(
            module, runs.data(runs.pairs_file(tmp_path), batch_size=4), max_epochs=2, callbacks=callbacks, **SAVING
        )
    name = [name for name, _ in module.policy.named_parameters()][3]
    shown = f"The weight `{name}`" if what == "weight" else f"The optimizer's `{what}` of `{name}`"
    assert str(stop.value).startswith(f"{shown} is not finite after optimizer step 3, and nothing is saved of it.")
    assert f"Resume from `{tmp_path / 'last.ckpt'}`, which is finite." in str(stop.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert finite(tmp_path / "last.ckpt")
    assert not (tmp_path / "export").exists()


def test_the_advice_never_names_a_checkpoint_that_is_broken(tmp_path):
    """Two broken ones lie in the folder, newer than the sound one; and one that is no checkpoint to resume from."""
    data = runs.pairs_file(tmp_path)
    callbacks = [LastCheckpoint(1, str(tmp_path))]
    runs.fit(runs.module(optimizer=torch.optim.AdamW), runs.data(data), max_steps=2, callbacks=callbacks, **SAVING)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] = math.nan
    torch.save(content, tmp_path / "nan.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "nan.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    for number, path in enumerate((tmp_path / "last.ckpt", tmp_path / "previous.ckpt")):
        os.utime(path, (1000 - number, 1000 - number))
    resumed = runs.trainer(callbacks=[LastCheckpoint(1, str(tmp_path))], max_steps=4, **SAVING)
    module = runs.module(optimizer=torch.optim.AdamW)
    with pytest.raises(FloatingPointError, match=r"The optimizer's `exp_avg` of `.*` is not finite") as stop:
        resumed.fit(module, runs.data(data), ckpt_path=tmp_path / "nan.ckpt")
    assert f"Resume from `{tmp_path / 'last.ckpt'}`, which is finite." in str(stop.value)
    assert resumed.global_step == 2  # none was made with it


def test_broken_weights_found_before_a_step_are_not_blamed_on_the_rows(tmp_path):
    callbacks = [Break(3, "weight"), LastCheckpoint(2, str(tmp_path))]
    with pytest.raises(FloatingPointError) as stop:
        runs.fit(
            runs.module(),
            runs.data(runs.pairs_file(tmp_path), batch_size=4),
            max_epochs=2,
            callbacks=callbacks,
            **SAVING,
        )
    assert "before optimizer step 4, process 0: The weight `" in str(stop.value)
    assert "is not finite since an earlier step" in str(stop.value)
    assert "No weight has changed" not in str(stop.value)
    assert f"Resume from `{tmp_path / 'last.ckpt'}`" in str(stop.value)


@pytest.mark.parametrize("stage", ["fit", "validate", "export"])
def test_a_checkpoint_with_broken_weights_is_named_as_such(tmp_path, capsys, stage):
    run = runs.fit(runs.module(), runs.data(runs.pairs_file(tmp_path)), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"]["policy.model.norm.weight"][3] = math.inf
    torch.save(content, tmp_path / "nan.ckpt")
    given = str(tmp_path / "nan.ckpt")
    more = command(stage, tmp_path / "run", "dpo", "--ckpt_path", given, "--trainer.accumulate_grad_batches", 1)
    more += ["--allow-changes"] if stage == "fit" else []  # the shipped configuration has other data
    with pytest.raises(SystemExit) as stop:
        main(["export", given, str(tmp_path / "out")] if stage == "export" else more)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "nats" not in text
    assert "Traceback" not in text
    assert "`model.norm.weight` first, and is not exported" in text or "The weight `model.norm.weight` is not f" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_no_process_saw_in_its_own_shards_stops_all(tmp_path):
    """One of two processes holds an infinity in its share: both stop, and the folder of shards before it is sound."""
    options = {"file": runs.pairs_file(tmp_path, 25), "batch_size": 2, "devices": 2, "shards": True, "spoil": 4}
    runs.launch(["tests.interrupted", str(tmp_path / "run"), json.dumps(options)], code=3)
    first, second = ((tmp_path / "run" / f"error_{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("What another process holds is not finite after optimizer step")
    assert second.startswith("The weight `model.embed_tokens.weight` is not finite after optimizer step")
    kept = tmp_path / "run" / "checkpoints" / "previous.ckpt"
    assert f"Resume from `{kept}`, which is finite." in first
    found = read_shards(kept, "state_dict.")["state_dict"]
    assert len(found) > 20
    assert all(math.isfinite(number) for tensor in found.values() for number in tensor.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_large_sum_of_finite_numbers_is_no_infinity(dtype):
    large = torch.tensor([torch.finfo(dtype).max] * 35, dtype=dtype).view(5, 7)
    assert first_nonfinite([("a", large), ("whole", torch.arange(10)), ("empty", large[:0]), ("b", large)]) is None
    broken = large.clone()
    broken[4, 6] = math.nan
    assert first_nonfinite([("a", large), ("b", broken), ("c", broken)]) == "b"
    assert first_nonfinite([("meta", large.to("meta"))]) is None
