"""What a round keeps: whatever stops it, nothing is lost, and nothing else is taken for it."""

import json
import math
import re
import resource
import shutil
import sys
import tracemalloc
from contextlib import contextmanager, nullcontext
from statistics import variance

import pytest
import torch

from lit_dpo import BestVsWorst, CachedReference, LoRA, OnPolicy, Pool, Verifier
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.sampling import Completion, Sampler
from tests import runs
from tests.terminal import Terminal
from tests.test_rounds import DESCRIPTION, PROMPTS, Noting, lines, signs, train

pytestmark = runs.QUIET


class Saying(Pool):
    """A pool whose policy says the length of a prompt in three ways, and remembers what it was asked."""

    def __init__(self, folder, **options):
        self.asked = []

        def complete(prompts, sampler):
            for prompt in prompts:
                self.asked.append(prompt)
                yield [Completion((1, 2), f"{prompt}{n}", True) for n in range(sampler.samples)]

        super().__init__(["a"], folder, complete=complete, **options)


class Counting(Noting):
    """Judges as the last sign says, and notes each prompt."""

    def score(self, prompts, completions):
        said = super().score(prompts, completions)
        return [float(text[-1]) for text in completions][: len(said)]


def round_of(folder, judge, count=40, **options):
    """A round of many prompts; call its `next` with a pool, and there is no model in it."""
    folder.mkdir(exist_ok=True)
    file = runs.write(folder / "asked.jsonl", [{"prompt": f"number {n}="} for n in range(count)])
    return OnPolicy(file, judge, BestVsWorst(), **{"samples": 8, **options})


# -- a full disk ------------------------------------------------------------------------------------------------------


def limit(size):
    """No file may grow beyond so many bytes, which a process is told as it is told of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Filling(Counting):
    """Fills the disk when it is closed."""

    def close(self):
        limit(100)


@contextmanager
def full(size=None):
    """The disk has room again at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if size is not None:
            limit(size)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_and_the_round_goes_on(tmp_path):
    """Full while sampling, then while judging, then when the record is written."""
    whole = [*round_of(tmp_path / "whole", Counting(tmp_path / "notes")).next(0, Saying(tmp_path / "whole" / "step"))]
    folder, notes = tmp_path / "run", tmp_path / "noted"
    pool, step = Saying(folder / "step"), folder / "step"
    message = r"step` cannot be written to \(File too large\): make room and go on; what was sampled and judged is kept"

    def fails(judge, size=None):
        rounds = round_of(folder, judge)
        with pytest.raises(OSError, match=message) as error, full(size):
            rounds.next(0, pool)
        assert "\n" not in str(error.value)

    fails(Counting(notes), 10_000)
    assert 5 < (step / "completions.0.jsonl").read_text().count("\n") < 35
    assert not notes.exists()
    fails(Counting(notes), 1500)  # the other completions are cut short too, and there is no room for one more
    with pytest.raises(ValueError, match="The judge gave 7 scores for 8"):
        round_of(folder, Counting(notes, fails_at="number 0=")).next(0, pool)
    assert len(lines(step / "completions.0.jsonl")) == 40
    fails(Counting(notes), 1500)
    assert 5 < len(notes.read_text().split("\n")) < 35
    fails(Filling(notes))
    assert not (step / "round.json").exists()
    assert [*round_of(folder, Counting(notes)).next(0, pool)] == whole
    assert len(pool.asked) == 40 + 2  # a prompt whose line was torn is sampled again, and no other
    assert sorted({*notes.read_text().splitlines()}) == sorted(f"number {n}=" for n in range(40))
    assert json.loads((step / "round.json").read_text())["pairs"] == 40


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_prompts(tmp_path):
    """Completions, scores and pairs of a round eight times as large take no more, but for a few bytes a prompt."""
    peaks = []
    for count in (250, 2000):
        partition = round_of(tmp_path / str(count), Verifier(lambda prompt, text: float(text[-1])), count)
        pool = Saying(tmp_path / str(count) / "step")
        pool.asked = Nothing()
        tracemalloc.start()
        rows = partition.next(0, pool)
        assert sum(row["chosen"].endswith("7") for row in rows) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1750 < 200  # bytes a prompt; its completions alone are 500 as text


class Nothing:
    """A list that stays empty."""

    def append(self, value):
        pass


# -- another run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A round of a run that was left alone, with what is measured beside the pairs."""
    folder = tmp_path_factory.mktemp("kept")
    fixed = runs.write(folder / "fixed.jsonl", [{"prompt": prompt} for prompt in ("31=", "4=", "15=")])
    pairs = [{"prompt": f"{n}=", "chosen": "1", "rejected": text} for n, text in enumerate(("7", "71", "2"))]
    options = {"rounds": 1, "greedy_prompts": fixed, "trusted": runs.write(folder / "trusted.jsonl", pairs)}
    train(folder / "run", Noting(folder / "notes"), **options)
    return folder


class Other(Noting):
    def identity(self):
        return {"judge": "Other"}


def copied(one, folder):
    shutil.copytree(one / "run", folder / "run")
    return folder / "run", folder / "notes"


@pytest.mark.parametrize(
    ("judge", "changed", "name"),
    [
        (Noting, {"samples": 5}, "samples"),
        (Noting, {"prompts_per_round": 4}, "prompts"),
        (Noting, {"picker": BestVsWorst()}, "picker, threshold, most, gap"),
        (Other, {}, "judge"),
    ],
    ids=["samples", "prompts", "picker", "judge"],
)
def test_a_round_whose_pairs_are_written_is_compared_too(one, tmp_path, capsys, judge, changed, name):
    folder, notes = copied(one, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = rf"was begun with another {name}: undo that, start in a new folder, or train on its pairs as they are"
    with pytest.raises(ValueError, match=message):
        train(folder, judge(notes), resume=True, **{"rounds": 1, **changed})
    assert "Changed since the round was begun" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not notes.exists()


def test_a_run_of_fewer_rounds_does_not_go_on_with_more(one, tmp_path):
    folder, notes = copied(one, tmp_path)
    (folder / "partition_0").rename(folder / "partition_1")
    with pytest.raises(ValueError, match=r"`rounds` is 1, and .*partition_1` holds a further round"):
        OnPolicy("x", Noting(notes)).resumed(1, Saying(folder / "partition_1"))


def test_a_judge_that_was_corrected_goes_on_where_that_is_allowed(tmp_path, capsys):
    """Another judge is refused, and judges the rest with `--allow-changes`; other changes are refused still."""
    notes, folder = tmp_path / "notes", tmp_path / "run"
    with pytest.raises(ValueError, match="The judge gave"):
        round_of(folder, Counting(notes, fails_at="number 3="), 6).next(0, Saying(folder / "step"))

    class Corrected(Counting):
        def identity(self):
            return {"judge": "Corrected"}

    again = Corrected(notes)
    with pytest.raises(ValueError, match=r"another judge: undo that, .* or keep what was judged with --allow-changes"):
        round_of(folder, again, 6).next(0, Saying(folder / "step"))
    allowed = Saying(folder / "step", allow_changes=True)
    with pytest.raises(ValueError, match=r"another prompts, judge: undo that, or start in a new folder\."):
        round_of(folder, again, 5).next(0, allowed)
    assert len(round_of(folder, again, 6).next(0, allowed)) == 6
    assert notes.read_text().splitlines() == [f"number {n}=" for n in range(6)]
    assert "Counting" not in capsys.readouterr().err


# -- what is measured beside the pairs --------------------------------------------------------------------------------


def test_greedy_answers_and_trusted_pairs_are_measured(one, tmp_path, capsys):
    """The oracle: greedy decoding of one prompt at a time by transformers, and the judge's rule, counted by hand."""
    record = json.loads((one / "run" / "partition_0" / "round.json").read_text())
    assert record["trusted"]["pairs"] == 3
    assert record["trusted"]["share"] == pytest.approx(2.5 / 3)  # of the third pair both completions hold no 7
    assert record["trusted"]["error"] == pytest.approx(1.959964 * math.sqrt(variance([1, 1, 0.5, 0, 0, 1, 1]) / 7))
    models = {
        "greedy": load_model(DESCRIPTION, signs()),
        "greedy_after": load_model(str(one / "run/partition_0/export")),
    }
    for name, model in models.items():
        right = []
        for prompt in ("31=", "4=", "15="):
            ids = signs()(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
            right.append("7" not in signs().decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        assert record[name]["score"] == pytest.approx(sum(right) / 3)
        assert record[name]["prompts"] == 3
    assert "measuring" in record["seconds"]
    assert {path.name for path in one.glob("run/*")} >= {"partition_0"}
    assert not (one / "run" / "partition_1").exists()
    folder, notes = copied(one, tmp_path)
    train(folder, Noting(notes), resume=True, rounds=1, greedy_prompts=str(one / "fixed.jsonl"))
    assert not notes.exists()  # what is measured is not measured again
    main(["rounds", str(folder)])
    shown = capsys.readouterr().out
    assert f"{record['greedy_after']['score']:.3f}" in re.search(r"after the round.*", shown)[0]
    assert re.search(r"seconds of training +\d", shown)


def test_a_judge_that_got_worse_is_said(tmp_path):
    """In the second round it holds the opposite."""
    trusted = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in range(20)]
    file = runs.write(tmp_path / "trusted.jsonl", trusted)
    for step, sign in ((0, -1), (1, 1)):
        judge = Verifier(lambda prompt, text, sign=sign: sign * float(text[-1]))
        partition = round_of(tmp_path / "run", judge, 4, rounds=2, trusted=file)
        worse = pytest.warns(UserWarning, match="Round 1: the judge agrees with 0% .* 100% .*: it got worse")
        with worse if step else nullcontext():
            partition.next(step, Saying(tmp_path / "run" / f"partition_{step}"))


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpointing", "cached reference", "lora"])
def test_rounds_train_as_usual_whatever_the_model_is(name, tmp_path):
    """Recomputed activations and a cached reference change nothing; adapters are sampled from as they are merged."""
    how = {
        "checkpointing": {"gradient_checkpointing": True},
        "cached reference": {"reference": CachedReference(str(tmp_path / "cache"))},
        "lora": {"adapter": LoRA(rank=4, dropout=0.1)},
    }
    roots = train(tmp_path / "run", Noting(tmp_path / "notes"), model=how[name])
    if name != "lora":
        for root, other in zip(roots, train(tmp_path / "plain", Noting(tmp_path / "notes")), strict=True):
            assert (root / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()
            found, expected = (load_model(str(folder / "export")).state_dict() for folder in (root, other))
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
        return
    after = load_model(str(roots[0] / "export"))
    assert not runs.same(runs.weights(after), runs.weights(load_model(DESCRIPTION, signs())))
    for number, found in lines(roots[1] / "completions.0.jsonl"):
        prompt = signs()(PROMPTS[(5 + number) % 7]).input_ids
        [expected] = Sampler(6, max_new_tokens=20, seed=0, round=1, rows=1)(after, signs(), [prompt])
        assert [tuple(one["ids"]) for one in found] == [one.ids for one in expected]


@pytest.mark.slow
def test_a_sharded_model_makes_the_rounds_of_a_whole_one(tmp_path):
    """Two processes with FSDP2, whose round is that of one process; the next one is what its export says."""
    runs.launch(["tests.test_rounds", str(tmp_path / "run"), str(tmp_path / "notes"), "fsdp2"])
    one = train(tmp_path / "one", Noting(tmp_path / "noted"), rounds=1)[0]
    root = tmp_path / "run" / "partition_0"
    assert (root / "pairs.jsonl").read_bytes() == (one / "pairs.jsonl").read_bytes()
    assert lines(tmp_path / "run" / "partition_1" / "pairs.jsonl")


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_a_line_on_a_terminal_says_how_far_a_round_is(shown, tmp_path, monkeypatch):
    """With completions a second; it is gone in the end. Nothing of it where the Trainer shows no progress."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())
    partition = round_of(tmp_path, Verifier(lambda prompt, text: float(text[-1])), 30)
    assert len(partition.next(0, Saying(tmp_path / "step", progress=lambda: shown))) == 30
    text = sys.stdout.getvalue()
    for part in ("Sampling", "Judging", "completions/s", "/30"):
        assert (part in text) == shown
    assert text.endswith("\x1b[2K") or not shown
