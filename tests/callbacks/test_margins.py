"""Margins recorded in training: each row once an epoch, as the policy was before the row's step, whatever happens."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lit_dpo.callbacks import RecordMargins
from tests import interrupted, runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore:.*val_check_interval")]


def recorded(folder):
    return [json.loads(line) for line in (folder / "margins.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2)])
def test_they_are_the_margins_of_the_policy_each_once_an_epoch(tmp_path, batch_size, accumulate):
    """At rate 0 the policy stays what it was; 23 rows fill neither the last batch nor the last step."""
    path = runs.pairs_file(tmp_path, 23)
    module = runs.module(lr=0.0)
    data = runs.data(path, batch_size=batch_size, validation_fraction=0, predict="train")
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "callbacks": [RecordMargins()]}
    trainer = runs.fit(module, data, tmp_path / "run", **options)
    found = recorded(tmp_path / "run")
    assert [line["row"] for line in found] == [f"{path}:{n}" for n in range(1, 24)]
    predicted, lengths = {}, {}
    for batch in trainer.predict(module, data):
        rows = batch["row_id"].tolist()
        predicted |= dict(zip(rows, (batch["logp_chosen"] - batch["logp_rejected"]).tolist(), strict=True))
        lengths |= dict(zip(rows, (batch["chosen_tokens"] - batch["rejected_tokens"]).tolist(), strict=True))
    assert {line["row_id"]: line["length_difference"] for line in found} == lengths
    for line in found:
        margin = predicted[line["row_id"]]
        assert line["margins"] == pytest.approx([margin, margin], abs=1e-4)
        assert line["reference_margin"] == pytest.approx(margin, abs=1e-4)


def test_they_are_those_from_before_the_step(tmp_path):
    """With one step an epoch the first epoch knows of none."""
    data = runs.data(runs.pairs_file(tmp_path, 8), validation_fraction=0)
    runs.fit(runs.module(lr=0.5), data, tmp_path / "run", max_epochs=2, callbacks=[RecordMargins()])
    for line in recorded(tmp_path / "run"):
        assert line["margins"][0] == pytest.approx(line["reference_margin"], abs=1e-4)
        assert abs(line["margins"][1] - line["reference_margin"]) > 1e-3


class Crash(Callback):
    """Ends as a process that is killed does: nothing is saved on the way."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == 11:
            raise RuntimeError("killed")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The last checkpoint is three batches old, so these are done twice, and recorded once."""
    options = {"file": runs.pairs_file(tmp_path, 26), "margins": True, "accumulate": 2, "batch_size": 2, "every": 2}
    options["val_every"] = 6
    interrupted.train(tmp_path / "whole", options)
    parts = interrupted.parts
    monkeypatch.setattr(interrupted, "parts", lambda *a: (*(p := parts(*a))[:2], [*p[2], Crash()]))
    with pytest.raises(RuntimeError, match="killed"):
        interrupted.train(tmp_path / "run", options)
    monkeypatch.undo()
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4  # and five were done
    interrupted.train(tmp_path / "run", options, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (tmp_path / "run" / "margins.jsonl").read_bytes() == (tmp_path / "whole" / "margins.jsonl").read_bytes()


@pytest.mark.slow
def test_a_process_that_was_killed_outright_leaves_the_same_file(tmp_path):
    """SIGKILL in the middle of the 17th batch, in the second epoch and behind the last checkpoint."""
    options = {"file": runs.pairs_file(tmp_path, 26), "margins": True, "accumulate": 2, "batch_size": 2, "every": 3}
    options["val_every"] = 6
    killed = {**options, "terminate": 16, "signal": signal.SIGKILL}

    def process(folder, options):
        command = [sys.executable, "-m", "tests.interrupted", str(tmp_path / folder), json.dumps(options)]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=120).returncode

    assert process("whole", options) == 0
    assert process("run", killed) == -signal.SIGKILL
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] < 8  # the steps done by then
    (tmp_path / "run" / "margins.jsonl.bak").write_text("mine")
    assert process("run", options) == 0
    assert (tmp_path / "run" / "margins.jsonl").read_bytes() == (tmp_path / "whole" / "margins.jsonl").read_bytes()
    assert {len(line["margins"]) for line in recorded(tmp_path / "run")} == {2}
    assert (tmp_path / "run" / "margins.jsonl.bak").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    options = {"file": runs.pairs_file(tmp_path, 25), "batch_size": 2, "margins": True}
    alone = {**options, "accumulate": 2, "val_every": 6}
    interrupted.train(tmp_path / "one", alone)
    together = {**options, "strategy": "ddp", "devices": 2}
    runs.launch(["tests.interrupted", str(tmp_path / "two"), json.dumps(together)])
    stop = {**together, "every": 1000, "terminate": 4}
    runs.launch(["tests.interrupted", str(tmp_path / "stopped"), json.dumps(stop)], code=143)
    runs.launch(["tests.interrupted", str(tmp_path / "stopped"), json.dumps(together)])
    one, two = recorded(tmp_path / "one"), recorded(tmp_path / "two")
    assert recorded(tmp_path / "stopped") == two
    assert [line["row"] for line in one] == [line["row"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["margins"] == pytest.approx(b["margins"], abs=1e-3)
        assert len(a["margins"]) == 2


def test_a_file_of_an_earlier_epoch_is_replaced_whole_and_nothing_beside_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    decoy = folder / "margins.jsonl.bak"
    decoy.write_text("mine")
    data = runs.data(runs.pairs_file(tmp_path, 8), validation_fraction=0)
    runs.fit(runs.module(), data, folder, max_epochs=2, callbacks=[RecordMargins()])
    assert decoy.read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["margins.jsonl", "margins.jsonl.bak"]
    shutil.rmtree(folder)
