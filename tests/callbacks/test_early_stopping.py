"""Early stopping and the best checkpoint: what they look at, what they ignore, what they keep."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lit_dpo.callbacks import BestCheckpoint, RewardEarlyStopping, RunSummary
from lit_dpo.checkpoints.verify import verify
from tests import runs

pytestmark = runs.QUIET

TIE = (0.5, 1.0)


class Scripted(LightningModule):
    """Reports given accuracies and tie rates, one validation after the other, one step between two."""

    def __init__(self, script):
        super().__init__()
        self.script, self.seen = script, 0
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch.float()).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        accuracy, ties = self.script[self.seen]
        self.seen += 1
        self.log("val/rewards/accuracies", accuracy)
        self.log("val/rewards/ties", ties)
        self.log("val/loss", 1 - accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def follow(script, folder, *callbacks):
    """Run a script, with a validation after each step; return the number of validations seen."""
    module, loader = Scripted(script), DataLoader([1.0] * len(script))
    checkpoints = any(isinstance(callback, BestCheckpoint) for callback in callbacks)
    options = {"max_epochs": 1, "val_check_interval": 1, "enable_checkpointing": checkpoints}
    runs.trainer(folder, callbacks=list(callbacks), **options).fit(module, loader, loader)
    return module.seen


def names(folder):
    return sorted(path.name for path in folder.rglob("*.ckpt"))


def test_it_stops_at_a_plateau(tmp_path):
    script = [(0.6, 0), (0.7, 0), (0.7, 0), (0.65, 0), (0.9, 0), (0.9, 0)]
    assert follow(script, tmp_path, RewardEarlyStopping(patience=2)) == 4
    assert follow(script, tmp_path, RewardEarlyStopping(patience=3)) == 6
    assert follow(script, tmp_path, RewardEarlyStopping(patience=1, min_delta=0.2)) == 2


def test_the_end_of_the_run_says_why_it_stopped_early(tmp_path, capsys):
    """And a run that goes to its end says nothing of it, not even if it goes on where one has stopped."""
    script, stopping = [(0.6, 0), (0.7, 0), (0.7, 0), (0.65, 0), (0.9, 0)], RewardEarlyStopping(patience=2)
    follow(script, tmp_path, stopping, RunSummary())
    said = " ".join(capsys.readouterr().out.split())
    why = "Monitored metric val/rewards/accuracies did not improve in the last 2 records. Best score: 0.700."
    assert f"Stopped early, at step 4: {why} Accuracy fell after step 2" in said
    again = RewardEarlyStopping(patience=3)
    again.load_state_dict(stopping.state_dict())
    follow([(0.9, 0), (0.9, 0)], tmp_path, again, RunSummary())
    assert "Stopped early" not in capsys.readouterr().out
    follow(script[:4], tmp_path, RewardEarlyStopping(patience=2), RunSummary())  # its last validation says stop
    assert "Stopped early" not in capsys.readouterr().out


def test_the_tie_before_the_first_step_is_no_accuracy_to_beat(tmp_path):
    script = [TIE, TIE, TIE, (0.3, 0.1), (0.4, 0), (0.45, 0), (0.49, 0)]
    assert follow(script, tmp_path, RewardEarlyStopping(patience=1)) == len(script)


def test_ties_alone_never_stop_a_run(tmp_path):
    assert follow([TIE] * 6, tmp_path, RewardEarlyStopping(patience=1)) == 6


def test_half_of_the_pairs_right_is_no_tie(tmp_path):
    assert follow([(0.5, 0.9)] * 6, tmp_path, RewardEarlyStopping(patience=2)) == 3


def test_a_broken_run_stops_at_once(tmp_path):
    assert follow([(0.6, 0), (math.nan, 0), (0.7, 0)], tmp_path, RewardEarlyStopping(patience=5)) == 2


def test_another_metric_and_direction(tmp_path):
    script = [(0.6, 0), (0.7, 0), (0.6, 0), (0.6, 0), (0.9, 0)]
    assert follow(script, tmp_path, RewardEarlyStopping("val/loss", patience=2, mode="min")) == 4


def test_a_real_run_with_no_learning_rate_never_stops_and_has_no_best(tmp_path):
    callbacks = [RewardEarlyStopping(patience=1), BestCheckpoint(dirpath=str(tmp_path))]
    module, data = runs.module(lr=0.0), runs.data(runs.pairs_file(tmp_path), batch_size=4)
    run = runs.fit(
        module, data, max_epochs=2, val_check_interval=1, num_sanity_val_steps=2, callbacks=callbacks,
        enable_checkpointing=True,
    )  # fmt: skip
    assert run.global_step == 12
    assert names(tmp_path) == []


def test_the_best_checkpoint_is_kept(tmp_path):
    best = BestCheckpoint(dirpath=str(tmp_path))
    follow([TIE, (0.6, 0), (0.8125, 0), (0.7, 0)], tmp_path, best)
    assert names(tmp_path) == ["step=3-accuracies=0.812.ckpt"]
    assert best.best_model_path == str(tmp_path / "step=3-accuracies=0.812.ckpt")
    assert best.best_model_score == 0.8125
    verify(tmp_path / "step=3-accuracies=0.812.ckpt")
    assert [path.name for path in tmp_path.glob("*.json")] == ["step=3-accuracies=0.812.ckpt.json"]


def test_a_tie_is_never_the_best(tmp_path):
    follow([TIE, (0.3, 0)], tmp_path, BestCheckpoint(dirpath=str(tmp_path)))
    assert names(tmp_path) == ["step=2-accuracies=0.300.ckpt"]


def test_checkpoints_go_into_the_run_and_are_named_after_their_metric(tmp_path):
    follow([(0.6, 0), (0.75, 0)], tmp_path, BestCheckpoint("val/loss", mode="min", save_top_k=-1))
    assert [path.parent for path in tmp_path.rglob("*.ckpt")] == [tmp_path / "checkpoints"] * 2
    assert names(tmp_path) == ["step=1-loss=0.400.ckpt", "step=2-loss=0.250.ckpt"]


def test_patience_survives_a_restart(tmp_path):
    """A stopped counter continues where the checkpoint left it."""
    script = [(0.9, 0), (0.8, 0), (0.7, 0), (0.6, 0)]
    stopping = RewardEarlyStopping(patience=3)
    follow(script[:3], tmp_path, stopping, BestCheckpoint(dirpath=str(tmp_path)))
    again = RewardEarlyStopping(patience=3)
    again.load_state_dict(stopping.state_dict())
    assert (again.wait_count, float(again.best_score)) == (2, pytest.approx(0.9))
