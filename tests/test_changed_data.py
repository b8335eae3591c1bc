"""A run that resumes notices that its data are not those it began with, and says which rows differ."""

import json
import random
import re
import shutil

import pytest
import torch

from lit_dpo.cli import main
from lit_dpo.data.changes import compare
from lit_dpo.stepwise import fit_stepwise
from tests import interrupted, runs
from tests.test_cli import command

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli", "ignore:The dirpath has changed"),
]


def with_rows(count=12, change=lambda rows: rows, start=0):
    rows = runs.rows(count, start=start)
    return change(rows) or rows


def swap_all(rows):
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def swap_one(rows):
    rows[4]["chosen"], rows[4]["rejected"] = rows[4]["rejected"], rows[4]["chosen"]


def replace(rows):
    rows[7] = runs.rows(1, start=50)[0]


CHANGES = {  # what is done to the 12 training rows: (how, what is said, a cell of the table)
    "added": (lambda rows: rows + runs.rows(2, start=50), "2 added", r"train\.jsonl:13 [│ \n]+.*train\.jsonl:14"),
    "added in front": (lambda rows: runs.rows(1, start=50) + rows, "1 added", r"train\.jsonl:1\b"),
    "removed": (lambda rows: rows[:3] + rows[5:], "2 removed", r"row 4 then [│ \n]+row 5 then"),
    "reordered": (lambda rows: rows[1:] + rows[:1], "1 moved", r"train\.jsonl:12"),
    "replaced": (replace, "1 changed", r"train\.jsonl:8"),
    "labels swapped": (swap_all, "12 swapped", r"train\.jsonl:1 [^…]*train\.jsonl:5 [│ \n]+\.\.\."),
    "one label swapped": (swap_one, "1 swapped", r"train\.jsonl:5"),
    "row doubled": (lambda rows: rows + rows[:1], "1 added", r"train\.jsonl:13"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after two steps of three, and its command."""
    folder = tmp_path_factory.mktemp("stopped")
    runs.write(folder / "train.jsonl", with_rows())
    runs.write(folder / "validation.jsonl", with_rows(4, start=30))
    files = ("--data.train", folder / "train.jsonl", "--data.validation", folder / "validation.jsonl")
    more = ("--data.batch_size", 4, "--trainer.accumulate_grad_batches", 1, "--trainer.val_check_interval", 1)
    arguments = command("fit", folder / "runs", "dpo", *files, *more)
    main(arguments)
    return folder, [*arguments, "--trainer.max_steps", "3", "--ckpt_path", "last", "--allow-changes"]


@pytest.fixture
def resume(stopped, tmp_path, monkeypatch, capsys, caplog):
    """Resume a copy of the run with other training or validation rows; what it says."""
    folder, arguments = stopped
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setenv("COLUMNS", "300")
    arguments = [argument.replace(str(folder), str(tmp_path / "copy")) for argument in arguments]

    def resume(name="train", rows=None, allowed=False):
        if rows is not None:
            runs.write(tmp_path / "copy" / f"{name}.jsonl", rows)
        # The paths and the number of steps differ on purpose: only what the data say is looked at.
        monkeypatch.setattr("lit_dpo.cli.app.refuse_changes", lambda *a: None)
        with caplog.at_level("INFO"):
            try:
                main(arguments if allowed else arguments[:-1])
                status = 0
            except SystemExit as stop:
                status = stop.code
        said = capsys.readouterr()
        return status, said.out + said.err + caplog.text, tmp_path / "copy" / "runs" / "version_0"

    return resume


def steps(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


FEWER = ("added in front", "one label swapped", "row doubled")


@pytest.mark.parametrize("change", [pytest.param(c, marks=[pytest.mark.slow] if c in FEWER else []) for c in CHANGES])
def test_changed_training_rows_are_shown_and_refused(resume, change):
    how, said, cell = CHANGES[change]
    status, text, run = resume(rows=with_rows(change=how))
    assert status == 2
    assert f"The training data differ from those of the checkpoint ({said}): restore them" in text
    assert re.search(rf"{said.split()[1]} +│ +{said.split()[0]} +│ .*{cell}", text)
    assert "--allow-changes" in text
    assert "Traceback" not in text
    assert steps(run) == 2


def test_changed_rows_that_were_allowed_are_shown_and_trained_on(resume):
    status, text, run = resume(rows=with_rows(change=CHANGES["removed"][0]), allowed=True)
    assert status == 0
    assert "Going on with training data that differ from those of the checkpoint: 2 removed" in text
    assert steps(run) == 3


def test_changed_validation_rows_are_said_and_trained_past(resume):
    status, text, run = resume("validation", with_rows(5, start=30))
    assert status == 0
    assert "validation: rows changed since the checkpoint" in text
    assert re.search(r"added +│ +1 +│ .*validation\.jsonl:5", text)
    assert steps(run) == 3


def test_unchanged_rows_say_nothing(resume):
    status, text, run = resume()
    assert status == 0
    assert "changed since" not in text
    assert "differ" not in text
    assert steps(run) == 3


def test_a_forged_record_of_the_rows_is_one_sentence(resume, tmp_path):
    path = tmp_path / "copy" / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    for record in ({"order": "x", "train": "no base 64"}, {"order": 3}, {"order": "x", "train": "é"}, 3):
        state["PreferenceDataModule"] = record
        torch.save(state, path)
        path.with_name("last.ckpt.json").unlink(missing_ok=True)
        status, text, _ = resume()
        assert status == 2
        assert "does not read" in text or "is no checkpoint of a `PreferenceModule`" in text
        assert "Traceback" not in text


def test_a_checkpoint_without_a_record_says_that_changes_cannot_be_noticed(resume, tmp_path):
    path = tmp_path / "copy" / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    del state["PreferenceDataModule"]
    torch.save(state, path)
    path.with_name("last.ckpt.json").unlink()
    status, text, _ = resume()
    assert status == 0
    assert "keeps nothing of its rows" in text


# -- in Python --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [{"seed": 1}, {"validation_fraction": 0.3}])
def test_the_same_rows_drawn_in_another_way_are_refused(tmp_path, what):
    path = runs.pairs_file(tmp_path, 20)
    run = runs.fit(runs.module(), runs.data(path, batch_size=4), tmp_path, max_steps=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = runs.data(path, batch_size=4, **what)
    with pytest.raises(ValueError, match="other rows are held out, or the seed or the partition differ"):
        runs.trainer(tmp_path, max_steps=3).fit(runs.module(), again, ckpt_path=tmp_path / "a.ckpt")
    again.allow_changes = True
    runs.trainer(tmp_path, max_steps=3).fit(runs.module(), again, ckpt_path=tmp_path / "a.ckpt")
    runs.trainer(tmp_path).validate(runs.module(), runs.data(path, **what), tmp_path / "a.ckpt", verbose=False)


def test_done_partitions_of_changed_content_are_refused(tmp_path):
    """The same row numbers, between two partitions: one has its mark, the next has not begun."""
    path = runs.pairs_file(tmp_path, 25)
    options = {"file": path, "stepwise": True, "epochs": 1, "val_every": 2}
    folder = tmp_path / "run"
    folder.mkdir()
    interrupted.train(folder, options)
    done = json.loads((folder / "steps" / "partition_0" / "DONE").read_text())["rows"]
    shutil.rmtree(folder / "steps" / "partition_1")
    rows = runs.rows(25)
    rows[done[0]] = runs.rows(1, start=60)[0]
    runs.write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"differ from those of `.*partition_0` \(1 changed\)"):
        interrupted.train(folder, options, resume=True)
    assert not (folder / "steps" / "partition_1").exists()
    module, data, _ = interrupted.parts(folder, options)
    data.allow_changes = True
    fit_stepwise(
        module,
        data,
        lambda root: interrupted.trainer(root, interrupted.parts(folder, options)[2], options),
        folder / "steps",
        resume=True,
    )
    assert (folder / "steps" / "partition_1" / "DONE").exists()


# -- the comparison ---------------------------------------------------------------------------------------------------


def test_a_comparison_finds_what_was_done():
    """Rows taken out, put in, written over and turned round at random places, the others left in their order."""
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randrange(2, 40)
        old = [b"%d" % row for row in draw.sample(range(60), count)]
        new, swapped = list(old), {}
        for row in draw.sample(range(count), draw.randrange(count + 1) // 3):
            new[row] = b"new %d" % row if draw.random() < 0.5 else b"swapped " + old[row]
        swapped = {row: key.removeprefix(b"swapped ") for row, key in enumerate(new) if key not in {*old}}
        found = compare(old, new, swapped)
        assert found.swapped == [row for row, key in enumerate(new) if key.startswith(b"swapped")]
        assert found.changed == [row for row, key in enumerate(new) if key.startswith(b"new")]
        assert found.added == found.removed == found.moved == []


def test_a_comparison_accounts_for_every_row():
    draw = random.Random(1)
    for _ in range(300):
        old = [b"%d" % draw.randrange(12) for _ in range(draw.randrange(15))]
        new = [b"%d" % draw.randrange(12) for _ in range(draw.randrange(15))]
        found = compare(old, new)
        common = sum(min(old.count(key), new.count(key)) for key in {*old})
        assert len(new) - len(found.added) - len(found.changed) == common
        assert len(old) - len(found.removed) - len(found.changed) == common
        assert (str(found) == "none") == (old == new)
        still = [key for row, key in enumerate(new) if row not in {*found.moved, *found.added, *found.changed}]
        rest = iter(old)
        assert all(key in rest for key in still)  # in the old order


def test_one_row_moved_is_one_row():
    keys = [b"%d" % n for n in range(1000)]
    assert compare(keys, keys[1:] + keys[:1]).moved == [999]
    assert len(compare(keys, keys[::-1]).moved) == 999
