"""Filtered DPO and D2PO: pairs left out because the policy does better, and labels of a judge that learns."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_dpo import (
    Discriminated,
    Discriminator,
    Filtered,
    FrozenReference,
    Judge,
    LoRA,
    RewardModel,
    Verifier,
)
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from lit_dpo.stepwise import fit_stepwise
from tests import runs
from tests.test_rounds import DESCRIPTION, Talking, here, is_right, lines, signs  # noqa: F401 - a fixture

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
pytestmark += [pytest.mark.filterwarnings("ignore:The discriminator of round")]  # a few labels teach it little
ROOT = Path(__file__).parents[1]
# Two pairs share a prompt; a sample has 20 signs at most.
PAIRS = [
    {"prompt": f"{n % 5}{n}=", "chosen": ("1234567890" * 3)[:size], "rejected": f"{n}9"}
    for n, size in enumerate((1, 6, 22, 10, 24, 12))
]
PAIRS[5]["prompt"] = PAIRS[4]["prompt"]


def length(prompt, completion):
    return len(completion)


def opinionated(prompt, completion):
    """Longer is better; of the prompt with a 3 it has no opinion."""
    return None if prompt.startswith("3") else len(completion)


class Failing(Judge):
    """Judges as a function does, notes each prompt in a file, and fails at the so-manieth completion, or kills."""

    def __init__(self, function, notes, fails_at=None, kill=False):
        self.function, self.notes, self.fails_at, self.kill = function, notes, fails_at, kill

    def identity(self):
        return {"judge": "Failing"}

    def score(self, prompts, completions):
        asked = len(self.notes.read_text().split()) if self.notes.exists() else 0
        if self.fails_at is not None and asked >= self.fails_at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return []
        with self.notes.open("a") as file:
            file.write(f"{prompts[0]}\n")
        return [self.function(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def run(folder, partition, pairs=PAIRS, resume=False, epochs=1, model=DESCRIPTION, processes=None, **options):
    """Train through the steps; returns the module, and the folders of the steps."""
    more = {"tokenizer": signs(), "lr": 1e-2, "optimizer": torch.optim.AdamW, **options}
    module = runs.module(model, **more)
    data = runs.data(pairs, partition=partition, batch_size=2, validation=PAIRS[:2], max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=epochs, **(processes or {})), folder, resume)
    return module, sorted(folder.glob("partition_*"))


def filtered(judge, **options):
    return Filtered(judge, **{"rounds": 2, "max_new_tokens": 20, **options})


def first_sample(model, prompt, step):
    sampler = Sampler(1, max_new_tokens=20, round=step, rows=1)
    return next(iter(sampler(model, signs(), [signs()(prompt).input_ids])))[0]


# -- filtered DPO -----------------------------------------------------------------------------------------------------


def test_a_pair_is_kept_if_its_chosen_answer_beats_the_sample(tmp_path):
    """The oracle samples each prompt alone and compares lengths; in the second round so does the policy it led to."""
    module, roots = run(tmp_path / "run", filtered(Verifier(opinionated)))
    starts = [load_model(DESCRIPTION, signs()), AutoModelForCausalLM.from_pretrained(roots[0] / "export")]
    for step, (root, model) in enumerate(zip(roots, starts, strict=True)):
        said = {row["prompt"]: first_sample(model, row["prompt"], step).text for row in PAIRS}
        opinions = [row for row in PAIRS if not row["prompt"].startswith("3")]
        kept = [row for row in opinions if len(said[row["prompt"]]) < len(row["chosen"])]
        assert lines(root / "pairs.jsonl") == kept
        assert 0 < len(kept) < len(opinions)
        record = json.loads((root / "round.json").read_text())
        counts = [record[name] for name in ("of", "prompts", "kept", "replaced", "dropped", "no_opinion")]
        assert counts == [6, 5, len(kept), 0, 5 - len(kept), 1]
    assert runs.same(runs.weights(module.reference.models()[0]), runs.weights(starts[0]))


def test_the_better_sample_may_take_the_place_of_the_chosen_answer(tmp_path):
    _, (root,) = run(tmp_path / "run", filtered(Verifier(length), rounds=1, replace=True))
    model, expected = load_model(DESCRIPTION, signs()), []
    for row in PAIRS:
        sample = first_sample(model, row["prompt"], 0)
        if len(sample.text) < len(row["chosen"]):
            expected.append(row)
        elif len(sample.text) > len(row["chosen"]) and sample.finished:
            expected.append({**row, "chosen": sample.text})
    assert lines(root / "pairs.jsonl") == expected
    record = json.loads((root / "round.json").read_text())
    assert record["replaced"] == sum(row not in PAIRS for row in expected) > 0


def test_what_is_held_out_is_neither_sampled_nor_trained_on(tmp_path):
    rows = [{**PAIRS[4], "prompt": f"{n}="} for n in range(10)]
    module = runs.module(DESCRIPTION, tokenizer=signs())
    data = runs.data(rows, partition=filtered(Verifier(length), rounds=1), validation_fraction=0.4, max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1), tmp_path / "run")
    pool = {rows[row]["prompt"] for row in data.training.pool.tolist()}
    assert len(pool) == 6
    assert {row["prompt"] for row in lines(tmp_path / "run" / "partition_0" / "pairs.jsonl")} <= pool
    assert len(lines(tmp_path / "run" / "partition_0" / "completions.0.jsonl")) == 6


def test_rows_that_change_between_rounds_are_refused(tmp_path):
    """Their number and places are as before: of what was read at the start, only the token ids are kept."""
    file = runs.write(tmp_path / "pairs.jsonl", PAIRS)

    def changing(prompt, text):
        runs.write(tmp_path / "pairs.jsonl", [*PAIRS[:-1], {**PAIRS[-1], "chosen": "9" + PAIRS[-1]["chosen"]}])
        return length(prompt, text)

    with pytest.raises(ValueError, match="The training data have changed since this run has read them"):
        run(tmp_path / "run", filtered(Verifier(changing)), file)
    assert not (tmp_path / "run" / "partition_1" / "pairs.jsonl").exists()


def test_the_reference_stays_the_first_model_or_is_refused(tmp_path):
    judge = Verifier(length)
    with pytest.raises(ValueError, match=r"`Filtered` keeps the first model .*: set `reference` to `FrozenReference`"):
        run(tmp_path / "lora", filtered(judge), adapter=LoRA(rank=2))
    model = load_model(DESCRIPTION, signs())
    with pytest.raises(ValueError, match="save it with `save_pretrained` and give the folder"):
        run(tmp_path / "object", filtered(judge), model=model)
    module, _ = run(tmp_path / "seeded", filtered(judge, rounds=1), init_seed=5)
    assert runs.same(runs.weights(module.reference.models()[0]), runs.weights(load_model(DESCRIPTION, signs(), seed=5)))
    other = FrozenReference({**DESCRIPTION, "initializer_range": 0.1})
    module, _ = run(tmp_path / "named", filtered(judge, rounds=1), reference=other)
    named = load_model(other.model, signs())
    assert runs.same(runs.weights(module.reference.models()[0]), runs.weights(named))


def test_prompts_with_tools_are_refused(tmp_path):
    class Asked:
        def pairs(self):
            from lit_dpo.data.pair import Pair

            return [Pair("a", "b", "c", "s", "file.jsonl:3", tools=({"name": "x"},))]

    with pytest.raises(ValueError, match=r"file.jsonl:3, column `tools`: .*; leave such rows out"):
        filtered(Verifier(length)).make(0, Asked())


# -- a discriminator --------------------------------------------------------------------------------------------------


def labelled(count, seed=0):
    """Pairs whose better side has no 7."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        digits = [str(d) for d in torch.randint(0, 7, (5,), generator=draw).tolist()]
        worse = list(digits)
        worse[int(torch.randint(0, 5, (1,), generator=draw))] = "7"
        found.append((f"{n}=", "".join(digits), "".join(worse)))
    return found


def start():
    return load_model(DESCRIPTION, signs()), signs()


def test_a_discriminator_learns_what_the_labels_say_and_repeats(tmp_path):
    """What it has learned is saved as a reward model that scores alike; the same seed gives the same bits."""
    judge = Discriminator(lr=3e-3, epochs=3, folds=2)
    agreement, of = judge.fit(labelled(24), start())
    assert of == 24
    assert agreement > 0.8
    judge.save(tmp_path / "learned", {"agreement": agreement})
    again = Discriminator(lr=3e-3, epochs=3, folds=2)
    assert again.fit(labelled(24), start()) == (agreement, of)
    unseen = labelled(20, seed=1)
    asked = [prompt for prompt, _, _ in unseen] * 2, [side[n] for n in (1, 2) for side in unseen]
    scores = judge.score(*asked)
    assert sum(a > b for a, b in zip(scores[:20], scores[20:], strict=True)) >= 17
    assert again.score(*asked) == scores
    assert RewardModel(str(tmp_path / "learned")).score(*asked) == scores
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "learned")
    assert (model.config.num_labels, model.config.pad_token_id) == (1, None)


def test_its_loss_is_that_of_bradley_and_terry():
    """One step of AdamW on one pair, by hand."""
    judge = Discriminator(lr=1e-2, epochs=1, folds=2)
    pair = ("1=", "23", "456")
    judge.fit([pair, pair], start())
    found = judge.score([pair[0]] * 2, [*pair[1:]])
    judge = Discriminator(lr=1e-30, epochs=1, folds=2)
    judge.fit([pair, pair], start())
    model, _ = judge._open()
    better, worse = (model(torch.tensor([signs()(pair[0] + side).input_ids])).logits[0, 0] for side in pair[1:])
    torch.log1p(torch.exp(worse - better)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 1e-2 * weight.grad / (weight.grad.abs() + 1e-8)
    judge._loaded = model, signs()
    assert found == pytest.approx(judge.score([pair[0]] * 2, [*pair[1:]]), abs=1e-3)


def test_a_discriminator_that_cannot_learn_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="needs at least 2 labelled pairs, got 1: have more of them labelled"):
        Discriminator().fit(labelled(1), start())
    with pytest.raises(ValueError, match="has not been trained: use it in `Discriminated`"):
        Discriminator().score(["1="], ["2"])
    with pytest.raises(ValueError, match=r"weights are not finite, .*: lower its `lr`"):
        Discriminator(lr=1e30, folds=2).fit(labelled(8), start())
    mamba = load_model({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}, signs())
    with pytest.raises(ValueError, match=r"A mamba cannot be given a scalar output, .*: name another model"):
        Discriminator(folds=2).fit(labelled(2), (mamba, signs()))


# -- D2PO -------------------------------------------------------------------------------------------------------------

ASKED = [f"{n}{m}=" for n in range(4) for m in range(6)]


def d2po(folder, gold, **options):
    file = runs.write(folder / "asked.jsonl", [{"prompt": prompt} for prompt in ASKED])
    more = {"rounds": 2, "prompts_per_round": 12, "gold_per_round": 4, "max_new_tokens": 20, **options}
    more.setdefault("discriminator", Discriminator(lr=3e-3, epochs=2, folds=2))
    return Discriminated(file, gold, **more)


def fewer_sevens(prompt, completion):
    return -completion.count("7") - 0.01 * len(completion)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two rounds without disturbance."""
    folder = tmp_path_factory.mktemp("d2po")
    return run(folder / "run", d2po(folder, Failing(fewer_sevens, folder / "notes")))[1], folder / "notes"


def test_gold_labels_teach_a_discriminator_that_labels_the_rest(whole):
    """The oracle: gold pairs by the rule, the others by a fresh reward model of what the round has saved."""
    roots, notes = whole
    gold = []
    for number, root in enumerate(roots):
        prompts = ASKED[12 * number : 12 * number + 12]
        said = {}
        for n, completions in lines(root / "completions.0.jsonl"):
            assert len(completions) == 2
            texts = {one["text"] for one in completions if one["finished"] and one["text"]}
            said.update({prompts[n]: texts} if len(texts) == 2 else {})
        two = [prompt for prompt in prompts if prompt in said]
        judge = RewardModel(str(root / "discriminator"))
        expected = []
        for prompt in two:
            labels = (
                [fewer_sevens(prompt, text) for text in said[prompt]]
                if prompt in two[:4]
                else judge.score([prompt] * 2, [*said[prompt]])
            )
            best, worst = (text for _, text in sorted(zip(labels, said[prompt], strict=True), reverse=True))
            if labels[0] != labels[1]:
                expected.append({"prompt": prompt, "chosen": best, "rejected": worst})
                gold += [[prompt, best, worst]] if prompt in two[:4] else []
        assert lines(root / "pairs.jsonl") == expected
        assert lines(root / "gold.jsonl") == gold
        record = json.loads((root / "round.json").read_text())
        told = [record[name] for name in ("gold_asked", "gold_pairs_so_far", "agreement_of", "pairs")]
        assert told == [4, len(gold), len(gold), len(expected)]
        assert 0 <= record["agreement"] <= 1
        assert len(two) > 4
    assert len(notes.read_text().split()) == 8  # the budget of two rounds


def test_an_interrupted_round_asks_for_no_label_twice_and_makes_the_same_pairs(whole, tmp_path):
    """Interrupted by its gold judge, then behind the discriminator, then between the rounds."""
    notes = tmp_path / "notes"
    with pytest.raises(ValueError, match="The judge gave 0 scores for 2 completions"):
        run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, notes, fails_at=3)))

    class Full(Discriminator):
        def score(self, prompts, completions):
            if (tmp_path / "run" / "partition_0" / "discriminator").exists():
                raise OSError("No space left on device")
            return super().score(prompts, completions)

    options = {"lr": 3e-3, "epochs": 2, "folds": 2}
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, notes), discriminator=Full(**options)), resume=True)
    learned = tmp_path / "run" / "partition_0" / "discriminator" / "model.safetensors"
    before = learned.stat().st_mtime_ns
    gold = Failing(fewer_sevens, notes, fails_at=6)
    with pytest.raises(ValueError, match="The judge gave 0 scores"):
        run(tmp_path / "run", d2po(tmp_path, gold), resume=True)
    assert learned.stat().st_mtime_ns == before
    _, roots = run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, notes)), resume=True)
    assert notes.read_text() == whole[1].read_text()
    for root, other in zip(roots, whole[0], strict=True):
        for name in ("pairs.jsonl", "gold.jsonl", "discriminator/model.safetensors", "export/model.safetensors"):
            assert (root / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["d2po", "filtered"])
def test_a_killed_round_makes_the_same_pairs(method, whole, tmp_path):
    """Real processes, SIGKILL at three moments of judging."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    statuses = []
    for fails_at in ("2", "6", "never"):
        command = [sys.executable, "-m", "tests.test_rounds_learned", method, str(tmp_path), fails_at]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        statuses.append(done.returncode)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0]
    others = whole[0]
    if method == "filtered":
        (tmp_path / "undisturbed").mkdir()
        others = run(tmp_path / "undisturbed" / "run", program(method, tmp_path / "undisturbed"))[1]
    for root, other in zip(sorted((tmp_path / "run").glob("partition_*")), others, strict=True):
        for name in ("pairs.jsonl", "export/model.safetensors"):
            assert (root / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_two_processes_make_the_pairs_that_one_makes(whole, tmp_path):
    """Both rounds are shared, each prompt being sampled, labelled and judged by one process alone."""
    runs.launch(["tests.test_rounds_learned", "d2po", str(tmp_path), "never", "ddp"])
    roots = [tmp_path / "run" / f"partition_{number}" for number in (0, 1)]
    names = ("pairs.jsonl", "gold.jsonl", "discriminator/model.safetensors")
    for name in names:
        assert (roots[0] / name).read_bytes() == (whole[0][0] / name).read_bytes(), name
    for root in roots:
        for name in ("completions", "gold", "scores"):
            numbers = [{line[0] for line in lines(root / f"{name}.{rank}.jsonl")} for rank in (0, 1)]
            assert [{n % 2 for n in own} for own in numbers] == [{0}, {1}], name
    assert len((tmp_path / "notes").read_text().split()) == 8  # no label was asked for twice
    together = [(roots[1] / name).read_bytes() for name in names]
    shutil.rmtree(roots[1])
    run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, tmp_path / "notes")), resume=True)
    assert [(roots[1] / name).read_bytes() for name in names] == together


def program(method, folder, fails_at=None):
    """What a process of its own trains."""
    function = fewer_sevens if method == "d2po" else length
    judge = Failing(function, folder / "notes", fails_at, kill=True)
    return d2po(folder, judge) if method == "d2po" else filtered(judge)


class Told(Talking):
    """A pool whose policy says two things to every prompt, and whose model nobody needs."""

    def model(self, step):
        return None, None


class Measured(Discriminator):
    """Learns nothing, and is found to agree so much, round after round."""

    def __init__(self, *agreements):
        super().__init__()
        self.agreements = list(agreements)

    def fit(self, pairs, start):
        return self.agreements.pop(0), len(pairs)

    def save(self, folder, measured):
        pass

    def score(self, prompts, completions):
        return [float(len(text)) for text in completions]


def test_labels_that_teach_nothing_are_told_of(tmp_path):
    """All gold labels alike, a single one; a discriminator no better than chance, and one that gets worse."""

    def rounds(name, gold, *agreements, count=1, **options):
        partition = d2po(tmp_path, Verifier(gold), discriminator=Measured(*agreements), **options)
        for step in range(count):
            partition.next(step, Told(tmp_path / name / f"partition_{step}", ("1", "22")))

    with pytest.raises(ValueError, match=r"Round 0 has 0 pairs with a gold label, of 4 .*gap too small: 4;"):
        rounds("alike", lambda prompt, text: 1.0)
    with pytest.raises(ValueError, match=r"has 1 pairs with a gold label, of 1 .*: raise `gold_per_round`"):
        rounds("one", fewer_sevens, gold_per_round=1)
    with pytest.warns(UserWarning, match=r"round 0 agrees with 50% of 4 held-out gold labels, no better than chance"):
        rounds("chance", fewer_sevens, 0.5)
    with pytest.warns(UserWarning, match="round 1 agrees with 60% of 8 held-out gold labels, 75% in the round before"):
        rounds("worse", fewer_sevens, 0.75, 0.6, count=2)
    decoy = tmp_path / "decoy" / "partition_0" / "discriminator" / "mine.txt"
    decoy.parent.mkdir(parents=True)
    decoy.write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that is no discriminator of this round: move it away"):
        rounds("decoy", fewer_sevens, 0.75)
    assert decoy.read_text() == "mine"


@pytest.mark.slow
def test_other_options_are_refused_and_a_missing_file_is_told_of(whole, tmp_path):
    notes = tmp_path / "notes"
    with pytest.raises(ValueError, match="The judge gave 0 scores"):
        run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, notes, fails_at=5)))
    other = d2po(tmp_path, Failing(fewer_sevens, notes), discriminator=Discriminator(lr=1e-3, folds=2, epochs=2))
    with pytest.raises(ValueError, match="was begun with another discriminator: undo that"):
        run(tmp_path / "run", other, resume=True)
    (tmp_path / "run" / "partition_0" / "gold.jsonl").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"gold.jsonl` is missing, which holds the gold labels of the rounds before"):
        run(tmp_path / "run", d2po(tmp_path, Failing(fewer_sevens, notes)), resume=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Filtered(Verifier(is_right), rounds=0), lambda: Filtered(Verifier(is_right), temperature=0),
        lambda: Discriminator(lr=0), lambda: Discriminator(epochs=0), lambda: Discriminator(folds=1),
        lambda: Discriminated("x", Verifier(is_right), gold_per_round=0),
        lambda: Discriminated("x", Verifier(is_right), prompts_per_round=0),
        lambda: Discriminated("x", Verifier(is_right), gap=-1),
    ],
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused(make):
    with pytest.raises(ValueError, match=r"`\w+` (of a round )?must be"):
        make()


# -- the command line -------------------------------------------------------------------------------------------------


def shipped(folder, name, *more):
    """A shipped configuration with models made on the spot."""
    signs().save_pretrained(folder / "signs")
    runs.write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in ASKED])
    runs.write(folder / "pairs.jsonl", PAIRS)
    code = "def is_right(prompt, completion):\n    return -completion.count('7') - 0.01 * len(completion)\n"
    (folder / "my_verifier.py").write_text(code)
    words = ["fit", "--config", name, "--model.model", json.dumps(DESCRIPTION), "--data.train", "pairs.jsonl"]
    words += ["--model.tokenizer", str(folder / "signs"), "--model.optimizer.lr", "1e-2"]
    words += ["--data.validation", "pairs.jsonl", "--data.max_length", "32", "--data.batch_size", "2"]
    words += ["--data.partition.rounds", "2", "--data.partition.max_new_tokens", "20"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.enable_model_summary", "false", "--trainer.accumulate_grad_batches", "1"]
    return [*words, *map(str, more)]


@pytest.mark.slow
def test_the_shipped_configuration_of_filtered_dpo_runs_end_to_end(here):  # noqa: F811
    judge = Discriminator(folds=2, epochs=1)
    judge.fit([(row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS], start())
    judge.save(here / "reward", {})
    words = shipped(here, "fdpo", "--data.partition.judge.model", here / "reward", "--data.partition.replace", "true")
    main(words)
    root = here / "runs" / "fdpo" / "version_0"
    for number in (0, 1):
        record = json.loads((root / f"partition_{number}" / "round.json").read_text())
        assert record["of"] == 6
        assert len(lines(root / f"partition_{number}" / "pairs.jsonl")) == record["kept"] + record["replaced"]
    assert (root / "partition_1" / "export" / "config.json").exists()


@pytest.mark.slow
def test_the_shipped_configuration_of_d2po_runs_end_to_end(here):  # noqa: F811
    words = shipped(here, "d2po", "--allow-import", "my_verifier", "--data.partition.prompts_per_round", 12)
    words += ["--data.partition.gold_per_round", "4"]
    main(words)
    root = here / "runs" / "d2po" / "version_0"
    records = [json.loads((root / f"partition_{number}" / "round.json").read_text()) for number in (0, 1)]
    assert [record["gold_asked"] for record in records] == [4, 4]
    assert records[1]["gold_pairs_so_far"] == sum(record["gold_pairs"] for record in records)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("pairs.jsonl")}
    main([*words, "--ckpt_path", "last"])
    assert {path: path.stat().st_mtime_ns for path in root.rglob("pairs.jsonl")} == before


def test_the_numbers_of_the_manual_are_the_measured_ones():
    [measured] = (ROOT / "benchmarks" / "results").glob("rounds_learned_*.md")
    page = (ROOT / "docs" / "fdpo_and_d2po.md").read_text()
    numbers = re.findall(r"0\.\d{3} ± 0\.\d{3}", page)
    assert len(numbers) > 25
    assert [number for number in numbers if number not in measured.read_text()] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    which, where, when, *strategy = sys.argv[1:]
    shared = {"strategy": strategy[0], "devices": 2} if strategy else None
    made = program(which, Path(where), None if when == "never" else int(when))
    run(Path(where) / "run", made, resume=True, processes=shared)
    if strategy:
        runs.leave()
