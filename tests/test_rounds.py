"""Rounds: the policy's own completions, judged, paired, written down, and trained on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lit_dpo import (
    AllPairs,
    BestVsWorst,
    ChosenVsSample,
    Command,
    FrozenReference,
    Judge,
    OnPolicy,
    Pool,
    RewardModel,
    RightVsWrong,
    Verifier,
)
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.rounds import Candidate
from lit_dpo.sampling import Completion, Sampler
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
ROOT = Path(__file__).parents[1]
DESCRIPTION = {**runs.LLAMA, "max_position_embeddings": 64, "initializer_range": 0.2}
PROMPTS = [f"{n}{n + 1}=" for n in range(7)]


def signs():
    """One token a character, so that a random model ends what it says after a dozen tokens."""
    core = Tokenizer(models.WordLevel({"<end>": 0, **{sign: n for n, sign in enumerate("0123456789=", 1)}}, "<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def is_right(prompt, completion):
    return "7" not in completion


class Noting(Judge):
    """Judges as `is_right` does, notes each prompt in a file, and may fail at one of them."""

    def __init__(self, notes, fails_at=None, how="raise"):
        self.notes, self.fails_at, self.how = notes, fails_at, how

    def identity(self):
        return {"judge": "Noting"}

    def score(self, prompts, completions):
        [prompt] = set(prompts)
        if prompt == self.fails_at and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == self.fails_at:
            return [1.0] * (len(prompts) - 1)
        with self.notes.open("a") as file:
            file.write(f"{prompt}\n")
        return [is_right(prompt, text) for text in completions]


def prompts_file(folder):
    """Prompts alone, one of them twice."""
    return runs.write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in [*PROMPTS[:3], *PROMPTS]])


def train(folder, judge, resume=False, reference=None, processes=None, model=None, **options):
    """Two rounds of six samples; returns the folders of the rounds."""
    more = {**(model or {}), **({} if reference is None else {"reference": reference})}
    module = runs.module(DESCRIPTION, tokenizer=signs(), lr=1e-2, optimizer=torch.optim.AdamW, **more)
    options = {"rounds": 2, "prompts_per_round": 5, "samples": 6, "max_new_tokens": 20, **options}
    partition = OnPolicy(prompts_file(folder.parent), judge, **options)
    other = [{"prompt": "1=", "chosen": "1", "rejected": "2"}, {"prompt": "2=", "chosen": "1", "rejected": "2"}]
    data = runs.data(other, partition=partition, batch_size=2, validation=other, max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1, **(processes or {})), folder, resume)
    return [folder / "partition_0", folder / "partition_1"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two rounds without disturbance."""
    folder = tmp_path_factory.mktemp("rounds")
    return train(folder / "run", Noting(folder / "notes"))


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_a_round_is_what_the_policy_that_starts_it_says(whole):
    """The oracle samples each prompt alone, judges and pairs by plain loops, and counts anew."""
    starts = [load_model(DESCRIPTION, signs()), AutoModelForCausalLM.from_pretrained(whole[0] / "export")]
    for number, (root, model) in enumerate(zip(whole, starts, strict=True)):
        wanted = [PROMPTS[(5 * number + n) % 7] for n in range(5)]
        pairs, counts, reasons = [], Counter(), Counter()
        for prompt in wanted:
            sampler = Sampler(6, max_new_tokens=20, seed=0, round=number, rows=1)
            [found] = sampler(model, signs(), [signs()(prompt).input_ids])
            kept = []
            for one in found:
                counts["finished"] += one.finished
                if one.finished and one.text == "":
                    counts["empty"] += 1
                elif one.finished and one.text in kept:
                    counts["duplicates"] += 1
                elif one.finished:
                    kept.append(one.text)
            right, wrong = [text for text in kept if "7" not in text], [text for text in kept if "7" in text]
            if right and wrong:
                pairs.append({"prompt": prompt, "chosen": right[0], "rejected": wrong[0]})
            else:
                reasons["all right" if right else "all wrong" if wrong else "no completion"] += 1
        assert lines(root / "pairs.jsonl") == pairs
        record = json.loads((root / "round.json").read_text())
        assert record.pop("seconds").keys() == {"sampling", "judging"}
        assert record == {
            "round": number, "prompts": 5, "completions": 30, "finished": counts["finished"] / 30,
            "empty": counts["empty"], "duplicates": counts["duplicates"], "no_opinion": 0,
            "mixed": len(pairs) / 5, "pairs": len(pairs), "without_pair": dict(reasons),
        }  # fmt: skip
        assert len(pairs) > 1


def test_the_batch_size_changes_nothing(whole, tmp_path):
    roots = train(tmp_path / "run", Noting(tmp_path / "notes"), batch_size=4)
    for root, other in zip(roots, whole, strict=True):
        assert (root / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()
    assert (roots[1] / "export" / "model.safetensors").read_bytes() == (
        whole[1] / "export" / "model.safetensors"
    ).read_bytes()


def test_the_first_model_may_be_the_reference_of_all_rounds(whole, tmp_path):
    """The first round is the same, and what the second one leads to is not."""
    reference = FrozenReference(DESCRIPTION)
    roots = train(tmp_path / "run", Noting(tmp_path / "notes"), reference=reference)
    first = load_model(DESCRIPTION, signs())
    assert runs.same(runs.weights(reference.models()[0]), runs.weights(first))
    names = ("partition_0/export/model.safetensors", "partition_1/pairs.jsonl", "partition_1/export/model.safetensors")
    equal = [(roots[0].parent / name).read_bytes() == (whole[0].parent / name).read_bytes() for name in names]
    assert equal == [True, True, False]


@pytest.mark.slow
def test_two_processes_make_the_pairs_that_one_makes(whole, tmp_path):
    """Both rounds are shared: each prompt is sampled and judged by one process alone."""
    runs.launch(["tests.test_rounds", str(tmp_path / "run"), str(tmp_path / "notes"), "ddp"])
    root = tmp_path / "run" / "partition_0"
    assert (root / "pairs.jsonl").read_bytes() == (whole[0] / "pairs.jsonl").read_bytes()
    shared = tmp_path / "run" / "partition_1"
    for name in ("completions", "scores"):
        for folder in (root, shared):
            numbers = [{line[0] for line in lines(folder / f"{name}.{rank}.jsonl")} for rank in (0, 1)]
            assert numbers == [{0, 2, 4}, {1, 3}]
    together = (shared / "pairs.jsonl").read_bytes()
    shutil.rmtree(shared)
    train(tmp_path / "run", Noting(tmp_path / "notes"), resume=True)
    assert (shared / "pairs.jsonl").read_bytes() == together


# -- failures ---------------------------------------------------------------------------------------------------------


def finish(folder, notes, whole):
    """Go on after a failure at the fourth prompt: only the rest is judged, and all is as it was without."""
    assert notes.read_text().split() == PROMPTS[:3]
    assert len(lines(folder / "partition_0" / "scores.0.jsonl")) == 3
    assert not (folder / "partition_0" / "pairs.jsonl").exists()
    with (folder / "partition_0" / "scores.0.jsonl").open("a") as file:
        file.write("[3, [1.0, 0.")  # as a kill may leave it
    sampled = (folder / "partition_0" / "completions.0.jsonl").read_bytes()
    roots = train(folder, Noting(notes), resume=True)
    assert notes.read_text().split()[:5] == PROMPTS[:5]
    assert (folder / "partition_0" / "completions.0.jsonl").read_bytes() == sampled
    for root, other in zip(roots, whole, strict=True):
        for name in ("pairs.jsonl", "scores.0.jsonl", "export/model.safetensors"):
            assert (root / name).read_bytes() == (other / name).read_bytes()


def test_a_judge_that_fails_loses_no_finished_prompt(whole, tmp_path):
    folder, notes = tmp_path / "run", tmp_path / "notes"
    with pytest.raises(ValueError, match=r"The judge gave \d scores for \d completions: give one each"):
        train(folder, Noting(notes, fails_at=PROMPTS[3]))
    finish(folder, notes, whole)


@pytest.mark.slow
def test_a_kill_while_judging_loses_no_finished_prompt(whole, tmp_path):
    """A real process, SIGKILL."""
    folder, notes = tmp_path / "run", tmp_path / "notes"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.test_rounds", str(folder), str(notes)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    finish(folder, notes, whole)


def test_a_round_that_was_begun_with_other_options_does_not_go_on(tmp_path, capsys):
    folder, notes = tmp_path / "run", tmp_path / "notes"
    with pytest.raises(ValueError, match="The judge gave"):
        train(folder, Noting(notes, fails_at=PROMPTS[3]))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"begun with another temperature, seed: undo that, or start in a new folder"):
        train(folder, Noting(notes), resume=True, temperature=0.5, seed=4)
    shown = capsys.readouterr().out
    assert "temperature" in shown
    assert "0.5" in shown
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_too_few_pairs_say_why(tmp_path):
    with pytest.raises(
        ValueError, match=r"Round 0 gives 0 pairs of 5 prompts.*\(prompts without a pair: all wrong: 5;"
    ):
        train(tmp_path / "run", Verifier(lambda prompt, completion: False))


class Talking(Pool):
    """A pool whose policy says the same three things to every prompt."""

    def __init__(self, folder, texts=("1", "22", "333")):
        def complete(prompts, sampler):
            for _ in prompts:
                yield [Completion((1,), text, True) for text in texts]

        super().__init__(["a"], folder, complete=complete)


def judged(folder, judge, texts=("1", "22", "333"), prompts=("5=", "6=")):
    """The pairs of a round of two prompts, without any model."""
    folder.mkdir(exist_ok=True)
    file = runs.write(folder / "asked.jsonl", [{"prompt": prompt} for prompt in prompts])
    rows = OnPolicy(file, judge, BestVsWorst(), samples=3).next(0, Talking(folder / "step", texts))
    return [(row["chosen"], row["rejected"]) for row in rows]


def hang(prompt, completion):
    while True:
        pass


def forgiving(prompt, completion):
    try:
        hang(prompt, completion)
    except Exception:
        return False


def deaf(prompt, completion):
    with suppress(BaseException):
        hang(prompt, completion)
    return False


def broken(prompt, completion):
    raise KeyError("no such answer")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (hang, "`hang` took more than 0.2 seconds"),
        (forgiving, "`forgiving` took more than 0.2 seconds"),
        (deaf, "`deaf` took more than 0.2 seconds"),
        (lambda prompt, completion: sys.exit(0), "raised SystemExit: 0"),
        (broken, "`broken` raised KeyError: 'no such answer'"),
        (lambda prompt, completion: float("nan"), "gave the score nan: give a finite number, or `None`"),
        (lambda prompt, completion: 10**400, "gave the score 1000.*: give a finite number, or `None`"),
        (lambda prompt, completion: torch.tensor(1.0), r"gave the score tensor\(1\.\): .*`\.item\(\)` makes a plain"),
        (lambda prompt, completion: "yes", "gave the score 'yes'"),
    ],
    ids=["hangs", "forgives", "catches all", "exits", "raises", "nan", "huge", "tensor", "text"],
)
def test_a_verifier_that_fails_is_one_sentence(function, message, tmp_path):
    """The alarm of somebody else's, such as that of pytest's own time limit, is as it was."""
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ValueError, match=message) as error:
        judged(tmp_path, Verifier(function, seconds=0.2))
    assert "\n" not in str(error.value)
    assert signal.getsignal(signal.SIGALRM) == before


def test_no_opinion_is_in_no_pair(tmp_path):
    assert judged(tmp_path, Verifier(lambda prompt, text: None if len(text) == 3 else len(text))) == [("22", "1")] * 2
    record = json.loads((tmp_path / "step" / "round.json").read_text())
    assert (record["no_opinion"], record["pairs"], record["mixed"]) == (2, 2, 1.0)


# -- a command --------------------------------------------------------------------------------------------------------

JUDGE = """
import json, os, pathlib, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    {}
    print(len(asked["completion"]), flush=True)
"""


def program(folder, code="pass"):
    (folder / "judge.py").write_text(JUDGE.format(code))
    return f"{sys.executable} -S {folder / 'judge.py'}"


def test_a_command_judges_line_by_line(tmp_path):
    """What looks like a command in a completion or behind the program is data: a shell would make the decoy."""
    decoy = tmp_path / "decoy"
    texts = ("1", f"$(touch {decoy})", f"`touch {decoy}`\n; touch {decoy}")
    judge = Command(f"{program(tmp_path)} ; touch {decoy}")
    assert judged(tmp_path, judge, texts) == [(texts[2], "1")] * 2
    assert not decoy.exists()


def test_a_command_that_dies_once_is_started_again(tmp_path):
    code = f"mark = pathlib.Path({str(tmp_path / 'mark')!r}); mark.exists() or (mark.touch(), os._exit(3))"
    assert judged(tmp_path, Command(program(tmp_path, code))) == [("333", "1")] * 2
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    with pytest.raises(ValueError, match="ended with status 3 before it gave its score"):
        judged(tmp_path / "again", Command(program(tmp_path, code), restarts=0))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("asked['prompt'] == '6=' and os._exit(4)", "ended with status 4 before it gave its score"),
        ("asked['prompt'] == '6=' and time.sleep(60)", "took more than 1 seconds"),
        ("asked['prompt'] == '6=' and print('good', flush=True)", "wrote (more than one line|'good', which is no)"),
        ("asked['prompt'] == '6=' and print('NaN', flush=True)", "wrote more than one line|the score nan"),
        ("if asked['prompt'] == '6=': print('[' * 60000, flush=True); continue", "which is no score"),
        ("if asked['prompt'] == '6=': print(10**400, flush=True); continue", "the score 1000.*finite number"),
    ],
    ids=["dies", "hangs", "text", "nan", "nested", "huge"],
)
def test_a_command_that_fails_is_one_sentence_and_loses_nothing(code, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        judged(tmp_path, Command(program(tmp_path, code), seconds=1.0, restarts=0))
    assert "\n" not in str(error.value)
    assert lines(tmp_path / "step" / "scores.0.jsonl") == [[0, [1.0, 2.0, 3.0]]]


def test_nothing_of_a_command_is_left_when_it_is_closed(tmp_path):
    judge = Command(program(tmp_path))
    assert judge.score(["1="], ["12"]) == [2]
    started = [judge._process, judge._guard]
    assert [process.poll() for process in started] == [None, None]
    judge.close()
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2
    judge.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to see processes by")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_hangs_ends_with_the_run(number, tmp_path):
    """With what it has started, however the run ends; another program of the same user does not."""
    code = (
        f"import subprocess; child = subprocess.Popen(['sleep', '300']); "
        f"pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{child.pid}}.'); time.sleep(300)"
    )
    asking = f"from lit_dpo import Command; Command({program(tmp_path, code)!r}, seconds=300.0).score(['1='], ['1'])"
    decoy = subprocess.Popen(["sleep", "300"], start_new_session=True)
    asker = subprocess.Popen([sys.executable, "-c", asking], cwd=ROOT)
    try:
        while not ((pids := tmp_path / "pids").exists() and pids.read_text().endswith(".")):
            assert asker.poll() is None
            time.sleep(0.05)
        asker.send_signal(number)
        assert asker.wait(10) == -number
        hanging = [Path(f"/proc/{pid}/stat") for pid in pids.read_text().rstrip(".").split()]
        end = time.monotonic() + 20
        while any(_runs(path) for path in hanging) and time.monotonic() < end:
            time.sleep(0.05)
        assert [path for path in hanging if _runs(path)] == []
        assert decoy.poll() is None
    finally:
        for process in (asker, decoy):
            process.kill()
            process.wait()


def _runs(stat):
    try:
        return stat.read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes while it is read
        return False


def test_the_identity_of_a_command_has_the_content_of_its_files(tmp_path):
    """Code of any length may stand in the command itself, where no file can have such a name."""
    program(tmp_path)
    command = Command(f"python {tmp_path / 'judge.py'} '{'#' * 5000}'")
    before = command.identity()
    assert set(before["files"]) == {str(tmp_path / "judge.py")}
    program(tmp_path, "1")
    assert command.identity() != before


def test_a_command_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be started .*: name another program"):
        judged(tmp_path, Command(str(tmp_path / "missing")))
    with pytest.raises(ValueError, match="quote it as for a shell"):
        Command("judge 'it")


# -- a reward model ---------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_what_its_own_template_renders(tmp_path):
    """The oracle: one rendered completion at a time, with nothing else in the batch."""
    tokenizer = quickstart_tokenizer()
    torch.manual_seed(3)
    options = {name: value for name, value in runs.LLAMA.items() if name != "model_type"}
    model = LlamaForSequenceClassification(
        LlamaConfig(**options, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    ).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    asked = [("Tea?", "Yes."), ("Tea?", "No, not at all."), ([{"role": "user", "content": "Rain?"}], "Soon.")]
    judge = RewardModel(str(tmp_path / "reward"), batch_size=2)
    found = judge.score([prompt for prompt, _ in asked], [text for _, text in asked])
    for score, (prompt, text) in zip(found, asked, strict=True):
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = model.score(model.model(ids).last_hidden_state[0, -1]).item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len({*found}) == 3
    before = judge.identity()
    with torch.no_grad():
        model.score.weight += 1
    model.save_pretrained(tmp_path / "reward")
    assert RewardModel(str(tmp_path / "reward")).identity() != before


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path):
    """A language model has no head for scores; random ones must not stand in for it."""
    load_model({**runs.LLAMA}, quickstart_tokenizer()).save_pretrained(tmp_path / "model")
    quickstart_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lacks weights that its configuration asks for|has 2 outputs"):
        judged(tmp_path, RewardModel(str(tmp_path / "model")))


# -- pickers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picker", "scores", "expected"),
    [
        (RightVsWrong(), [0, 1, 0, 1], [(1, 0)]),
        (RightVsWrong(most=5), [0, 1, 0, 1, 1], [(1, 0), (3, 2)]),
        (RightVsWrong(threshold=2), [2, 3], [(1, 0)]),
        (RightVsWrong(), [1, 1], "all right"),
        (RightVsWrong(), [0, 0], "all wrong"),
        (RightVsWrong(), [], "no completion"),
        (BestVsWorst(), [2, 5, 1, 5], [(1, 2)]),
        (BestVsWorst(gap=4), [2, 5, 1], "gap too small"),
        (BestVsWorst(floor=6), [2, 5, 1], "best below the floor"),
        (BestVsWorst(), [2], "fewer than two completions"),
        (AllPairs(gap=1), [2, 5, 1], [(1, 2), (1, 0)]),
        (AllPairs(most=1), [2, 5, 1], [(1, 2)]),
        (AllPairs(), [2, 2], "gap too small"),
    ],
    ids=str,
)
def test_a_picker_pairs_by_its_rule(picker, scores, expected):
    """Pairs as places in the list."""
    candidates = [Candidate(f"text {n}", float(score)) for n, score in enumerate(scores)]
    found = picker.pick(candidates)
    places = [(candidates.index(a), candidates.index(b)) for a, b in found] if isinstance(found, list) else found
    assert places == expected


def test_the_chosen_answer_of_the_data_is_judged_and_filtered(tmp_path):
    """Answers of 2, 4 and 1 signs against samples of 1, 2 and 3: the longest wins, and a sample that wins drops all."""
    rows = [{"prompt": f"{n}=", "chosen": text, "rejected": "-"} for n, text in enumerate(("xx", "xxxx", "x"))]
    file = runs.write(tmp_path / "pairs.jsonl", rows)
    judge = Verifier(lambda prompt, text: len(text))
    found = OnPolicy(file, judge, ChosenVsSample(gap=1, most=9), samples=3).next(0, Talking(tmp_path / "step"))
    assert [tuple(row.values()) for row in found] == [("1=", "xxxx", "1"), ("1=", "xxxx", "22")]
    record = json.loads((tmp_path / "step" / "round.json").read_text())
    assert record["without_pair"] == {"a sample beats the chosen answer": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: RightVsWrong(most=0), lambda: BestVsWorst(gap=-1), lambda: AllPairs(gap=float("nan")),
        lambda: Verifier(is_right, seconds=0), lambda: Command(""), lambda: Command("x", restarts=-1),
        lambda: RewardModel("x", batch_size=0), lambda: OnPolicy("x", Verifier(is_right), rounds=0),
        lambda: OnPolicy("x", Verifier(is_right), temperature=0), lambda: OnPolicy("x", Verifier(is_right), samples=0),
    ],
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused(make):
    with pytest.raises(ValueError, match=r"`?\w+`? (of a round )?(must|is)"):
        make()


# -- the command line -------------------------------------------------------------------------------------------------


def online(folder, *more):
    """The shipped configuration with a model made on the spot, two rounds of five prompts."""
    signs().save_pretrained(folder / "signs")
    prompts_file(folder)
    (folder / "my_verifier.py").write_text("def is_right(prompt, completion):\n    return '7' not in completion\n")
    runs.write(folder / "pairs.jsonl", [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in range(8)])
    words = ["fit", "--config", str(ROOT / "configs" / "online.yaml"), "--model.model", json.dumps(DESCRIPTION)]
    words += ["--model.tokenizer", str(folder / "signs"), "--model.optimizer.lr", "1e-2"]
    words += ["--data.validation", "pairs.jsonl", "--data.max_length", "32", "--data.batch_size", "2"]
    words += ["--data.partition.prompts_per_round", "5", "--data.partition.max_new_tokens", "20"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.enable_model_summary", "false", "--trainer.max_epochs", "1"]
    return [*words, *map(str, more)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_verifier", None)
    yield tmp_path
    sys.modules.pop("my_verifier", None)


def test_the_shipped_configuration_runs_end_to_end(here):
    words = online(here, "--allow-import", "my_verifier")
    main(words)
    run = here / "runs" / "online" / "version_0"
    for number in (0, 1):
        rows = lines(run / f"partition_{number}" / "pairs.jsonl")
        assert rows
        assert all("7" not in row["chosen"] and "7" in row["rejected"] for row in rows)
        assert (run / f"partition_{number}" / "export" / "config.json").exists()
    assert not (run / "partition_2").exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("pairs.jsonl")}
    main([*words, "--ckpt_path", "last"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("pairs.jsonl")} == before


def refused(words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(words)
    return capsys.readouterr().err


def test_nothing_is_executed_that_the_command_line_has_not_permitted(here, capsys):
    """A command of the configuration's would make the decoy."""
    assert "add `--allow-import my_verifier`" in refused(online(here), capsys)
    known = ["--data.partition.judge.function", "torch.optim.swa_utils.update_bn"]
    assert "error: `torch.optim.swa_utils.update_bn` may not be a verifier" in refused(
        online(here, "--allow-import", "my_verifier", *known), capsys
    )
    decoy = here / "decoy"
    judge = {"class_path": "Command", "init_args": {"command": f"touch {decoy}"}}
    words = online(here, "--data.partition.judge", json.dumps(judge))
    assert f"error: `touch {decoy}` may not judge" in refused([*words, "--allow-import", "my_verifier"], capsys)
    assert not decoy.exists()
    assert not (here / "runs").exists()
    said = refused([*words, "--allow-command"], capsys)
    assert "ended with status 0 before it gave its score" in said
    assert re.search(
        r"What was done of the step is kept. To go on: lit-dpo fit .* --allow-command --ckpt_path last", said
    )
    assert decoy.exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    notes = Path(sys.argv[2])
    if not sys.argv[3:]:
        train(Path(sys.argv[1]), Noting(notes, PROMPTS[3], "kill"))
    train(Path(sys.argv[1]), Noting(notes), processes={"strategy": sys.argv[3], "devices": 2})
    runs.leave()
