"""The pieces in projects of somebody else's: both examples run as they stand, and are short."""

import csv
import math
import runpy
from pathlib import Path

import pytest
import torch

from lit_dpo import DPOLoss, score
from tests import runs

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
]

EXAMPLES = Path(__file__).parent / "examples"


def run(name, folder, monkeypatch):
    """Run an example in an empty folder, and return what it has defined."""
    monkeypatch.chdir(folder)
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 30
    return runpy.run_path(str(path))


def test_module_and_data_in_a_plain_trainer(tmp_path, monkeypatch):
    found = run("plain_trainer", tmp_path, monkeypatch)
    trainer = found["trainer"]
    assert trainer.global_step == 4
    assert trainer.callback_metrics["val/loss"] < math.log(2)
    with open(f"{trainer.logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(next(row["train/loss"] for row in rows if row["train/loss"])) == pytest.approx(math.log(2), rel=1e-5)
    assert [row for row in rows if row["lr-AdamW"]]


def test_log_probs_and_loss_in_another_module(tmp_path, monkeypatch):
    found = run("own_module", tmp_path, monkeypatch)
    module, batch = found["module"], found["batch"]
    with torch.no_grad():
        loss = DPOLoss(beta=0.1)(score(module.policy, batch), score(module.frozen, batch)).mean()
    assert found["trainer"].global_step == 4
    assert loss < math.log(2) - 1e-3
    assert list(tmp_path.iterdir()) == []
