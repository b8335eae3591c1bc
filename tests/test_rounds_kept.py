"""What a round keeps: whatever stops it, nothing is lost, and nothing else is taken for it."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import tracemalloc
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import variance

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo import (
    Active,
    BestVsWorst,
    CachedReference,
    Discriminated,
    Discriminator,
    Filtered,
    LoRA,
    OnPolicy,
    Partition,
    Pool,
    SelfPlay,
    Verifier,
)
from lit_dpo.cli import main
from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.texts import pool_pairs
from lit_dpo.models import load_model
from lit_dpo.sampling import Completion, Sampler
from lit_dpo.stepwise import fit_stepwise
from tests import runs
from tests.terminal import Terminal
from tests.test_rounds import DESCRIPTION, PROMPTS, Noting, here, lines, online, signs, train  # noqa: F401

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


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


class Learned(Discriminator):
    """Learns nothing and likes completions by their last sign."""

    def fit(self, pairs, start):
        return 0.8, len(pairs)

    def save(self, folder, measured):
        pass

    def score(self, prompts, completions):
        return last_sign(prompts, completions)


def last_sign(prompts, completions):
    return [float(text[-1]) for text in completions]


def partition_of(name, folder, count):
    """A round of so many prompts, and what its pool needs."""
    judge = Verifier(lambda prompt, text: float(text[-1]))
    if name == "on policy":
        return round_of(folder, judge, count), {}
    folder.mkdir()
    rows = ({"prompt": f"{n}=", "chosen": "12345678" * 12 + "9", "rejected": "1"} for n in range(count))
    file = runs.write(folder / "rows.jsonl", rows)
    if name == "discriminated":
        return Discriminated(file, judge, Learned(), prompts_per_round=count), {"model": lambda step: (None, None)}
    if name == "self-play":
        encoder = PairEncoder(signs(), 128)
        return SelfPlay(file, segment_tokens=4, buffer=count), {"encoder": lambda: encoder}
    return Filtered(judge), {"pairs": partial(pool_pairs, data_of(file))}


def data_of(file):
    data = runs.data(file, validation=None, max_length=128, tokenizer=signs(), validation_fraction=0.0)
    data.setup("fit")
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on policy", "filtered", "discriminated", "self-play"])
def test_memory_does_not_grow_with_the_prompts(name, tmp_path):
    """Completions, scores and pairs of a round eight times as large take no more, but for a few bytes a prompt.

    What stands beside them at the peak differs by 100 kB from one process to another, which is 60 bytes a prompt.
    """
    peaks = []
    for count in (250, 2000):
        partition, more = partition_of(name, tmp_path / str(count), count)
        pool = Saying(tmp_path / str(count) / "step", **more)
        pool.asked = Nothing()
        tracemalloc.start()
        rows = partition.next(0, pool)
        assert sum(1 for row in rows if row["chosen"] != row["rejected"]) > 0.9 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1750 < 300  # bytes a prompt; its completions or its row are 500 and more as text


@pytest.mark.slow
def test_memory_of_active_rounds_grows_by_a_few_numbers_a_prompt(tmp_path):
    """The second round, which ranks by both rules and trains on the answers of the first as well."""
    peaks = []
    for count in (250, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        file = runs.write(folder / "rows.jsonl", [{"prompt": f"{'long ' * 400}{n}="} for n in range(count)])
        judge = Verifier(lambda prompt, text: float(text[-1]))
        partition = Active(file, judge, budget=count, rounds=2, samples=4)
        for step in range(2):
            pool = Saying(folder / f"partition_{step}", logps=surprised)
            pool.asked = Nothing()
            tracemalloc.start()
            rows = partition.next(step, pool)
            assert sum(1 for row in rows if row["chosen"] != row["rejected"]) == count * (step + 1) // 2
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        peaks.append(peak)
    assert (peaks[1] - peaks[0]) / 1750 < 300  # bytes a prompt; the prompt alone is 2,000


def surprised(prompts, completions, step):
    for number, said in enumerate(completions):
        yield [-1.0 / (1 + place + step * number) for place in range(len(said))]


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


def test_a_copy_that_somebody_made_is_no_journal(tmp_path):
    """Decoys of other values beside the files of a round that is stopped; they are neither read nor changed."""
    folder, notes = tmp_path / "run", tmp_path / "notes"
    whole = [*round_of(tmp_path / "whole", Counting(notes), 6).next(0, Saying(tmp_path / "whole" / "step"))]
    with pytest.raises(ValueError, match="The judge gave"):
        round_of(folder, Counting(notes, fails_at="number 3="), 6).next(0, Saying(folder / "step"))
    decoys = [folder / "step" / name for name in ("scores.old.jsonl", "scores.0.old.jsonl", "scores.old.0.jsonl")]
    for decoy in decoys:
        decoy.write_text("".join(f"[{number}, {[0.0] * 8}]\n" for number in range(6)))
    before = [decoy.read_bytes() for decoy in decoys]
    assert [*round_of(folder, Counting(notes), 6).next(0, Saying(folder / "step"))] == whole
    assert [decoy.read_bytes() for decoy in decoys] == before


class Twice(Counting):
    """Starts the round once more while it is under way, as a scheduler may that takes the first run for dead."""

    def score(self, prompts, completions):
        again = round_of(self.notes.parent, Counting(self.notes), 6)
        with pytest.raises(ValueError, match=r"Another process writes to `.*scores.0.jsonl`.* end it first"):
            again.next(0, Saying(self.notes.parent / "step"))
        return super().score(prompts, completions)


def test_two_runs_do_not_write_the_same_round(tmp_path):
    whole = [
        *round_of(tmp_path / "whole", Counting(tmp_path / "notes"), 6).next(0, Saying(tmp_path / "whole" / "step"))
    ]
    folder = tmp_path / "run"
    assert [*round_of(folder, Twice(folder / "notes"), 6).next(0, Saying(folder / "step"))] == whole
    assert (folder / "notes").read_text().splitlines() == [f"number {n}=" for n in range(6)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_a_judge_has_left_behind_does_not_hold_the_round(tmp_path):
    """It was forked while the file of scores was open, and outlives the round that has failed."""
    children = []

    def forking(prompt, text):
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        children.append(child)
        raise RuntimeError("failed")

    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="raised RuntimeError: failed"):
        round_of(folder, Verifier(forking), 6).next(0, Saying(folder / "step"))
    allowed = Saying(folder / "step", allow_changes=True)
    assert len(round_of(folder, Verifier(lambda prompt, text: float(text[-1])), 6).next(0, allowed)) == 6
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_no_completion_is_taken_for_that_of_another_prompt(tmp_path):
    """The file is changed while it is judged, so that most lines stand where another one has stood."""
    path = tmp_path / "run" / "step" / "completions.0.jsonl"

    def changing(prompt, text):
        if prompt == "number 0=" and text[-1] == "0":
            path.write_text("".join(line + "\n" for line in reversed(path.read_text().splitlines())))
        return float(text[-1])

    with pytest.raises(ValueError, match=r"completions.0.jsonl` was changed while it was read: go on with the run"):
        round_of(tmp_path / "run", Verifier(changing)).next(0, Saying(tmp_path / "run" / "step"))


def test_another_policy_does_not_go_on_with_a_round(tmp_path):
    """A round of which nothing is trained yet: what was sampled is not of this model."""
    with pytest.raises(ValueError, match="The judge gave"):
        train(tmp_path / "run", Noting(tmp_path / "notes", PROMPTS[3]))
    before = (tmp_path / "run" / "partition_0" / "completions.0.jsonl").read_bytes()
    with pytest.raises(ValueError, match="was begun with another init_seed: undo that, or start in a new folder"):
        train(tmp_path / "run", Noting(tmp_path / "notes"), resume=True, model={"init_seed": 7})
    assert (tmp_path / "run" / "partition_0" / "completions.0.jsonl").read_bytes() == before


def test_what_was_said_is_kept_as_it_was_said(tmp_path):
    """White space that a tokenizer would tidy away between prompt and completion, and within one, stays."""
    words = {"<end>": 0, "1": 1, " ": 2, ".": 3, "?": 4, "'": 5, "s": 6}
    core = Tokenizer(models.WordLevel(words, "<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tidy = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=True)
    prompts, found = ["1 ", "1 '", "1"], []

    class Asking(Partition):
        def next(self, step, pool):
            found.extend(pool.complete(prompts, Sampler(16, max_new_tokens=12)))

    module = runs.module({**DESCRIPTION, "tie_word_embeddings": True}, tokenizer=tidy)
    rows = [{"prompt": "1", "chosen": "1", "rejected": "s"}]
    data = runs.data(rows, partition=Asking(), validation_fraction=0)
    with pytest.raises(ValueError, match="has no first step"):
        fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1), tmp_path / "run")
    said = [one for each in found for one in each]
    assert sum(one.text[:1] in (".", "?", "'") for one in said[:32]) > 3
    for one in said:
        assert one.text == "".join(sign for id in one.ids if (sign := tidy.convert_ids_to_tokens(id)) != "<end>")


STOPPING = """
import os, signal
def is_right(prompt, completion):
    if prompt == "23=" and not os.path.exists("mended"):
        {}
    return "7" not in completion
"""


@pytest.mark.slow
def test_ctrl_c_while_judging_prints_the_command_to_go_on_with(here, capsys):  # noqa: F811
    """With it, and with nothing else changed, the round goes on."""
    words = [*online(here, "--allow-import", "my_verifier"), "--data.partition.rounds", "1"]
    (here / "my_verifier.py").write_text(STOPPING.format("os.kill(os.getpid(), signal.SIGINT)"))
    with pytest.raises(SystemExit, match="130"):
        main(words)
    said = capsys.readouterr().err
    assert "lit-dpo: interrupted\nWhat was done of the step is kept. To go on: lit-dpo fit" in said
    step = here / "runs" / "online" / "version_0" / "partition_0"
    judged = lines(step / "scores.0.jsonl")
    assert len(judged) == 2
    (here / "mended").touch()
    again = shlex.split(said.rpartition("To go on: ")[2])[1:]
    other = [
        word if word != json.dumps(DESCRIPTION) else json.dumps({**DESCRIPTION, "hidden_size": 16}) for word in again
    ]
    with pytest.raises(SystemExit, match="2"):
        main(other)
    assert "differs from that of the run to resume in model.model.hidden_size" in capsys.readouterr().err
    main(again)
    assert lines(step / "scores.0.jsonl")[:2] == judged
    assert (step / "export").is_dir()


# -- what is measured beside the pairs --------------------------------------------------------------------------------


def test_greedy_answers_and_trusted_pairs_are_measured(one, tmp_path, capsys):
    """The oracle: greedy decoding of one prompt at a time by transformers, and the judge's rule, counted by hand."""
    record = json.loads((one / "run" / "partition_0" / "round.json").read_text())
    assert record["trusted"]["pairs"] == 3
    assert record["trusted"]["share"] == pytest.approx(2.5 / 3)  # of the third pair both completions hold no 7
    assert record["trusted"]["error"] == pytest.approx(1.959964 * math.sqrt(variance([1, 1, 0.5, 0, 0, 1, 1]) / 7))
    answering = {
        "greedy": load_model(DESCRIPTION, signs()),
        "greedy_after": load_model(str(one / "run/partition_0/export")),
    }
    for name, model in answering.items():
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


@pytest.mark.parametrize("option", ["greedy_prompts", "trusted"])
@pytest.mark.parametrize("rows", [[], None], ids=["empty", "missing"])
def test_what_measures_nothing_is_refused_before_anything_is_judged(option, rows, tmp_path):
    """A mean over nothing would be recorded as 0, and a judge may take hours or cost money."""
    file = tmp_path / "fixed.jsonl"
    if rows is not None:
        runs.write(file, rows)
    rounds = round_of(tmp_path / "run", Counting(tmp_path / "notes"), 2, **{option: str(file)})
    said = (
        "There is no `fixed.jsonl` in"
        if rows is None
        else f"`{option}`: `.*fixed.jsonl` holds no .*leave the option out"
    )
    with pytest.raises((ValueError, OSError), match=said):
        rounds.next(0, Saying(tmp_path / "run" / "step"))
    assert not (tmp_path / "notes").exists()
    assert not [*(tmp_path / "run" / "step").rglob("*.jsonl")]


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
