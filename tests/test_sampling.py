"""A completion depends on model, prompt, occurrence, number of the sample, round and seed, and on nothing else."""

import json
import random
from collections import Counter

import pytest
import torch

from lit_dpo import LoRA
from lit_dpo.data.prompts import prompt_ids, read_prompts
from lit_dpo.data.rows import RowError
from lit_dpo.sampling import Completion, Sampler, repetition
from lit_dpo.scoring.score import score
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs
from tests.models import tiny_model
from tests.test_scoring import BATCH

pytestmark = runs.QUIET


class Tokenizer:
    """As much of one as sampling asks for."""

    eos_token_id = 1

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (True, False)
        return " ".join(map(str, ids))


def some_prompts(count, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, 50) for _ in range(draw.randrange(1, 20))] for _ in range(count)]


def ids(found):
    return [[completion.ids for completion in completions] for completions in found]


def step_by_step(model, prompt, tokens, pick):
    """The oracle: one forward pass over the whole sequence a token, no cache, no padding, no `generate`."""
    line = list(prompt)
    with torch.no_grad():
        while len(line) < len(prompt) + tokens and (len(line) == len(prompt) or line[-1] != 1):
            line.append(pick(model(torch.tensor([line]), use_cache=False).logits[0, -1]))
    return tuple(line[len(prompt) :])


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"samples": 2, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_the_batch_size_changes_nothing(name, options):
    model, prompts = tiny_model(name), some_prompts(10)
    alone = list(Sampler(**options, max_new_tokens=8, rows=1)(model, Tokenizer(), prompts))
    assert alone == list(Sampler(**options, max_new_tokens=8, rows=16)(model, Tokenizer(), prompts))
    assert len({completion.ids for found in alone for completion in found}) > 5


def test_greedy_takes_the_most_likely_token_until_the_end():
    model, prompts = tiny_model("llama"), some_prompts(12, seed=1)
    found = [one for [one] in Sampler(temperature=0.0, max_new_tokens=30)(model, Tokenizer(), prompts)]
    expected = [step_by_step(model, prompt, 30, lambda logits: int(logits.argmax())) for prompt in prompts]
    assert [one.ids for one in found] == expected
    assert [one.finished for one in found] == [line[-1] == 1 for line in expected]
    assert {one.finished for one in found} == {True, False}


def test_tokens_are_drawn_with_their_probabilities():
    """Frequencies of the first token against the model's own, by the chi-square statistic."""
    model, prompt, count = tiny_model("llama"), [5, 6, 7], 4000
    [found] = Sampler(count, 0.7, max_new_tokens=1, rows=1000)(model, Tokenizer(), [prompt])
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1) * count
    seen = Counter(completion.ids[0] for completion in found)
    common = [token for token in range(50) if expected[token] > 5]
    statistic = sum((seen[token] - float(expected[token])) ** 2 / float(expected[token]) for token in common)
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5
    assert len(common) > 5


def test_top_p_draws_among_the_fewest_tokens_that_make_it_up():
    model, prompt = tiny_model("llama"), [5, 6, 7]
    with torch.no_grad():
        ordered = sorted(
            enumerate(model(torch.tensor([prompt])).logits[0, -1].softmax(-1).tolist()), key=lambda x: -x[1]
        )
    allowed, total = set(), 0.0
    for token, probability in ordered:
        if total >= 0.6:
            break
        allowed.add(token)
        total += probability
    [found] = Sampler(600, top_p=0.6, max_new_tokens=1, rows=600)(model, Tokenizer(), [prompt])
    assert {completion.ids[0] for completion in found} == allowed


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (4, 1.0), (12, 0.5), (10_000, 1.0)])
def test_top_k_draws_among_the_most_likely_tokens_and_top_p_among_these(top_k, top_p):
    """Which tokens come, and how often by the chi-square statistic; the oracle renormalizes by plain loops."""
    model, prompt, count = tiny_model("llama"), [5, 6, 7], 2000
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).tolist()
    best = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:top_k]
    total, kept = sum(probabilities[token] for token in best), {}
    for token in best:
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probabilities[token] / total
    expected = {token: value / sum(kept.values()) * count for token, value in kept.items()}
    sampler = Sampler(count, 0.7, top_p, max_new_tokens=1, rows=1000, top_k=top_k)
    seen = Counter(one.ids[0] for one in next(sampler(model, Tokenizer(), [prompt])))
    assert seen.keys() <= expected.keys()
    common = [token for token, number in expected.items() if number > 5]
    statistic = sum((seen[token] - expected[token]) ** 2 / expected[token] for token in common)
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5
    assert min(top_k, 2) <= len(common) <= top_k


def test_names_decide_the_random_numbers_in_the_place_of_prompts():
    model, prompts = tiny_model("llama"), [[5, 6, 7], [5, 6, 7], [8, 9]]
    sampler = Sampler(max_new_tokens=12, rows=2)
    first, second, third = sampler(model, Tokenizer(), prompts, [b"a", b"b", b"c"])
    assert first != second
    assert list(sampler(model, Tokenizer(), prompts[::-1], [b"c", b"b", b"a"])) == [third, second, first]


def test_occurrence_sample_round_and_seed_each_draw_anew():
    model, prompt = tiny_model("llama"), [5, 6, 7]
    options = {"samples": 2, "max_new_tokens": 12}
    first, second = Sampler(**options)(model, Tokenizer(), [prompt, prompt])
    anew = (Sampler(**options, round=1), Sampler(**options, seed=1))
    others = [next(sampler(model, Tokenizer(), [prompt])) for sampler in anew]
    assert len({completion.ids for found in (first, second, *others) for completion in found}) == 8
    again = list(Sampler(**options)(model, Tokenizer(), [[9, 9], prompt, [8], prompt]))
    assert [again[1], again[3]] == [first, second]  # other prompts change nothing


def test_prompts_are_taken_as_they_are_needed():
    taken = 0

    def prompts():
        nonlocal taken
        for taken in range(1, 100_001):  # noqa: B007
            yield [5, 6]

    sampling = Sampler(max_new_tokens=1, rows=4)(tiny_model("llama"), Tokenizer(), prompts())
    next(sampling)
    assert taken <= 64


def test_the_model_is_left_as_it_was():
    """Scores, mode, own settings of generation and the global random state."""
    model = LoRA(rank=2).attach(tiny_model("llama"))
    model.train()
    model.get_base_model().generation_config.repetition_penalty = 1.5
    before, state = score(model, BATCH).chosen, torch.get_rng_state()
    penalized = list(Sampler(max_new_tokens=8)(model, Tokenizer(), [[5, 6, 5, 6]]))
    assert model.training
    assert model.get_base_model().generation_config.repetition_penalty == 1.5
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(score(model, BATCH).chosen, before)
    model.get_base_model().generation_config.repetition_penalty = None
    assert penalized == list(Sampler(max_new_tokens=8)(model, Tokenizer(), [[5, 6, 5, 6]]))  # it counts for nothing


def test_what_cannot_be_sampled_is_refused():
    model = tiny_model("llama")
    for options, match in (
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0"),
        ({"top_p": 0.0}, "`top_p` must be in"),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"temperature": 0.0, "samples": 2}, "`samples` must be 1 at `temperature` 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Sampler(**options)
    with pytest.raises(ValueError, match="at least one token"):
        list(Sampler(max_new_tokens=2)(model, Tokenizer(), [[]]))
    with pytest.raises(ValueError, match="A prompt of 60 tokens and 8 new ones exceed the 64 positions"):
        list(Sampler(max_new_tokens=8)(model, Tokenizer(), [[5] * 60]))


def test_a_file_of_prompts_in_another_encoding_is_one_sentence(tmp_path):
    """With the mark that some programs put before UTF-8, and in Latin-1."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffgrößer als\n\nweiter\n".encode())
    assert [prompt.content for prompt in read_prompts(str(file))] == ["größer als", "weiter"]
    file.write_bytes("größer als\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`.*prompts\.txt` is not UTF-8 .*: save it in that encoding\."):
        list(read_prompts(str(file)))


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)  # 9 four-grams, 4 of them different
    assert Completion((1,), "a", True) == Completion((1,), "a", True)


def test_prompts_are_those_of_training(tmp_path):
    """Of pairs, of rows with a prompt alone and of lines; by the oracle of the data's own encoder."""
    tokenizer = quickstart_tokenizer()
    messages = [{"role": "user", "content": "Hello there"}]
    rows = [
        {"prompt": "Say it:", "chosen": " yes", "rejected": " no"},
        {"prompt": "Say it: <|im_end|>"},
        {"prompt": messages},
        {
            "chosen": [*messages, {"role": "assistant", "content": "x"}],
            "rejected": [*messages, {"role": "assistant", "content": "y"}],
        },
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [prompt_ids(tokenizer, prompt) for prompt in read_prompts(str(path))]
    rendered = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    plain = tokenizer("Say it:").input_ids
    assert found[0] == plain
    assert tokenizer.eos_token_id not in found[1]  # text that spells a token stays text
    assert found[2] == found[3] == tokenizer(rendered, add_special_tokens=False).input_ids
    (tmp_path / "p.txt").write_text("Hello there\n\n  Say it:\n")
    lines = list(read_prompts(str(tmp_path / "p.txt")))
    assert [line.row.rpartition(":")[2] for line in lines] == ["1", "3"]
    assert prompt_ids(tokenizer, lines[0]) == found[2]
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, lines[1]) == plain
    with pytest.raises(ValueError, match="no chat template for prompts in messages"):
        prompt_ids(tokenizer, next(iter(list(read_prompts(str(path)))[2:])))
    several = {"prompt": "Say it:", "chosen": ["yes"], "rejected": ["no", "never"]}  # of which no pair can be made
    path.write_text(json.dumps(several) + "\n")
    assert prompt_ids(tokenizer, next(read_prompts(str(path)))) == plain
    path.write_text(json.dumps({"question": "What?"}) + "\n")
    with pytest.raises(RowError, match="the row has no prompt"):
        list(read_prompts(str(path)))
    with pytest.raises(FileNotFoundError, match="there is no such file of prompts"):
        list(read_prompts(str(tmp_path / "none.txt")))
