"""What the module asks of a data module, and that one which answers none of it trains, too."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_dpo import PairBatch, PreferenceDataModule
from lit_dpo.callbacks.predictions import PairPredictionWriter
from lit_dpo.pair_data import PairData, pair_data
from tests import runs
from tests.test_row_values import MarginIsLoss

pytestmark = runs.QUIET


class Plain(LightningDataModule):
    """Batches and nothing else."""

    def __init__(self, columns=None):
        super().__init__()
        pairs = [([5, 6, 7], [8 + n, 9], [10, 11 + n]) for n in range(4)]
        self.batches = [PairBatch.from_lists(pairs, [4 * n + i for i in range(4)], columns=columns) for n in range(2)]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def predict_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


class Half(Plain):
    """Answers some of the questions, in its own way."""

    sources = ("mine",)

    def origin(self, place):
        raise AssertionError("this is another `origin`")


@pytest.mark.parametrize("kind", [Plain, Half])
def test_a_data_module_of_batches_alone_trains_saves_and_goes_on(kind, tmp_path):
    data, module = kind(), runs.module()
    run = runs.trainer(tmp_path, max_epochs=2, limit_val_batches=2)
    run.fit(module, data)
    assert pair_data(run) is None
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["lit_dpo"]["data"] is None
    again = runs.trainer(tmp_path, max_epochs=3, limit_val_batches=2)
    again.fit(runs.module(), kind(), ckpt_path=tmp_path / "last.ckpt")
    assert (run.global_step, again.global_step) == (4, 6)
    writer = PairPredictionWriter(str(tmp_path / "found.jsonl"))
    runs.trainer(callbacks=[writer]).predict(module, data)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in found] == list(range(8))
    assert not any("row" in row for row in found)


def test_a_row_that_spoils_a_step_has_no_name_then():
    with pytest.raises(FloatingPointError, match=r"a pair \(row 0\)"):
        runs.fit(runs.module(loss=MarginIsLoss()), Plain({"margin": [float("inf"), 1, 2, 3]}), max_steps=1)


def test_numbers_may_come_from_such_a_data_module():
    run = runs.fit(runs.module(loss=MarginIsLoss()), Plain({"margin": [1, 2, 3, 6]}), max_epochs=1)
    assert run.callback_metrics["val/loss"].item() == 3
    with pytest.raises(ValueError, match=r"`MarginIsLoss` needs the numbers `margin`.*--data\.values"):
        runs.fit(runs.module(loss=MarginIsLoss()), Plain({"other": [1, 2, 3, 6]}), max_epochs=1)


def test_the_data_module_answers_all_of_it(tmp_path):
    data = runs.data(runs.pairs_file(tmp_path), values=None)
    run = runs.fit(runs.module(), data, max_steps=1)
    assert isinstance(data, PreferenceDataModule)
    assert isinstance(data, PairData)
    assert pair_data(run) is data
    assert pair_data(None) is None
    assert pair_data(runs.trainer()) is None
