"""The guard before the optimizer step, and clipping."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.utils import clip_grad_norm_

from lit_dpo import CachedReference, FrozenReference
from lit_dpo.gradients import clip_to_norm, gradient_norm
from tests import runs

pytestmark = runs.QUIET


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
