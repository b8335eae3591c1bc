"""Some rows of a data set and all the others, as sources of a run."""

import pytest

from lit_dpo import select_rows
from tests import runs

pytestmark = runs.QUIET
KEPT = [7, 2, 11]


def read(source, **options):
    """Where the training rows are from."""
    data = runs.data(source, tokenizer=runs.module().tokenizer, validation_fraction=0, **options)
    data.setup("fit")
    return data.origin(range(len(data.training_rows())), training=True)


@pytest.mark.parametrize(
    "keep", [KEPT, lambda row: row["chosen"].endswith((" 2.", " 7.", " 11."))], ids=["numbers", "f"]
)
@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
def test_rows_and_their_complement_are_all_of_them_once(tmp_path, keep, memory):
    path = runs.pairs_file(tmp_path, 12)
    source = runs.rows(12) if memory else path
    everyone = [f"train, row {n}" if memory else f"{path}:{n}" for n in range(1, 13)]
    kept = read(select_rows(source, keep, name="train" if memory else None))
    others = read(select_rows(source, keep, complement=True, name="train" if memory else None))
    assert kept == [everyone[row] for row in sorted(KEPT)]
    assert others == [where for where in everyone if where not in kept]


def test_they_serve_as_any_source(tmp_path):
    """Trained on some, validated on the others, and beside a file."""
    path = runs.pairs_file(tmp_path, 12)
    more = runs.pairs_file(tmp_path, 3, "more.jsonl", start=30)
    data = runs.data([select_rows(path, KEPT), more], validation=select_rows(path, KEPT, complement=True), batch_size=3)
    run = runs.fit(runs.module(), data)
    assert (len(data.training_rows()), sum(len(batch) for batch in data.val_dataloader())) == (6, 9)
    assert data.sources["train"] == [f"{path}: 3 rows by number", more]
    assert data.sources["validation"] == [f"{path}: all but the 3 rows by number"]
    assert "val/loss" in run.callback_metrics


def test_a_resumed_run_notices_another_selection(tmp_path):
    path = runs.pairs_file(tmp_path, 12)

    def data(keep):
        return runs.data(select_rows(path, keep), validation_fraction=0, batch_size=2)

    run = runs.fit(runs.module(), data(range(6)), tmp_path, max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = runs.trainer(tmp_path, max_steps=2)
    again.fit(runs.module(), data(range(6)), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 2
    with pytest.raises(ValueError, match=r"training data differ from those of the checkpoint \(1 changed\)"):
        runs.trainer(tmp_path, max_steps=2).fit(runs.module(), data([0, 1, 2, 3, 4, 6]), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("keep", [[-1], [3, 3]])
def test_numbers_that_are_none_are_refused(keep):
    with pytest.raises(ValueError, match="takes row numbers from 0, each once"):
        select_rows(runs.rows(5), keep)


def test_a_row_that_is_not_there_is_an_error(tmp_path):
    path = runs.pairs_file(tmp_path, 5)
    with pytest.raises(ValueError, match=r"asked for row 5 of `.*pairs.jsonl`, which has 5 rows: .* from 0 to 4"):
        read(select_rows(path, [0, 5]))
