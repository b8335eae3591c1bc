"""Rows that are in memory already go in as they are: a list of dictionaries, a `datasets.Dataset`."""

import json

import pytest
import torch

from lit_dpo import BySource, Pool
from lit_dpo.callbacks.predictions import PairPredictionWriter
from tests import runs

pytestmark = runs.QUIET


def dataset(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def trained(source, **options):
    module = runs.module()
    runs.fit(module, runs.data(source, batch_size=4, **options), max_steps=3)
    return runs.weights(module.policy)


def read(data, stage="fit"):
    data.tokenizer = runs.module().tokenizer
    data.setup(stage)
    return data


def test_a_run_is_that_of_the_same_rows_in_a_file(tmp_path):
    rows = runs.rows(16)
    expected = trained(runs.write(tmp_path / "pairs.jsonl", rows))
    assert runs.same(trained(rows), expected)
    assert runs.same(trained(dataset(rows)), expected)
    assert runs.same(trained([rows[:5], dataset(rows[5:])]), expected)
    assert not runs.same(trained(rows[1:]), expected)


def test_every_stage_takes_them(tmp_path):
    module, rows = runs.module(), runs.rows(20)
    data = runs.data(rows[:8], validation=dataset(rows[8:12]), test=rows[12:15], predict=rows[15:])
    writer = PairPredictionWriter(str(tmp_path / "found.jsonl"))
    run = runs.trainer(tmp_path, max_steps=1, limit_val_batches=None, callbacks=[writer])
    run.fit(module, data)
    (tested,) = run.test(module, data, verbose=False)
    run.predict(module, data)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == [f"predict, row {n}" for n in range(1, 6)]
    assert "test/loss" in tested


def test_a_checkpoint_tells_of_them_in_words_and_resumes_with_the_same(tmp_path):
    rows = runs.rows(12)
    run = runs.fit(runs.module(), runs.data(rows), tmp_path, max_steps=1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["lit_dpo"]["data"]
    assert kept["train"] == ["train: 12 rows in memory (list)"]
    assert kept["validation"] is None
    again = runs.trainer(tmp_path, max_steps=2)
    again.fit(runs.module(), runs.data(dataset(rows)), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 2
    with pytest.raises(ValueError, match="1 removed"):
        runs.trainer(tmp_path, max_steps=3).fit(runs.module(), runs.data(rows[1:]), ckpt_path=tmp_path / "last.ckpt")


def test_sources_in_memory_have_names_for_partitions(tmp_path):
    rows = runs.rows(12)
    path = runs.write(tmp_path / "mine.jsonl", rows[8:])
    sources = [rows[:4], dataset(rows[4:8]), path]
    data = read(runs.data(sources, partition=BySource(["mine", "train 2", "train 1"]), validation_fraction=0))
    steps = [data.partition.next(step, Pool(data.training.pool_sources)).tolist() for step in range(3)]
    assert steps == [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_a_bad_row_is_named_by_its_number():
    rows = runs.rows(4)
    rows[2]["chosen"] = rows[2]["rejected"]
    with pytest.raises(ValueError, match="train, row 3, column `rejected`: chosen and rejected are identical"):
        read(runs.data(rows))
    with pytest.raises(ValueError, match="train, row 5: the row has no columns; give a dictionary, not a str"):
        read(runs.data([*runs.rows(4), "text"]))


BAD = [3, {"train": []}, iter([]), (row for row in runs.rows(3)), [3]]


@pytest.mark.parametrize("source", BAD, ids=lambda source: type(source).__name__)
def test_what_is_no_data_set_is_refused_at_once(source):
    with pytest.raises(ValueError, match=r"`train` must be a data set, got a .*: give a list of dictionaries"):
        runs.data(source)


@pytest.mark.parametrize("source", [[], dataset([])], ids=["list", "Dataset"])
def test_no_rows_are_none_to_train_on(source):
    with pytest.raises(ValueError, match="No row to train on"):
        read(runs.data(source))


def test_rows_are_left_as_they_are():
    rows = runs.rows(6)
    before = json.dumps(rows)
    read(runs.data(rows, columns={"prompt": "prompt"}))
    assert json.dumps(rows) == before
