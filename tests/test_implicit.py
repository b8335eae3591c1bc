"""The implicit reward as a judge: what a policy prefers to its reference, and only where it is asked for."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo import ImplicitReward
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.test_rounds import here, lines, online, refused, signs  # noqa: F401 - a fixture

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
SIGNS = 12  # 0 to 9, "=", and the end


def saying(folder, probabilities):
    """A model that says each sign with a fixed probability, whatever stands before it."""
    model = load_model(
        {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 64}, signs()
    ).requires_grad_(False)
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # so that logits are the first column
    model.lm_head.weight[:, 0] = torch.tensor([math.log(probabilities[sign]) for sign in range(SIGNS)])
    model.save_pretrained(folder)
    signs().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def models(tmp_path):
    """A policy that says 7 half of the time, and a reference to which all signs are alike."""
    seven = signs().convert_tokens_to_ids("7")
    often = {sign: 0.5 if sign == seven else 0.5 / 11 for sign in range(SIGNS)}
    return saying(tmp_path / "policy", often), saying(tmp_path / "reference", dict.fromkeys(range(SIGNS), 1 / SIGNS))


def test_the_score_is_that_of_a_calculation_by_hand(models):
    """A 7 is 6 times as likely as to the reference, and every other sign, the end too, 12/22 times."""
    seven, other = math.log(6), math.log(12 / 22)
    judge = ImplicitReward(*models, beta=0.5, batch_size=2)
    found = judge.score(["5=", "12=", "5=", "3="], ["77", "1", "717", ""])
    assert found == pytest.approx(
        [0.5 * (2 * seven + other), 0.5 * 2 * other, 0.5 * (2 * seven + 2 * other), 0.5 * other], abs=1e-5
    )
    assert judge.score(["5="], ["77"]) == pytest.approx(found[:1], abs=1e-5)


def test_messages_are_scored_behind_the_template(tmp_path):
    """The oracle: sums over the tokens behind the generation prompt, one sequence at a time."""
    folders, tokenizer = [str(tmp_path / name) for name in "ab"], quickstart_tokenizer()
    for seed, folder in enumerate(folders):
        load_model(runs.LLAMA, tokenizer, seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    turns = [{"role": "user", "content": "Tea?"}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = [*turns, {"role": "assistant", "content": "Yes."}]
    whole = tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]
    whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    sums = []
    for folder in folders:
        with torch.no_grad():
            logps = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(logps[place - 1, whole[place]].item() for place in range(len(start), len(whole))))
    [score] = ImplicitReward(*folders).score([turns], ["Yes."])
    assert score == pytest.approx(0.1 * (sums[0] - sums[1]), abs=1e-5)


@pytest.mark.slow
def test_the_policy_that_starts_the_round_judges_from_the_command_line(here, models):  # noqa: F811
    """In both rounds; the second one's policy is what the first one exported. The oracle runs each text alone."""
    words = online(here, "--allow-import", "my_verifier", "--data.partition.picker", "BestVsWorst")
    words += ["--data.partition.judge", "ImplicitReward", "--data.partition.judge.beta", "0.2"]
    words += ["--data.partition.judge.reference", models[1]]
    main(words)
    run = here / "runs" / "online" / "version_0"
    starts = load_model(json.loads(words[words.index("--model.model") + 1]), signs()), run / "partition_0" / "export"
    for number, start in enumerate(starts):
        policy = AutoModelForCausalLM.from_pretrained(start) if number else start
        root, prompts = run / f"partition_{number}", [json.loads(line)["prompt"] for line in
                                                      (here / "prompts.jsonl").read_text().splitlines()]  # fmt: skip
        prompts = list(dict.fromkeys(prompts))
        said, scores = dict(lines(root / "completions.0.jsonl")), dict(lines(root / "scores.0.jsonl"))
        assert len(scores) == 5
        for place, given in scores.items():
            before = signs()(prompts[(5 * number + place) % len(prompts)]).input_ids
            texts = list(dict.fromkeys(one["text"] for one in said[place] if one["finished"] and one["text"]))
            for text, score in zip(texts, given, strict=True):
                ids = [*before, *signs()(text).input_ids, 0]
                with torch.no_grad():
                    logps = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
                total = sum(logps[n - 1, ids[n]].item() + math.log(SIGNS) for n in range(len(before), len(ids)))
                assert score == pytest.approx(0.2 * total, abs=1e-4)
    assert lines(run / "partition_1" / "pairs.jsonl")


def test_what_it_cannot_judge_is_one_sentence(here, models, capsys):  # noqa: F811
    words = online(here, "--allow-import", "my_verifier", "--data.partition.judge", "ImplicitReward")
    assert "the implicit reward of every completion 0: name another `model`" in refused(words, capsys)
    with pytest.raises(ValueError, match="Outside of rounds `ImplicitReward` needs both") as error:
        ImplicitReward(models[0]).score(["5="], ["7"])
    assert "\n" not in str(error.value)
    quickstart_tokenizer().save_pretrained(models[1])
    with pytest.raises(ValueError, match="has another tokenizer than"):
        ImplicitReward(*models).score(["5="], ["7"])
    for options in ({"beta": 0}, {"beta": float("inf")}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"`\w+` must be"):
            ImplicitReward(*models, **options)


def test_other_weights_are_another_judge(models):
    before = ImplicitReward(*models).identity()
    assert ImplicitReward(*models).identity() == before
    assert ImplicitReward(*models, beta=0.2).identity() != before
    saying(models[0], dict.fromkeys(range(SIGNS), 1 / SIGNS))
    assert ImplicitReward(*models).identity() != before
