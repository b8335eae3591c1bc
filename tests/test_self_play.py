"""Self-play: answers cut, gone on with by the policy, put together again, and trained on against themselves."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from lit_dpo import DPOLoss, Pool, SelfPlay, SyncedReference
from lit_dpo.cli import main
from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.rows import RowError, parse_row
from lit_dpo.models import load_model
from lit_dpo.rounds import base
from lit_dpo.rounds.journal import Lines
from lit_dpo.sampling import Completion
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.test_rounds import DESCRIPTION, PROMPTS, ROOT, lines, signs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
SEGMENT = 4


def answers(count=9):
    """Answers of 1 to 12 digits, without a rejected side."""
    draw = random.Random(3)
    return [
        {"prompt": f"{n}=", "completion": "".join(draw.choices("0123456789", k=draw.randint(1, 12)))}
        for n in range(count)
    ]


def train(folder, resume=False, batch_size=512, **options):
    """Two rounds of five rows, most likely tokens alone unless told otherwise."""
    reference = SyncedReference(every=1, mix=0.5)
    module = runs.module(DESCRIPTION, tokenizer=signs(), loss=DPOLoss(0.1), reference=reference, lr=0.1)
    options = {"rounds": 2, "prompts_per_round": 5, "segment_tokens": SEGMENT, "top_k": 1, "buffer": 5, **options}
    file = runs.write(folder.parent / "answers.jsonl", answers())
    partition = SelfPlay(file, batch_size=batch_size, **options)
    other = [{"prompt": "1=", "chosen": "1", "rejected": "2"}, {"prompt": "2=", "chosen": "1", "rejected": "2"}]
    data = runs.data(other, partition=partition, batch_size=2, validation=other, max_length=32)
    fit_stepwise(module, data, lambda root: runs.trainer(root, max_epochs=1), folder, resume=resume)
    return [folder / "partition_0", folder / "partition_1"]


def greedy(model, ids):
    """The oracle's segment: the most likely tokens, one forward pass over the whole sequence each."""
    line = [*ids]
    with torch.no_grad():
        while len(line) < len(ids) + SEGMENT and (len(line) == len(ids) or line[-1] != 0):
            line.append(int(model(torch.tensor([line]), use_cache=False).logits[0, -1].argmax()))
    return line[len(ids) :]


def test_a_round_is_what_the_policy_that_starts_it_writes(tmp_path):
    """Every pair is a cut answer with the most likely segment; what makes none has a reason that the oracle sees."""
    roots = train(tmp_path / "run")
    starts = [load_model(DESCRIPTION, signs()), AutoModelForCausalLM.from_pretrained(roots[0] / "export")]
    kept = []
    for number, (root, model) in enumerate(zip(roots, starts, strict=True)):
        taken = [answers()[(5 * number + n) % 9] for n in range(5)]
        record = json.loads((root / "round.json").read_text())
        pairs = {row["prompt"]: row for row in lines(root / "pairs.jsonl")[-record["pairs"] :]}
        reasons = Counter()
        for row in taken:
            prompt, answer = row["prompt"], row["completion"]
            found = {}
            for place in range(len(answer) - SEGMENT) or [0]:
                ids = greedy(model, signs()(prompt + answer[:place]).input_ids)
                ended, rest = ids[-1] == 0, answer[place + SEGMENT :]
                written = answer[:place] + signs().decode(ids, skip_special_tokens=True) + ("" if ended else rest)
                reason = "no end" if not ended and not rest else "the policy says the same" if written == answer else ""
                found[written] = reason or ("" if written else "empty")
            if prompt in pairs:
                assert pairs[prompt]["chosen"] == answer
                assert found[pairs[prompt]["rejected"]] == ""
                kept.append(pairs[prompt])
            else:
                reasons[next(filter(None, found.values()))] += 1
        assert lines(root / "pairs.jsonl") == kept[-5:]
        assert record["without_pair"] == dict(reasons)
        assert (record["prompts"], record["completions"]) == (5, 5)
    assert len(kept) > 5


# -- the cut, without a model -----------------------------------------------------------------------------------------


class Writing(Pool):
    """A pool whose policy writes what a function says, given the opening; it notes what it is asked."""

    def __init__(self, folder, write, tokenizer=None, fails_at=None, **options):
        self.asked = []
        tokenizer = tokenizer or signs()
        options = {"max_length": 64, **options}

        def complete(openings, sampler):
            for number, opening in enumerate(openings):
                if number == fails_at:
                    raise KeyboardInterrupt
                self.asked.append(opening)
                text, ended = write(opening)
                yield [Completion((1,), text, ended)]

        super().__init__(["a"], folder, complete=complete, encoder=lambda: PairEncoder(tokenizer, **options))


def rounds(folder, rows, write=lambda opening: ("7", True), tokenizer=None, step=0, **options):
    """The rows that the pairs come to, and what the policy was asked to go on with."""
    folder.mkdir(exist_ok=True)
    file = runs.write(folder / "answers.jsonl", rows)
    pool = Writing(folder / f"partition_{step}", write, tokenizer)
    return SelfPlay(file, rounds=step + 1, **options).make(step, pool), pool.asked


def test_places_are_drawn_alike_and_depend_on_row_round_and_seed_alone(tmp_path):
    rows = [{"prompt": f"{n}=", "completion": "0123456789"} for n in range(150)]
    cuts = {}
    for name, some, step, seed in (
        ("first", rows, 0, 0), ("again", rows[50:] + rows[:50], 0, 0), ("round", rows, 1, 0), ("seed", rows, 0, 1),
    ):  # fmt: skip
        _, asked = rounds(tmp_path / name, some, step=step, seed=seed, segment_tokens=4)
        cuts[name] = {signs().decode(one.ids).split("=")[0]: len(one.said) for one in asked}
        assert all(one.rest == "0123456789"[len(one.said) + 4 :] for one in asked)
    assert cuts["first"] == cuts["again"]
    for name in ("first", "round", "seed"):
        counts = Counter(cuts[name].values())
        assert counts.keys() == {*range(6)}
        assert sum((count - 25) ** 2 / 25 for count in counts.values()) < 20.5  # 1 in 1000
        assert sum(cuts[name][n] == cuts["first"][n] for n in cuts["first"]) < 45 or name == "first"


CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sing \N{MUSICAL SYMBOL G CLEF}!"}]
SUNG = " Gladly: naïve letters \N{GRINNING FACE} 日本 and so on. "


@pytest.mark.parametrize("form", ["text", "messages", "healed"])
@pytest.mark.parametrize("ended", [False, True], ids=["reattached", "ended"])
def test_a_row_that_is_put_together_again_is_sound(form, ended, tmp_path):
    """With tokens that are parts of characters; at many places, since each round has another."""
    tokenizer = quickstart_tokenizer()
    row = {"prompt": CHAT, "completion": [{"role": "assistant", "content": SUNG}]}
    if form != "messages":
        row = {
            "prompt": "Sing: " if form == "healed" else "Sing:",
            "completion": SUNG.lstrip() if form == "healed" else SUNG,
        }
    answer = SUNG.lstrip() if form == "healed" else SUNG
    encoder, places = PairEncoder(tokenizer, 128), set()
    for step in range(12):
        made, [opening] = rounds(
            tmp_path / str(step), [row], lambda _: ("<new>\ufffd", ended), tokenizer, step, segment_tokens=3
        )
        [new], _ = made
        pair = parse_row(new, "a", "b")
        text = pair.rejected if form != "messages" else pair.rejected[0]["content"]
        assert text == opening.said + ("<new>\ufffd" if ended else "<new>" + opening.rest)
        assert answer.startswith(opening.said)
        assert answer.endswith(opening.rest)
        encoded = encoder(pair)
        whole = encoded.prompt + encoded.chosen
        assert whole[: len(opening.ids)] == [*opening.ids]  # those of the training row
        assert tokenizer.decode(encoded.prompt + encoded.rejected).count(text.strip()) == 1
        places.add(opening.said)
    assert len(places) > 4


def test_tools_and_variables_of_the_template_stay_with_the_row(tmp_path):
    tokenizer = quickstart_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | length }} tools {{ mood }}\n{% endif %}" + tokenizer.chat_template
    )
    row = {"messages": [*CHAT, {"role": "assistant", "content": SUNG}]}
    row |= {"tools": [{"type": "function", "function": {"name": "hum"}}], "chat_template_kwargs": {"mood": "merry"}}
    ([new], _), [opening] = rounds(tmp_path, [row], tokenizer=tokenizer, segment_tokens=3)
    assert {name: new[name] for name in ("tools", "chat_template_kwargs")} == {
        name: row[name] for name in ("tools", "chat_template_kwargs")
    }
    assert tokenizer.decode(opening.ids).startswith("1 tools merry\n")
    assert new["prompt"] == CHAT


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda opening: ("0123456789"[len(opening.said) :], True), "the policy says the same"),
        (lambda opening: ("0123456789"[len(opening.said) : len(opening.said) + 10], False), "no end"),
        (lambda opening: (" ", True), "empty"),
    ],
    ids=["same", "no end", "empty"],
)
def test_what_makes_no_pair_is_counted(write, reason, tmp_path):
    row = {"prompt": "1=", "completion": "0123456789"}
    (made, record), asked = rounds(tmp_path, [row], write, segment_tokens=10)
    assert list(made) == []
    assert record["without_pair"] == {reason: 1}
    assert len(asked) == 1


def test_a_row_without_room_is_counted_and_not_asked_for(tmp_path):
    rows = [{"prompt": "1" * length + "=", "completion": "0123456789"} for length in (40, 60)]
    (made, record), asked = rounds(tmp_path, rows, segment_tokens=20)
    assert [row["prompt"] for row in made] == [rows[0]["prompt"]]
    assert record["without_pair"] == {"`max_length` leaves no room for a segment": 1}
    assert [one.said for one in asked] == [""]


def test_answers_come_from_pairs_and_from_supervised_rows(tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you."}]
    rows = [
        {"prompt": "Say:", "chosen": " good day", "rejected": " no"},
        {"prompt": "Say:", "completion": " good day"},  # the same once more
        {"prompt": "Say:", "chosen": " good night"},
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good morning to you."}]},
        {"prompt": turns[:1], "completion": [{"role": "assistant", "content": "Good evening to you."}]},
    ]
    (made, _), _ = rounds(tmp_path, rows, tokenizer=quickstart_tokenizer(), segment_tokens=2)
    said = [row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][0]["content"] for row in made]
    assert said == [" good day", " good night", "Good day to you.", "Good morning to you.", "Good evening to you."]
    assert made[2]["prompt"] == made[4]["prompt"] == turns[:1]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "Say:"}, "the row has no answer; add the column `completion`"),
        ({"prompt": "Say:", "completion": " "}, "the completion is empty"),
        ({"prompt": "Say:", "completion": " yes", "label": False}, "label would be left out"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "no answer; .* end with the assistant's"),
    ],
    ids=["none", "empty", "labelled", "a question alone"],
)
def test_a_row_without_an_answer_is_refused(row, match, tmp_path):
    with pytest.raises(RowError, match=match):
        rounds(tmp_path, [row])


def test_an_option_out_of_its_range_is_refused(tmp_path):
    for options in ({"buffer": 0}, {"segment_tokens": 0}, {"prompts_per_round": 0}, {"top_k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            SelfPlay("x", **options)
    with pytest.raises(ValueError, match="holds 1 different rows, and a round takes 2: give more"):
        rounds(tmp_path, [{"prompt": "1=", "completion": "2"}] * 2, prompts_per_round=2)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_round_goes_on_behind_the_last_answer(tmp_path):
    rows = [{"prompt": f"{n}=", "completion": "0123456789"} for n in range(6)]
    file = runs.write(tmp_path / "answers.jsonl", rows)
    whole = SelfPlay(file, segment_tokens=4).next(
        0, Writing(tmp_path / "whole" / "partition_0", lambda one: ("7", True))
    )
    folder = tmp_path / "cut" / "partition_0"
    with pytest.raises(KeyboardInterrupt):
        SelfPlay(file, segment_tokens=4).next(0, Writing(folder, lambda one: ("7", True), fails_at=4))
    with (folder / "completions.0.jsonl").open("a") as torn:
        torn.write('[4, [{"ids": [1')
    with pytest.raises(ValueError, match="begun with another max_new_tokens"):
        SelfPlay(file, segment_tokens=3).next(0, Writing(folder, lambda one: ("8", True)))
    rest = Writing(folder, lambda one: ("7", True))
    assert SelfPlay(file, segment_tokens=4).next(0, rest)[:] == whole[:]
    assert [signs().decode(one.ids).split("=")[0] for one in rest.asked] == ["4", "5"]


@pytest.mark.slow
def test_a_kill_while_sampling_leaves_the_same_pairs_and_weights(tmp_path):
    """A real process that gets SIGKILL behind the third answer; with another batch size than the undisturbed run."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole" / "run", top_k=None, prompts_per_round=9)
    folder = tmp_path / "cut" / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.test_self_play", str(folder)]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    assert len(lines(folder / "partition_1" / "completions.0.jsonl")) == 3
    assert not (folder / "partition_1" / "pairs.jsonl").exists()
    roots = train(folder, resume=True, batch_size=1, top_k=None, prompts_per_round=9)
    for root, other in zip(roots, whole, strict=True):
        for name in ("pairs.jsonl", "export/model.safetensors"):
            assert (root / name).read_bytes() == (other / name).read_bytes()


# -- the shipped configurations ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shipped(folder, name, *more):
    """The words of a shipped configuration with a model made on the spot."""
    signs().save_pretrained(folder / "signs")
    runs.write(folder / "pairs.jsonl", [{"prompt": f"{n}=", "chosen": "1", "rejected": "2"} for n in range(8)])
    words = ["fit", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--model.model", json.dumps(DESCRIPTION)]
    words += ["--model.tokenizer", str(folder / "signs"), "--model.optimizer.lr", "1e-2"]
    words += ["--data.validation", "pairs.jsonl", "--data.max_length", "32", "--data.batch_size", "2"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.enable_model_summary", "false", "--trainer.max_epochs", "1"]
    return [*words, *map(str, more)]


@pytest.mark.slow
def test_sapo_runs_end_to_end(here):
    runs.write(here / "answers.jsonl", answers())
    options = {"prompts_per_round": 4, "segment_tokens": SEGMENT, "buffer": 6, "rounds": 2}
    main(shipped(here, "sapo", *(f"--data.partition.{name}={value}" for name, value in options.items())))
    run = here / "runs" / "sapo" / "version_0"
    files = [lines(run / f"partition_{n}" / "pairs.jsonl") for n in (0, 1)]
    records = [json.loads((run / f"partition_{n}" / "round.json").read_text()) for n in (0, 1)]
    new = files[1][-records[1]["pairs"] :]
    assert files[1] == [*files[0], *new][-6:]
    assert all(row["chosen"] == {r["prompt"]: r["completion"] for r in answers()}[row["prompt"]] for row in files[1])
    assert (run / "partition_1" / "export" / "config.json").exists()
    assert not (run / "partition_2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iterative_length", "online_reward_model"])
def test_a_reward_model_judges_a_shipped_configuration(name, here):
    """The chosen completion of every pair is one that the reward model scores higher; the oracle scores each alone."""
    torch.manual_seed(1)
    options = {key: value for key, value in DESCRIPTION.items() if key != "model_type"}
    reward = LlamaForSequenceClassification(
        LlamaConfig(**options, vocab_size=len(signs()), num_labels=1, pad_token_id=0)
    ).eval()
    reward.save_pretrained(here / "reward")
    signs().save_pretrained(here / "reward")
    runs.write(here / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    options = {"judge.model": "reward", "prompts_per_round": 3, "max_new_tokens": 20, "rounds": 2, "samples": 4}
    main(shipped(here, name, *(f"--data.partition.{key}={value}" for key, value in options.items())))
    roots = [here / "runs" / name / "version_0" / f"partition_{n}" for n in (0, 1)]
    rows = [row for root in roots for row in lines(root / "pairs.jsonl")]
    for row in rows:
        with torch.no_grad():
            better, worse = (
                reward.score(
                    reward.model(torch.tensor([signs()(row["prompt"] + row[side]).input_ids])).last_hidden_state[0, -1]
                )
                for side in ("chosen", "rejected")
            )
        assert better > worse
    assert len(rows) > 3
    assert (roots[1] / "export" / "config.json").exists()


class Killed(Lines):
    """Lines of the second round, in a process that is gone when it has written three."""

    def append(self, number, value):
        super().append(number, value)
        if self.path.parent.name == "partition_1" and len(self) == 3:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    base.Lines = Killed
    train(Path(sys.argv[1]), batch_size=1, top_k=None, prompts_per_round=9)
