"""Rows by a function of one's own, sources with weights, and hub data sets, from the command line inwards."""

import logging

import pytest
import torch

from lit_dpo.cli import main
from lit_dpo.data.read import read_rows, source_name
from tests import runs
from tests.test_cli import command
from tests.test_security import refused

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

READER = """
import pathlib
pathlib.Path({marker!r}).touch()

def read(row):
    if row["n"] % 4 == 0:
        return None
    return {{"question": row["asked"], "chosen": row["yes"], "rejected": row["no"]}}
"""


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A module that reads rows and leaves a mark where it is imported, and a file that needs it."""
    marker = tmp_path / "imported"
    (tmp_path / "own_reader.py").write_text(READER.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {"n": n, "asked": row["prompt"], "yes": row["chosen"], "no": row["rejected"]}
        for n, row in enumerate(runs.rows(12))
    ]
    return runs.write(tmp_path / "own.jsonl", rows), marker


def test_a_function_of_ones_own_reads_the_rows_where_its_package_is_allowed(reader, tmp_path, caplog, capsys):
    path, marker = reader
    options = ("--data.train", path, "--data.rows", "own_reader.read", "--data.validation_fraction", 0)
    text = refused(capsys, command("fit", tmp_path / "no", "dpo", *options))
    assert "own_reader" in text
    assert not marker.exists()
    with caplog.at_level(logging.INFO):
        main(command("fit", tmp_path / "run", "dpo", *options, "--allow-import", "own_reader"))
    assert marker.exists()
    assert "12 rows read, 9 kept, 3 skipped" in caplog.text
    assert "own: layout `question, chosen, rejected`" in caplog.text


def read(**options):
    data = runs.data(validation_fraction=0, **options)
    data.tokenizer = runs.module().tokenizer
    data.setup("fit")
    return data, [data._sets["train"].sources[row] for row in data.training_rows().tolist()]


def test_weights_say_how_often_a_source_is_seen(tmp_path):
    files = [runs.pairs_file(tmp_path, 12, f"{name}.jsonl", start=start) for start, name in enumerate("ab")]
    data, sources = read(train=files, weights={"a": 2.5, "b": 0.5}, max_per_source=8)
    assert (sources.count("a"), sources.count("b")) == (20, 4)
    rows = data.training_rows()
    seen = rows.bincount(minlength=24)
    assert sorted(seen[:12].tolist()) == [0] * 4 + [2] * 4 + [3] * 4
    assert torch.equal(rows, read(train=files, weights={"a": 2.5, "b": 0.5}, max_per_source=8)[0].training_rows())
    assert read(train=files)[1] == ["a"] * 12 + ["b"] * 12
    module = runs.module()
    assert runs.fit(module, data).global_step == 3
    with pytest.raises(ValueError, match=r"`weights` names `c`, which is no source .*: name some of a, b"):
        read(train=files, weights={"c": 1})


def test_contradictions_between_training_and_validation_are_counted(tmp_path, caplog):
    rows = runs.rows(6)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:2]]
    files = runs.write(tmp_path / "a.jsonl", rows), runs.write(tmp_path / "b.jsonl", [*swapped, rows[3]])
    with caplog.at_level(logging.INFO):
        read(train=files[0], validation=files[1])
    assert "1 of 3 pairs are also trained on; 2 of 3 pairs contradict a training pair" in caplog.text


def test_a_warning_names_the_rows_left_out(tmp_path):
    path = runs.write(tmp_path / "a.jsonl", [*runs.rows(3), {"prompt": "a", "chosen": "", "rejected": "b"}])
    with pytest.warns(UserWarning, match=r"1 malformed rows are left out:\n.*a.jsonl:4, column `chosen`"):
        read(train=path, on_bad_row="warn")


def test_a_hub_data_set_with_configuration_revision_and_files(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = "org/set[en, revision=v1, data_files=part/*.json]:test"
    assert next(iter(read_rows(spec)))[1] == {"a": 1}
    options = {"split": "test", "name": "en", "revision": "v1", "data_files": "part/*.json"}
    assert asked == [(("org/set",), options)]
    assert source_name(spec) == "org/set"
    with pytest.raises(ValueError, match=r"brackets hold a configuration, .* not `token=x`"):
        list(read_rows("org/set[token=x]"))
