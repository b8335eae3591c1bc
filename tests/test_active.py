"""Active preference learning: what is asked, how often, and what is trained on, by an oracle of plain loops."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo import Active, Judge, Verifier
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.sampling import Sampler
from lit_dpo.stepwise import fit_stepwise
from tests import runs
from tests.test_rounds import DESCRIPTION, here, lines, signs  # noqa: F401 - a fixture

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
ROOT = Path(__file__).parents[1]
PROMPTS = [f"{n}{n + 3}=" for n in range(9)]


class Oracle(Judge):
    """Likes short completions, notes each question in a file, and may fail at one."""

    def __init__(self, notes, fails_at=None, how="raise"):
        self.notes, self.fails_at, self.how = notes, fails_at, how

    def identity(self):
        return {"judge": "Oracle"}

    def score(self, prompts, completions):
        count = len(lines(self.notes)) if self.notes.exists() else 0
        if count == self.fails_at and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == self.fails_at:
            raise ValueError("The oracle is asleep: wake it.")
        with self.notes.open("a") as file:
            file.write(json.dumps([prompts[0], *completions]) + "\n")
        return [-len(text) for text in completions]


def train(folder, judge, resume=False, processes=None, **options):
    """Two rounds of up to nine prompts with six samples each, five questions in all; the folders of the rounds."""
    module = runs.module(DESCRIPTION, tokenizer=signs(), lr=1e-2, optimizer=torch.optim.AdamW)
    options = {"budget": 5, "rounds": 2, "samples": 6, "max_new_tokens": 20, **options}
    file = runs.write(folder.parent / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    other = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in (1, 2)]
    partition = Active(file, judge, **options)
    data = runs.data(other, partition=partition, batch_size=2, validation=other, max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1, **(processes or {})), folder, resume)
    return [folder / "partition_0", folder / "partition_1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two rounds without disturbance."""
    folder = tmp_path_factory.mktemp("active")
    return train(folder / "run", Oracle(folder / "notes"), share=0.7)


def logp(model, prompt, ids):
    """Of one completion, alone: token by token."""
    before = signs()(prompt).input_ids
    with torch.no_grad():
        found = model(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
    return sum(found[len(before) + place - 1, token].item() for place, token in enumerate(ids))


def wanted(round_, model, first, prompts, share=0.7, entropy=True, gap=True):
    """The questions of a round in order, as (prompt, two completions), by the rule of the paper."""
    ranked = []
    for prompt in prompts:
        [found] = Sampler(6, max_new_tokens=20, seed=0, round=round_, rows=1)(
            model, signs(), [signs()(prompt).input_ids]
        )
        pair = {}
        for one in found:
            if one.finished and one.text.strip():
                pair.setdefault(one.text, one.ids)
        pair = [*pair.items()][:2]
        if len(pair) == 2:
            uncertain = -sum(logp(model, prompt, one.ids) for one in found) / 6
            rewards = [logp(model, prompt, ids) - logp(first, prompt, ids) for _, ids in pair]
            ranked.append((uncertain, abs(rewards[0] - rewards[1]), [prompt, pair[0][0], pair[1][0]]))
    if entropy:
        ranked.sort(key=lambda one: -one[0])
    if gap and round_:
        ranked = ranked[: -int(-share * len(ranked) // 1)] if entropy else ranked
        ranked.sort(key=lambda one: -one[1])
    return [question for _, _, question in ranked]


def test_the_oracle_is_asked_what_the_policy_is_uncertain_of(whole):
    """Two questions, then three of other prompts; all answers so far are trained on, from the first model."""
    asked = lines(whole[0].parents[1] / "notes")
    first = load_model(DESCRIPTION, signs())
    assert asked[:2] == wanted(0, first, first, PROMPTS)[:2]
    rest = [prompt for prompt in PROMPTS if prompt not in (asked[0][0], asked[1][0])]
    trained = AutoModelForCausalLM.from_pretrained(whole[0] / "export")
    assert asked[2:] == wanted(1, trained, first, rest)[:3]
    assert asked[2:] != wanted(1, trained, first, rest, gap=False)[:3]
    told = [
        {"prompt": prompt, "chosen": min(a, b, key=len), "rejected": max(a, b, key=len)}
        for prompt, a, b in asked if len(a) != len(b)
    ]  # fmt: skip
    early = [row for row in told if row["prompt"] in (asked[0][0], asked[1][0])]
    assert lines(whole[0] / "pairs.jsonl") == early
    assert lines(whole[1] / "pairs.jsonl") == told
    records = [json.loads((root / "round.json").read_text()) for root in whole]
    assert [(one["asked"], one["asked_so_far"]) for one in records] == [(2, 2), (3, 5)]
    assert records[1]["without_pair"].get("equal scores", 0) == 5 - len(told)


def test_each_round_begins_with_the_first_model(whole, tmp_path):
    """Plain training of the first model on the second round's pairs gives its weights; going on does not."""
    module = runs.module(DESCRIPTION, tokenizer=signs(), lr=1e-2, optimizer=torch.optim.AdamW)
    data = runs.data(str(whole[1] / "pairs.jsonl"), batch_size=2, max_length=32, validation_fraction=0.0)
    runs.fit(module, data, max_epochs=1)
    exported = AutoModelForCausalLM.from_pretrained(whole[1] / "export")
    assert runs.same(runs.weights(module.policy), runs.weights(exported))
    roots = train(tmp_path / "run", Oracle(tmp_path / "notes"), share=0.7, restart=False)
    assert (roots[1] / "pairs.jsonl").read_bytes() == (whole[1] / "pairs.jsonl").read_bytes()
    assert not runs.same(
        runs.weights(exported), runs.weights(AutoModelForCausalLM.from_pretrained(roots[1] / "export"))
    )


@pytest.mark.slow
def test_at_random_it_is_the_control(whole, tmp_path):
    """As many questions, of other prompts; another seed asks others, the same one the same."""
    found = []
    for name, options in {"a": {}, "b": {"batch_size": 4}, "c": {"seed": 3}}.items():
        (tmp_path / name).mkdir()
        options = {"budget": 4, "rounds": 1, "entropy": False, "gap": False, **options}
        train(tmp_path / name / "run", Oracle(tmp_path / name / "notes"), **options)
        found.append([question[0] for question in lines(tmp_path / name / "notes")])
    assert [len(set(one)) for one in found] == [4, 4, 4]
    assert found[0] == found[1] != found[2]


def test_the_budget_is_kept_and_what_is_left_goes_on(tmp_path):
    """Four prompts: two questions, then the other two of three allowed; the third round has none left to ask."""
    file = runs.write(tmp_path / "few.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:4]])
    notes = tmp_path / "notes"
    module = runs.module(DESCRIPTION, tokenizer=signs(), lr=1e-2, optimizer=torch.optim.AdamW)
    other = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in (1, 2)]
    partition = Active(file, Oracle(notes), budget=7, rounds=3, samples=6, max_new_tokens=20, entropy=False)
    data = runs.data(other, partition=partition, batch_size=2, validation=other, max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1), tmp_path / "run")
    records = [json.loads((tmp_path / "run" / f"partition_{n}" / "round.json").read_text()) for n in range(3)]
    asked = [question[0] for question in lines(notes)]
    assert [one["asked_so_far"] for one in records] == [2, 4, 4]
    assert sorted(asked) == sorted(PROMPTS[:4])
    assert records[2]["pairs"] == records[1]["pairs"]


def finish(folder, notes, whole):
    """Go on after a failure at the fourth question: it alone is asked again, and all is as it was without."""
    before = lines(notes)
    assert len(before) == 3
    roots = train(folder, Oracle(notes), resume=True, share=0.7)
    asked = lines(notes)
    assert asked == lines(whole[0].parents[1] / "notes")
    assert len({json.dumps(question) for question in asked}) == 5
    for root, other in zip(roots, whole, strict=True):
        for name in ("pairs.jsonl", "asked.jsonl", "export/model.safetensors"):
            assert (root / name).read_bytes() == (other / name).read_bytes()


def test_an_oracle_that_fails_is_never_asked_twice(whole, tmp_path):
    folder, notes = tmp_path / "run", tmp_path / "notes"
    with pytest.raises(ValueError, match="The oracle is asleep"):
        train(folder, Oracle(notes, fails_at=3), share=0.7)
    assert not (folder / "partition_1" / "pairs.jsonl").exists()
    with pytest.raises(ValueError, match="begun with another budget: undo that"):
        train(folder, Oracle(notes), resume=True, share=0.7, budget=8)
    finish(folder, notes, whole)


@pytest.mark.slow
def test_after_a_kill_the_oracle_is_never_asked_twice(whole, tmp_path):
    """A real process, SIGKILL in the middle of the second round's questions."""
    folder, notes = tmp_path / "run", tmp_path / "notes"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.test_active", str(folder), str(notes)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    finish(folder, notes, whole)


@pytest.mark.slow
def test_two_processes_make_the_pairs_that_one_makes(whole, tmp_path):
    """They share the questions of both rounds, and ask none twice."""
    folder, notes = tmp_path / "run", tmp_path / "notes"
    runs.launch(["tests.test_active", str(folder), str(notes), "ddp"])
    roots, names = [folder / "partition_0", folder / "partition_1"], ("pairs.jsonl", "asked.jsonl")
    for name in names:
        assert (roots[0] / name).read_bytes() == (whole[0] / name).read_bytes(), name
    for root, questions in zip(roots, (2, 3), strict=True):
        for name, count in {"completions": None, "scores": questions}.items():
            own = [{line[0] for line in lines(root / f"{name}.{rank}.jsonl")} for rank in (0, 1)]
            assert [{n % 2 for n in one} for one in own] == [{0}, {1}]
            assert count is None or sum(map(len, own)) == count
    assert len({json.dumps(question) for question in lines(notes)}) == len(lines(notes)) == 5
    together = [(roots[1] / name).read_bytes() for name in names]
    shutil.rmtree(roots[1])
    train(folder, Oracle(notes), resume=True, share=0.7)
    assert [(roots[1] / name).read_bytes() for name in names] == together


def test_answers_of_earlier_rounds_are_needed(whole, tmp_path):
    folder, notes = tmp_path / "run", tmp_path / "notes"
    with pytest.raises(ValueError, match="The oracle is asleep"):
        train(folder, Oracle(notes, fails_at=3), share=0.7)
    (folder / "partition_0" / "asked.jsonl").unlink()
    with pytest.raises(ValueError, match=r"asked.jsonl` is missing, which holds what the judge has said: restore it"):
        train(folder, Oracle(notes), resume=True, share=0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1, "rounds": 2}, "`budget` must be at least `rounds`"),
        ({"samples": 1}, "`samples` must be at least 2"),
        ({"share": 0.5, "gap": False}, "`share` must be in .* and needs both"),
        ({"share": 0.0}, "`share` must be in"),
        ({"prompts_per_round": 0}, "`prompts_per_round` must be at least 1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Active("prompts.jsonl", Verifier(lambda prompt, text: True), **{"budget": 5, **options})


def test_a_model_that_cannot_be_loaded_again_is_refused(tmp_path):
    module = runs.module(load_model(DESCRIPTION, signs()), tokenizer=signs())
    other = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in (1, 2)]
    partition = Active("prompts.jsonl", Oracle(tmp_path / "notes"), budget=5)
    data = runs.data(other, partition=partition, validation=other)
    with pytest.raises(ValueError, match="given as an object has been training: save it"):
        fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1), tmp_path / "run")


def test_the_shipped_configuration_runs_end_to_end(here):  # noqa: F811
    """The oracle is a program, which counts its questions: a budget of five in two rounds."""
    signs().save_pretrained("signs")
    runs.write(here / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    runs.write(here / "pairs.jsonl", [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in range(8)])
    (here / "oracle.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    open('asked', 'a').write(line)\n"
        "    print(-len(json.loads(line)['completion']), flush=True)\n"
    )
    words = ["fit", "--config", str(ROOT / "configs" / "active.yaml"), "--allow-command"]
    words += ["--model.model", json.dumps(DESCRIPTION), "--model.tokenizer", "signs", "--model.optimizer.lr", "1e-2"]
    words += ["--data.validation", "pairs.jsonl", "--data.max_length", "32", "--data.batch_size", "2"]
    options = {"judge.command": f"{sys.executable} -S oracle.py", "budget": 5, "rounds": 2, "prompts_per_round": 4}
    for name, value in {**options, "samples": 6, "max_new_tokens": 12}.items():
        words += [f"--data.partition.{name}", str(value)]
    for name in ("enable_progress_bar", "enable_model_summary"):
        words += [f"--trainer.{name}", "false"]
    main([*words, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_epochs", "1"])
    run = here / "runs" / "active" / "version_0"
    asked = [one for n in (0, 1) for one in lines(run / f"partition_{n}" / "asked.jsonl")]
    assert len(asked) == 5
    questions = [(one["prompt"], text) for one in asked for text in one["completions"]]
    assert [(one["prompt"], one["completion"]) for one in lines(here / "asked")] == questions
    assert len(lines(run / "partition_1" / "pairs.jsonl")) >= 2
    assert (run / "partition_1" / "export" / "config.json").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, notes = map(Path, sys.argv[1:3])
    if sys.argv[3:]:
        train(where, Oracle(notes), share=0.7, processes={"strategy": sys.argv[3], "devices": 2})
        runs.leave()
    train(where, Oracle(notes, 3, "kill"), share=0.7)
