"""Predictions as a file: every pair once, in order, with the values that the definitions give."""

import json
from pathlib import Path

import pytest
import torch

from lit_dpo import DPOLoss, IPOLoss, PreferenceDataModule, score
from lit_dpo.callbacks import PairPredictionWriter
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET

NAMES = ["row", "row_id", "reward_chosen", "reward_rejected", "margin", "logp_chosen", "logp_rejected"]
NAMES += ["reference_logp_chosen", "reference_logp_rejected"]
NAMES += ["chosen_tokens", "rejected_tokens"]


def predicted(module, data, path, overwrite=False):
    writer = PairPredictionWriter(str(path))
    writer.overwrite = overwrite
    run = runs.trainer(callbacks=[writer])
    run.predict(module, data, return_predictions=False)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path):
    return runs.pairs_file(tmp_path, 11)


def test_every_pair_once_and_in_order(pairs, tmp_path):
    data = runs.data("quickstart", predict=pairs, eval_batch_size=4)
    rows = predicted(runs.module(), data, tmp_path / "deep" / "out.jsonl")
    assert [list(row) for row in rows] == [NAMES] * 11
    assert [row["row_id"] for row in rows] == list(range(11))
    assert [row["row"] for row in rows] == [f"{pairs}:{n}" for n in range(1, 12)]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("loss", [DPOLoss(beta=0.5), IPOLoss(beta=0.25)], ids=repr)
def test_values_are_log_ratios_times_beta(pairs, tmp_path, loss):
    module, data = runs.module(loss=loss), runs.data(pairs, predict=pairs, eval_batch_size=3)
    runs.fit(module, runs.data(pairs), max_steps=2)
    rows = predicted(module, data, tmp_path / "out.jsonl")
    start = load_model(runs.LLAMA, quickstart_tokenizer())
    for row in rows:
        batch = next(iter_batch for iter_batch in data.predict_dataloader() if row["row_id"] in iter_batch.row_ids)
        place = batch.row_ids.tolist().index(row["row_id"])
        with torch.no_grad():
            now, before = score(module.policy, batch), score(start, batch)
        for side in ("chosen", "rejected"):
            logp, reference = getattr(now, side)[place].item(), getattr(before, side)[place].item()
            assert row[f"logp_{side}"] == pytest.approx(logp, rel=1e-5)
            assert row[f"reward_{side}"] == pytest.approx(loss.beta * (logp - reference), abs=1e-4)
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-5)
    assert any(row["margin"] for row in rows)


@pytest.mark.parametrize("what", ["file", "link", "broken link", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_in_the_way_is_refused_before_scoring_and_a_file_replaced_whole_on_demand(
    pairs, tmp_path, what, overwrite
):
    out, other = tmp_path / "out.jsonl", tmp_path / "other.txt"
    other.write_text("mine")
    makes = {
        "file": lambda: out.write_text("old\n" * 99),
        "link": lambda: out.symlink_to(other),
        "broken link": lambda: out.symlink_to(tmp_path / "nowhere"),
        "folder": out.mkdir,
    }
    makes[what]()
    (tmp_path / ".out.jsonl.0").write_text("a neighbour")
    module = runs.module()
    if what == "file" and overwrite:
        assert len(predicted(module, runs.data(pairs, predict=pairs), out, overwrite)) == 11
    else:
        with pytest.raises(FileExistsError, match=r"out\.jsonl` exists already: name a"):
            predicted(module, runs.data(pairs, predict=pairs), out, overwrite)
        assert module.policy is None
    assert other.read_text() == "mine"
    assert (tmp_path / ".out.jsonl.0").read_text() == "a neighbour"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.jsonl.0", "other.txt", "out.jsonl", "pairs.jsonl"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_scoring(pairs, tmp_path):
    module = runs.module()
    with pytest.raises(OSError, match=r"out\.jsonl` cannot be written \(Not a directory\): name a file in another"):
        predicted(module, runs.data(pairs, predict=pairs), Path(pairs) / "new" / "out.jsonl")
    assert module.policy is None


def test_a_file_that_appears_while_scoring_stays_and_nothing_is_lost(pairs, tmp_path, monkeypatch):
    def origin(self, rows):
        (tmp_path / "out.jsonl").write_text("mine")
        return original(self, rows)

    original = PreferenceDataModule.origin
    monkeypatch.setattr(PreferenceDataModule, "origin", origin)
    with pytest.raises(FileExistsError, match="has appeared meanwhile, so the predictions are in") as stop:
        predicted(runs.module(), runs.data(pairs, predict=pairs), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert len(Path(str(stop.value).split("`")[3]).read_text().splitlines()) == 11


def test_held_out_pairs_say_where_they_are_from(pairs, tmp_path):
    data = runs.data(pairs, validation_fraction=0.3)
    rows = predicted(runs.module(), data, tmp_path / "out.jsonl")
    assert len(rows) == 3
    assert [row["row"] for row in rows] == [f"{pairs}:{row['row_id'] + 1}" for row in rows]


def test_loaders_without_a_data_module_are_served_too(pairs, tmp_path):
    module, data = runs.module(), runs.data(pairs, predict=pairs, tokenizer=quickstart_tokenizer())
    data.setup("predict")
    run = runs.trainer(callbacks=[PairPredictionWriter(str(tmp_path / "out.jsonl"))])
    run.predict(module, dataloaders=data.predict_dataloader())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [NAMES[1:]] * 11
