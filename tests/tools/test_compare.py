"""`lit-dpo compare`: how often it is wrong, what it finds, and what it says of bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.cli import main
from lit_dpo.tools.compare import compare, resampled
from tests import runs
from tests.test_cli import TINY

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


def predictions(rng, rows=200, gain=0.0, hardness=None, sources=("a",)):
    """Margins as models of one kind give them: a hardness of each row that all share, and noise of each model's."""
    hardness = rng.normal(0.4, 1, rows) if hardness is None else hardness
    margins = hardness + rng.normal(0, 0.7, rows) + gain
    return {
        f"{sources[n % len(sources)]}.jsonl:{n}": {
            "margin": float(margin), "logp_chosen": float(-50 + margin), "chosen_tokens": 5.0 + n % 3,
            "rejected_tokens": 6.0,
        }
        for n, margin in enumerate(margins)
    }  # fmt: skip


@pytest.mark.parametrize("seeds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_of_twenty_comparisons_of_the_same_at_most_two_find_a_difference(seeds):
    rng, alarms = np.random.default_rng(0), 0
    for number in range(20):
        hardness = rng.normal(0.4, 1, 200)
        settings = {name: [predictions(rng, hardness=hardness) for _ in range(seeds)] for name in ("A", "B")}
        alarms += any(each.found for each in compare(settings, seed=number))
    assert alarms <= 2


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_known_difference_is_found_with_its_size(seeds):
    rng = np.random.default_rng(1)
    hardness = rng.normal(0.4, 1, 400)
    a = [predictions(rng, 400, hardness=hardness) for _ in range(seeds)]
    b = [predictions(rng, 400, 0.6, hardness) for _ in range(seeds)]
    found = {each.what: each for each in compare({"A": a, "B": b})}
    by_hand = np.mean(
        [[float(y[r]["margin"] > 0) - float(x[r]["margin"] > 0) for r in x] for x, y in zip(a, b, strict=True)]
    )
    assert found["accuracy"].difference == pytest.approx(by_hand)
    assert found["accuracy"].low < by_hand < found["accuracy"].high
    assert found["accuracy"].verdict == "higher"
    assert {"chosen longer", "chosen shorter", "chosen as long"} <= set(found)


def test_an_interval_has_the_width_that_theory_gives():
    """The standard error of a mean of n values, and of several runs' means that differ from each other."""
    rng = np.random.default_rng(2)
    one = rng.normal(0, 1, (1, 300))
    assert resampled(one, rng).std() == pytest.approx(one.std(ddof=1) / 300**0.5, rel=0.06)
    several = rng.normal(0, 0.1, (8, 300)) + rng.normal(0, 1, (8, 1))
    low, high = np.quantile(resampled(several, rng), [0.025, 0.975])
    students = 2.365  # 97.5 % quantile of t with 7 degrees of freedom
    assert (high - low) / 2 == pytest.approx(students * several.mean(1).std(ddof=1) / 8**0.5, rel=0.06)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_settings_are_told_apart_in_one_case_of_twenty_where_seeds_differ_more_than_rows(seeds):
    """Runs of equal settings that differ as a whole, as trainings do; 13 of 100 is the 99.9 % bound for 5 %."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(100):
        low, high = np.quantile(
            resampled(rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, (seeds, 30)), rng), [0.025, 0.975]
        )
        alarms += not low < 0 < high
    assert alarms <= 13


def test_p_is_corrected_for_all_that_was_looked_at():
    """Holm by hand: of m differences the k-th smallest p counts m - k + 1 times, and never less than one before it."""
    rng = np.random.default_rng(3)
    settings = {name: [predictions(rng, sources=("a", "b"))] for name in "ABC"}
    found = compare(settings)
    ordered = sorted(found, key=lambda each: each.p)
    expected = [max(min(1, ordered[k].p * (len(found) - k)) for k in range(n + 1)) for n in range(len(found))]
    assert [each.corrected for each in ordered] == pytest.approx(expected)
    assert {"source a", "source b"} < {each.what for each in found}
    assert len({(each.first, each.second) for each in found}) == 3


def write(path, rows):
    return runs.write(path, [{"row": row, **values} for row, values in rows.items()])


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(4)
    hardness = rng.normal(0.4, 1, 300)
    for name, gain in (("a", 0), ("again", 0), ("better", 1.5)):
        write(tmp_path / f"{name}.jsonl", predictions(rng, 300, gain, hardness))
    return tmp_path


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, words)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    return said


def test_it_says_plainly_which_is_better_and_where_there_is_no_difference(files, capsys):
    (files / "beside.html").write_text("mine")
    main(["compare", "a.jsonl", "again.jsonl", "better.jsonl", "--output", "out.html"])
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "again.jsonl and a.jsonl: no difference in accuracy" in words
    assert "better.jsonl is better than a.jsonl: accuracy" in words
    assert "The intervals cover the rows alone" in words
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    page = (files / "out.html").read_text()
    assert "better.jsonl is better than a.jsonl" in page
    heads = re.findall(r"<h2>first: (.*?), second: (.*?)</h2>", page)  # not in each line, where a phone shows no more
    assert heads == [(f"{a}.jsonl", f"{b}.jsonl") for a, b in (("a", "again"), ("a", "better"), ("again", "better"))]
    assert re.search(r"<td>accuracy</td><td>higher</td><td class=\"number\">\+", page)
    assert "Differences in: log-prob chosen (higher)" in words or "(higher)" in words
    assert "exists already" in refused(capsys, "a.jsonl", "better.jsonl", "--output", "out.html")
    assert (files / "beside.html").read_text() == "mine"


def test_log_probs_of_other_tokens_are_not_compared(files, capsys):
    rows = [json.loads(line) for line in (files / "a.jsonl").read_text().splitlines()]
    runs.write(files / "other.jsonl", [{**row, "chosen_tokens": row["chosen_tokens"] + 1} for row in rows])
    main(["compare", "a.jsonl", "other.jsonl"])
    assert "log-prob chosen" not in (text := capsys.readouterr().out)
    assert "cut the rows into other tokens" in " ".join(text.split())
    main(["compare", "a.jsonl", "again.jsonl"])
    assert "log-prob chosen" in (text := capsys.readouterr().out)
    assert "other tokens" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give either runs to compare"),
        (["a.jsonl"], "two or more"),
        (["a.jsonl", "a.jsonl"], "two or more that are not the same"),
        (["a.jsonl", "--train", "dpo"], "one of the two"),
        (["a.jsonl", "nothing.jsonl"], "No run `nothing.jsonl`"),
        (["a.jsonl", "begun"], "has no checkpoint yet"),
        (["a.jsonl", "empty.jsonl"], "is empty"),
        (["a.jsonl", "elsewhere.jsonl"], "no validation row in common"),
        (["a.jsonl", "half.jsonl"], "half.jsonl:1` is no line of predictions"),
        (["--train", "dpo", "nothing"], "There is no configuration `nothing`"),
        (["--train", "dpo", "ipo", "--seeds", "0"], "must be at least 1"),
        (["a.jsonl", "better.jsonl", "--seeds", "3"], "are for `--train`"),
        (["a.jsonl", "better.jsonl", "--folder", "elsewhere"], "are for `--train`"),
        (["a.jsonl", "better.jsonl", "--output", "out.txt"], "must end in .html"),
    ],
)
def test_bad_input_is_one_sentence(files, capsys, words, said):
    (files / "empty.jsonl").touch()
    (files / "half.jsonl").write_text('{"row": "a:1", "marg')
    write(files / "elsewhere.jsonl", predictions(np.random.default_rng(0), sources=("elsewhere",)))
    (files / "begun").mkdir()
    (files / "begun" / "config.yaml").write_text("data: {}")
    assert said in refused(capsys, *words)


@pytest.mark.slow
def test_configurations_are_trained_with_several_seeds_and_a_stop_loses_nothing(files, capsys, monkeypatch):
    pairs, held_out = runs.pairs_file(files, 32), runs.pairs_file(files, 16, "held_out.jsonl", start=32)
    tiny = (
        Path(TINY).read_text(encoding="utf-8").replace("train: quickstart", f"train: {pairs}\n  validation: {held_out}")
    )
    for name, rate in (("a", 0.0), ("b", 0.1)):
        optimizer = f"  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: {rate}}}}}\n"
        (files / f"{name}.yaml").write_text(tiny.replace("model:\n", f"model:\n{optimizer}", 1))
    words = ["compare", "--train", "a.yaml", "b.yaml", "--seeds", "2", "--folder", "runs"]
    saves, save = [], LastCheckpoint._save

    def stopping(self, trainer):
        save(self, trainer)
        saves.append(trainer.default_root_dir)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LastCheckpoint, "_save", stopping)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 130
    main(words)
    assert "with 2 runs of each" in " ".join(capsys.readouterr().out.split())
    trained = sorted(str(path.relative_to(files)) for path in files.glob("runs/*/*/version_*"))
    assert trained == [f"runs/{name}/seed_{seed}/version_0" for name in "ab" for seed in (0, 1)]
    before = len(saves)
    main(words)
    assert len(saves) == before  # all is there
    shutil.rmtree(files / "runs" / "b")
    main(words)
    assert len(saves) > before
