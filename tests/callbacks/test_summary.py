"""The table at the end of a run."""

import re
import shlex
from types import SimpleNamespace

import pytest

from lit_dpo.callbacks import BestCheckpoint, RunSummary
from tests import runs

pytestmark = runs.QUIET


def printed(capsys, validations, sanity_steps=2, **checkpoint):
    """What is printed after these validations: pairs of step and metrics."""
    summary = RunSummary()
    kept = SimpleNamespace(**checkpoint) if checkpoint else None
    for step, values in validations:
        trainer = SimpleNamespace(
            sanity_checking=step is None, callback_metrics=values, global_step=step, is_global_zero=True,
            checkpoint_callback=kept, num_sanity_val_steps=sanity_steps, early_stopping_callbacks=[],
        )  # fmt: skip
        summary.on_validation_end(trainer, None)
    summary.on_fit_end(trainer, None)
    return capsys.readouterr().out


def row(text, name):
    line = next(line for line in text.splitlines() if re.match(rf"\W*{re.escape(name)}\b", line))
    return [float(cell) for cell in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", line)]


VALIDATIONS = [
    (0, {"val/loss": 0.7, "val/rewards/accuracies": 0.5}),
    (20, {"val/loss": 0.4, "val/rewards/accuracies": 0.75}),
    (30, {"val/loss": 0.3, "val/rewards/accuracies": 0.625}),
]


def test_first_best_and_last_stand_side_by_side(capsys):
    text = printed(capsys, VALIDATIONS)
    assert row(text, "rewards/accuracies") == [0.5, 0.75, 0.625]
    assert row(text, "loss") == [0.7, 0.4, 0.3]
    assert re.findall(r"\(step (\d+)\)", text) == ["0", "20", "30"]
    assert "displacement" not in text
    assert "No best checkpoint was kept; add `BestCheckpoint`" in text


def test_the_best_is_what_the_checkpoint_callback_says(capsys):
    text = printed(capsys, VALIDATIONS, monitor="val/loss", mode="min", best_model_path="runs/a b/x=1.ckpt")
    assert row(text, "loss") == [0.7, 0.3, 0.3]
    assert "Best checkpoint: runs/a b/x=1.ckpt" in text
    assert "Next: lit-dpo export 'runs/a b/x=1.ckpt' OUTPUT_DIR" in text


def test_where_no_validation_could_rank_a_checkpoint_nobody_is_told_to_add_one(capsys):
    text = printed(capsys, VALIDATIONS[:1], monitor="val/loss", best_model_path="")
    assert "No best checkpoint was kept, as no validation gave one: validate more often" in " ".join(text.split())
    assert "add `BestCheckpoint`" not in text


def test_the_next_command_can_be_pasted_whatever_the_path(capsys):
    path = "runs/it's $(mine)/x=1.ckpt"
    text = printed(capsys, VALIDATIONS, best_model_path=path)
    assert shlex.split(text.partition("Next: ")[2]) == ["lit-dpo", "export", path, "OUTPUT_DIR"]


def test_the_sanity_check_is_no_validation(capsys):
    assert printed(capsys, [(None, {"val/loss": 9.0}), *VALIDATIONS]).count("9") == 0


def test_a_sanity_check_of_the_whole_split_is_the_start(capsys):
    text = printed(capsys, [(None, {"val/loss": 9.0}), *VALIDATIONS], sanity_steps=float("inf"))
    assert row(text, "loss") == [9.0, 0.4, 0.3]  # the best by accuracy


def test_no_validation_no_table(capsys):
    assert printed(capsys, [(None, {"val/loss": 9.0})]) == ""


def test_a_run_names_its_own_checkpoint(tmp_path, capsys):
    best = BestCheckpoint(dirpath=str(tmp_path / "it's kept"))
    run = runs.fit(
        runs.module(lr=0.1), runs.data(runs.pairs_file(tmp_path)), max_epochs=2,
        callbacks=[best, RunSummary()], enable_checkpointing=True,
    )  # fmt: skip
    text = capsys.readouterr().out
    command = text.partition("Next: ")[2]
    assert shlex.split(command) == ["lit-dpo", "export", best.best_model_path, "OUTPUT_DIR"]
    assert row(text, "loss")[-1] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-3)


def test_a_resumed_run_knows_the_validations_before(capsys):
    first, second = RunSummary(), RunSummary()
    first._history = [(0, {"val/loss": 0.7}), (20, {"val/loss": 0.4})]
    second.load_state_dict(first.state_dict())
    trainer = SimpleNamespace(
        sanity_checking=False, callback_metrics={"val/loss": 0.3}, global_step=30, is_global_zero=True,
        checkpoint_callback=None, num_sanity_val_steps=0, early_stopping_callbacks=[],
    )  # fmt: skip
    second.on_validation_end(trainer, None)
    second.on_fit_end(trainer, None)
    assert row(capsys.readouterr().out, "loss") == [0.7, 0.7, 0.3]
