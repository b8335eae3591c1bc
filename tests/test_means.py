"""What an optimizer step follows is the plain mean over its pairs, wherever the Trainer ends an epoch."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_dpo import CachedReference, DPOLoss, FrozenReference, SFTLoss
from lit_dpo.data.dataset import BatchPlan
from tests import runs

pytestmark = runs.QUIET
LR = 0.1


class Steps(Callback):
    """The rows of every optimizer step and the weights before it."""

    def __init__(self):
        self.rows, self.weights, self.open = [], [], False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.open:
            self.rows.append([])
            self.weights.append(runs.weights(pl_module.policy))
            self.open = True
        real = batch.row_ids if batch.weights is None else batch.row_ids[batch.weights != 0]
        self.rows[-1] += real.tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.open = (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch


@pytest.mark.parametrize(
    ("limit", "accumulate", "steps"),
    [
        (3, 2, [8, 4]),
        (1, 4, [4]),
        (0.55, 2, [8, 4]),
        (5, 4, [16, 3]),
        (6, 4, [16, 6]),
        (1.0, 4, [16, 6]),
        (4, 2, [8, 8]),
    ],
)
def test_every_step_follows_the_plain_mean_over_its_pairs(tmp_path, limit, accumulate, steps):
    """Against the gradient of the mean over the rows that the step saw, taken in one piece."""
    data = runs.data(runs.pairs_file(tmp_path, 22), validation_fraction=0, batch_size=4)
    module, seen = runs.module(lr=LR), Steps()
    options = {"limit_train_batches": limit, "accumulate_grad_batches": accumulate}
    runs.fit(module, data, callbacks=[seen], **options)
    assert [len(rows) for rows in seen.rows] == steps
    after = [*seen.weights[1:], runs.weights(module.policy)]
    for rows, before, expected in zip(seen.rows, seen.weights, after, strict=True):
        module.policy.load_state_dict(before)
        module.zero_grad()
        policy, reference = module(data._sets["train"][BatchPlan(rows)])
        DPOLoss()(policy, reference).mean().backward()
        for name, parameter in module.policy.named_parameters():
            moved = before[name] - LR * parameter.grad
            torch.testing.assert_close(moved, expected[name], rtol=0, atol=2e-7)
        assert not runs.same(before, expected)


@pytest.mark.parametrize("reference", [FrozenReference, CachedReference])
def test_a_loss_whose_reference_was_taken_away_is_refused(tmp_path, reference, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    path = runs.pairs_file(tmp_path)
    module = runs.module(reference=reference())
    module.reference = None
    message = "`DPOLoss` needs a reference, and the module's was taken away: leave `module.reference` in its place"
    with pytest.raises(ValueError, match=message):
        runs.fit(module, runs.data(path), max_steps=1)
    with pytest.raises(ValueError, match=message):
        runs.trainer().validate(module, runs.data(path), verbose=False)
    runs.fit(runs.module(loss=SFTLoss()), runs.data(path), max_steps=1)
