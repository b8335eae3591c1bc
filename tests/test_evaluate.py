"""`lit-dpo evaluate`: accuracy of implicit rewards with intervals that hold what they say."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo.cli import main
from lit_dpo.tokenizers import quickstart_tokenizer, train_tokenizer
from lit_dpo.tools.intervals import share
from tests import runs
from tests.trained import fit, made_once, model_folder, refused  # noqa: F401

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*modules? in eval mode"),
]


def simulated(draw, kind):
    """Values with the accuracy that they are drawn from, and the prompts they belong to."""
    if kind == "apart":
        return (draw.random(300) < 0.7).astype(float), np.arange(300), 0.7
    if kind == "nearly all":
        return (draw.random(200) < 0.97).astype(float), np.arange(200), 0.97
    sizes = draw.integers(1, 9, 60)
    own = draw.beta(2, 1, 60)  # each prompt has an accuracy of its own, 2/3 on average
    prompts = np.repeat(np.arange(60), sizes)
    return (draw.random(len(prompts)) < own[prompts]).astype(float), prompts, 2 / 3


@pytest.mark.parametrize("kind", ["apart", "nearly all", "repeated prompts"])
def test_the_intervals_cover_the_truth(kind):
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        values, prompts, truth = simulated(draw, kind)
        found = share(values, prompts)
        covered += found.low <= truth <= found.high
    assert 90 <= covered <= 98


def test_rows_of_one_prompt_count_together():
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    alone, twice = share(values, np.arange(6)), share(np.repeat(values, 2), np.repeat(np.arange(6), 2))
    assert (alone.low, alone.high) == pytest.approx((twice.low, twice.high))
    wider = share(np.repeat(values, 2), np.arange(12))
    assert wider.high - wider.low < alone.high - alone.low
    assert (share(np.ones(9), np.zeros(9)).low, share(np.ones(9), np.zeros(9)).high) == (
        0,
        1,
    )  # one prompt says nothing


def test_a_preference_of_length_alone_is_one_half():
    longer = np.array([1] * 90 + [0] * 10)
    found = share(longer.astype(float), np.arange(100), longer)
    assert found.value == 0.5
    few = share(np.ones(100), np.arange(100), np.array([1] * 97 + [0] * 3))
    assert few.low < share(np.ones(20), np.arange(20)).low  # the three shorter ones decide half of it


def test_what_tells_the_lengths_apart_makes_no_interval_wider():
    """The yardstick is the normal interval of the mean of two shares that are known."""
    rng, covered, widths = np.random.default_rng(3), 0, []
    longer = np.repeat([1, 0], [87, 67])
    for _ in range(100):
        found = share((rng.random(154) < np.where(longer, 0.95, 0.05)).astype(float), np.arange(154), longer)
        covered += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    known = 2 * 1.96 * math.sqrt(0.95 * 0.05 * (1 / 87 + 1 / 67) / 4)
    assert covered >= 93
    assert known * 0.9 < np.mean(widths) < known * 1.3


def estimates(path):
    [result] = json.loads(path.read_text())
    return result, {estimate["name"]: estimate for estimate in result["estimates"]}


def logp(model, tokenizer, prompt, completion):
    """The oracle: one sequence alone, with the end token."""
    ids = [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    start = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_a_run_is_measured_from_what_it_started_from(made, tmp_path, capsys):
    rows = runs.rows(9, start=100, prompts=5)
    data, output, html = runs.write(tmp_path / "held.jsonl", rows), tmp_path / "e.json", tmp_path / "e.html"
    run = made / "runs" / "version_0"
    main(["evaluate", str(run), "--data", data, "--output", str(output), "--html", str(html), "--batch_size", "4"])
    result, found = estimates(output)
    assert (result["model"], result["reference"]) == (str(run), str(made / "base"))
    tokenizer = quickstart_tokenizer()
    policy, base = (AutoModelForCausalLM.from_pretrained(made / name) for name in ("out", "base"))
    margins = [
        sum(
            sign * (logp(policy, tokenizer, row["prompt"], row[side]) - logp(base, tokenizer, row["prompt"], row[side]))
            for side, sign in (("chosen", 1), ("rejected", -1))
        )
        for row in rows
    ]
    all_pairs = found["all pairs"]
    assert all_pairs["rows"] == 9
    assert all_pairs["prompts"] == 5
    assert all_pairs["margin"] == pytest.approx(sum(margins) / 9, abs=1e-3)
    assert all_pairs["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 9)
    assert all_pairs["low"] < all_pairs["accuracy"] <= all_pairs["high"]
    assert {"chosen is longer", "chosen is shorter", "length-controlled pairs"} & found.keys()
    shown = capsys.readouterr().out
    assert "all pairs" in shown
    assert max(map(len, shown.splitlines())) <= 80 or str(made) in shown
    assert "all pairs" in html.read_text()


def test_length_controlled_is_the_mean_of_both_lengths(made, tmp_path):
    rows = [{"prompt": "Well?", "chosen": " yes" * count, "rejected": " no"} for count in (4, 5, 6)]
    rows.append({"prompt": "Well?", "chosen": " yes", "rejected": " no" * 9})
    data, output = runs.write(tmp_path / "pairs.jsonl", rows), tmp_path / "e.json"
    main(["evaluate", str(made / "base"), "--data", data, "--reference", "none", "--output", str(output)])
    _, found = estimates(output)
    longer, shorter = found["chosen is longer"], found["chosen is shorter"]
    assert (longer["rows"], shorter["rows"]) == (3, 1)
    assert longer["margin"] < 0 < shorter["margin"]
    for name in ("accuracy", "margin"):
        assert found["length-controlled pairs"][name] == pytest.approx((longer[name] + shorter[name]) / 2)


def test_a_model_against_itself_only_ties(made, tmp_path, capsys):
    """A pair that is longer than the model's 256 positions is cut to them, and counted."""
    long = {"prompt": "Long?", "chosen": " yes" * 400, "rejected": " no"}
    data, output = runs.write(tmp_path / "pairs.jsonl", [*runs.rows(24), long]), tmp_path / "e.json"
    base = str(made / "base")
    given = ["evaluate", base, "--data", data, "--reference", base, "--output", str(output)]
    main(given)
    result, found = estimates(output)
    assert "25 kept, 0 skipped, 1 truncated (chosen 1)" in result["account"]
    assert [found["all pairs"][name] for name in ("rows", "accuracy", "ties", "margin")] == [25, 0.5, 1.0, 0.0]
    said = refused([*given, "--max_length", "300", "--overwrite"], capsys)
    assert "exceeds the 256 positions" in said
    assert "`--max_length 256` or less" in said


def test_of_best_of_rows_a_chosen_one_must_be_the_best(made, tmp_path):
    """Rows as RewardBench 2 has them, beside plain pairs, against sums over the completions one by one."""
    replies = ["Gladly!", "Of course.", "no", "Yes: here is all.", "Sure, ask.", "not today"]
    rows = [
        {"id": str(n), "prompt": f"Question {n}?", "chosen": [replies[n % 6]], "subset": ("Math", "Focus")[n % 2],
         "rejected": [replies[(n + k) % 6] for k in (1, 2, 3)], "num_correct": 1}
        for n in range(12)
    ]  # fmt: skip
    best, pairs = runs.write(tmp_path / "bench.jsonl", rows), runs.pairs_file(tmp_path, 4)
    output, base = tmp_path / "e.json", str(made / "base")
    main(["evaluate", base, "--data", best, pairs, "--reference", "none", "--output", str(output)])
    _, found = estimates(output)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), quickstart_tokenizer()
    right = {"Math": 0, "Focus": 0}
    for row in rows:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        scores = [logp(model, tokenizer, prompt, text) for text in (*row["chosen"], *row["rejected"])]
        right[row["subset"]] += scores.index(max(scores)) == 0
    assert found["all best-of rows"]["rows"] == 12
    assert found["all best-of rows"]["accuracy"] == pytest.approx(sum(right.values()) / 12)
    for subset, count in right.items():
        assert found[f"source bench {subset}"]["accuracy"] == pytest.approx(count / 6)
    assert found["all pairs"]["rows"] == found["source pairs"]["rows"] == 4


def test_adapters_are_switched_off_for_the_reference(made, tmp_path):
    adapted = ["--model.adapter", "LoRA", "--model.adapter.rank", "4"]
    run = fit(tmp_path, str(made / "base"), *adapted)
    found = []
    for more in ([], ["--reference", str(made / "base")]):
        output = tmp_path / f"{len(more)}.json"
        main(["evaluate", str(run), "--data", runs.pairs_file(tmp_path), *more, "--output", str(output)])
        found.append(estimates(output))
    assert found[0][0]["reference"].endswith("without its adapters")
    assert found[0][1]["all pairs"]["margin"] == pytest.approx(found[1][1]["all pairs"]["margin"], abs=1e-4)
    assert found[0][1]["all pairs"]["margin"] != 0


def test_mistakes_are_one_sentence_with_a_remedy(made, tmp_path, capsys):
    data, base = runs.pairs_file(tmp_path), made / "base"
    other = model_folder(tmp_path / "other", tokenizer=train_tokenizer(["some other text", "entirely"], 300))
    empty, mine = tmp_path / "empty.jsonl", tmp_path / "mine.json"
    empty.touch()
    mine.write_text("mine")
    for given, expected in (
        ([base], "needs at least one model and one file of pairs"),
        ([base, "--data", data], "add `--reference MODEL`"),
        ([base, "--data", data, "--reference", other], "has another tokenizer"),
        ([base, "--data", empty, "--reference", "none"], "No row"),
        ([base, "--data", tmp_path / "no.jsonl", "--reference", "none"], "no.jsonl"),
        ([tmp_path / "no", "--data", data, "--reference", "none"], "no such folder"),
        ([base, "--data", data, "--reference", "none", "--output", mine], "exists already"),
        ([base, "--data", data, "--reference", "none", "--batch_size", "0"], "`batch_size` must be at least 1"),
        ([base, "--data", data, "--reference", "none", "--max_length", "0"], "`max_length` must be at least 2"),
    ):
        assert expected in refused(["evaluate", *given], capsys), given
    assert mine.read_text() == "mine"
