"""Callbacks that watch a metric: the names there are, and what happens without validation."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_dpo import CachedReference, IntermediateLoss, SFTLoss
from lit_dpo.callbacks import BestCheckpoint, RewardEarlyStopping
from lit_dpo.cli import main
from lit_dpo.metrics import SHOWN, metric_names
from tests import runs
from tests.test_cli import command

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


class Own(Callback):
    """Logs a metric that nobody can know of."""

    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics["mine"] = trainer.callback_metrics["val/loss"]


@pytest.fixture
def pairs(tmp_path):
    return runs.pairs_file(tmp_path)


@pytest.mark.parametrize("loss", [None, IntermediateLoss(layers=(0.5,)), SFTLoss()], ids=repr)
def test_the_names_known_before_training_are_those_that_are_logged(pairs, tmp_path, loss):
    module = runs.module(**({} if loss is None else {"loss": loss}))
    run = runs.fit(module, runs.data(pairs), tmp_path, log_every_n_steps=1)
    for_the_bar = {*SHOWN.values(), "tokens/s"}
    assert metric_names(module.loss, True) == set(run.callback_metrics) - for_the_bar


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("val_loss"),
        ModelCheckpoint(monitor="val/rewards/accuracy"),
        RewardEarlyStopping("val/accuracies"),
        BestCheckpoint("rewards/accuracies"),
        EarlyStopping("test/loss"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_an_unknown_metric_is_refused_at_the_start_with_the_names_there_are(pairs, tmp_path, monkeypatch, callback):
    monkeypatch.setattr(CachedReference, "prepare", lambda *a: pytest.fail("scored in vain"))
    module = runs.module(reference=CachedReference(str(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"watches `.*`, and there is no such metric: name one of .*val/"):
        runs.fit(module, runs.data(pairs), tmp_path, callbacks=[callback], enable_checkpointing=True)
    assert not (tmp_path / "checkpoints").exists()


def test_an_unknown_metric_on_the_command_line_is_one_sentence(tmp_path, capsys):
    more = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss")
    with pytest.raises(SystemExit) as stop:
        main(command("fit", tmp_path, "dpo", *more))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: `EarlyStopping` watches `val_loss`, and there is no such metric: name one of lr, train/" in said
    assert "Traceback" not in said


def test_metrics_of_ones_own_may_be_watched(pairs, tmp_path):
    callbacks = [Own(), EarlyStopping("mine", check_on_train_epoch_end=False)]
    assert runs.fit(runs.module(), runs.data(pairs), tmp_path, callbacks=callbacks).global_step == 3


def test_without_validation_our_callbacks_say_once_that_they_do_nothing(tmp_path, caplog):
    """With the shipped configuration, which has both of them."""
    train = ("--data.train", runs.pairs_file(tmp_path, 24), "--data.batch_size", 4, "--data.validation_fraction", 0)
    more = (*train, "--trainer.accumulate_grad_batches", 1, "--trainer.max_steps", 6, "--trainer.val_check_interval", 2)
    with caplog.at_level("INFO"):
        main(command("fit", tmp_path / "run", "dpo", *more))
    text = caplog.text
    sentence = "There is no validation, so `RewardEarlyStopping` and `BestCheckpoint` can do nothing: training goes"
    assert text.count(sentence) == 1
    assert text.count("validation: none, as `validation_fraction` is 0; all 24 pairs are trained on") == 1
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("callback", [EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss")])
@pytest.mark.parametrize("how", ["validation_fraction", "limit_val_batches"])
def test_without_validation_other_callbacks_cannot_watch_it(pairs, tmp_path, callback, how):
    data = runs.data(pairs, **({"validation_fraction": 0} if how == "validation_fraction" else {}))
    options = {"limit_val_batches": 0} if how == "limit_val_batches" else {}
    with pytest.raises(ValueError, match="`val/loss`, and without validation there is none: name one of lr, train/"):
        runs.fit(runs.module(), data, tmp_path, callbacks=[callback], enable_checkpointing=True, **options)


def test_without_validation_a_cached_reference_scores_the_training_rows(pairs, tmp_path):
    reference = CachedReference(str(tmp_path / "cache"))
    runs.fit(runs.module(reference=reference), runs.data(pairs, validation_fraction=0), max_steps=1)
    assert reference.scored == 24


def test_watching_a_metric_of_training_needs_no_validation(pairs, tmp_path):
    stop = EarlyStopping("train/loss", patience=50, check_on_train_epoch_end=True)
    options = {"callbacks": [stop], "log_every_n_steps": 1}
    assert runs.fit(runs.module(), runs.data(pairs, validation_fraction=0), tmp_path, **options).global_step == 3
