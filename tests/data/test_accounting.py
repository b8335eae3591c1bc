"""Every row is trained on or reported, whatever is in it, and what is worth knowing about those kept is counted."""

import copy
import json
import random
import re

import pytest

from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.load import load_pairs
from lit_dpo.data.rows import Reading, RowError

from . import tokenizers as tk
from .test_families import AS_TURNS, FAMILIES, GROUPED, TOOL_ROW, bot, user

GOOD = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
ENCODER = PairEncoder(tk.build(), 100)


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_the_first_bad_row_and_how_many_more_of_which_kinds(tmp_path):
    path = write(tmp_path, [GOOD, GOOD | {"chosen": None}, GOOD | {"rejected": "4"}, "{", GOOD | {"rejected": "4"}])
    with pytest.raises(RowError) as caught:
        load_pairs([path], ENCODER)
    assert str(caught.value) == (
        f"{path}:2, column `chosen`: null where text is expected; write the text, as a string. 3 more rows cannot be "
        "trained on: 2x chosen and rejected are identical, 1x the line is not valid JSON."
    )


def test_a_share_of_bad_rows_above_the_limit_stops_the_run(tmp_path):
    path = write(tmp_path, [GOOD, GOOD, GOOD, GOOD | {"chosen": ""}])
    assert load_pairs([path], ENCODER, on_bad_row="skip", max_bad_share=0.25)[1].kept == 3
    with pytest.raises(ValueError, match=r"1 of 4 rows are malformed, .* share of 0.2 that `max_bad_share` allows"):
        load_pairs([path], ENCODER, on_bad_row="skip", max_bad_share=0.2)


def test_what_is_legal_and_worth_knowing_is_noted_with_its_place(tmp_path):
    rows = [
        GOOD | {"chosen": "\0a\x07"},
        GOOD | {"chosen": "2+2=4"},
        GOOD | {"chosen": " 5"},
        {"prompt": [user()], "chosen": [bot("a")], "rejected": [bot("b"), user("c"), bot("d")]},
    ]
    path = write(tmp_path, rows)
    _, report = load_pairs([path], ENCODER)
    text = str(report)
    assert f"1x control characters ({path}:1, column `chosen`)" in text
    assert f"1x the prompt repeated in the completion ({path}:2, column `chosen`)" in text
    assert f"1x completions that differ in white space around them alone ({path}:3, column `rejected`)" in text
    assert f"1x completions of several messages ({path}:4, column `rejected`)" in text
    assert "rows mixes layouts: `text` 3, `messages` 1" in text


def test_no_name_or_value_of_a_row_steers_the_terminal(tmp_path):
    """Columns and roles are words of whoever wrote the file."""
    rows = [GOOD, GOOD | {"prompt": [{"role": "a\x1b[2J", "content": "b"}]}, {"prompt": "a", "chosen\x9b2J\u202e": "b"}]
    path = write(tmp_path, rows)
    _, report = load_pairs([path], ENCODER, on_bad_row="skip")
    said = [str(report), report.overview(lambda ids: str(ids)), *report.bad_rows]
    with pytest.raises(RowError) as caught:
        load_pairs([path], ENCODER)
    said.append(str(caught.value))
    assert "chosen?2J?" in said[0]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", "".join(said))


def test_the_overview_tells_layout_lengths_and_bias_and_shows_the_boundary(tmp_path):
    rows = [GOOD | {"chosen": "4" * n, "rejected": "5" * 10} for n in (1, 2, 3, 11)]
    _, report = load_pairs([write(tmp_path, rows)], ENCODER)
    assert report.overview(ENCODER.tokenizer.decode).splitlines() == [
        "rows: layout `text`; tokens at 50/90/99/100 %: prompt 4/4/4/4, chosen 3/4/4/12, rejected 11/11/11/11",
        "rows: always picking the longer answer scores 0.25",
        f"{tmp_path}/rows.jsonl:1, as it is trained on; the prompt ends where the completions begin:",
        "  prompt   '2+2='",
        "  chosen   '4<|im_end|>'",
        "  rejected '5555555555<|im_end|>'",
    ]


def test_what_is_cut_is_told_by_side(tmp_path):
    rows = [GOOD | {"prompt": "2" * 99}, GOOD | {"rejected": "5" * 200}]
    _, report = load_pairs([write(tmp_path, rows)], PairEncoder(tk.build(), 100, "keep_end"))
    assert dict(report.cut) == {"prompt": 2, "rejected": 1}


# -- mutated rows -----------------------------------------------------------------------------------------------------

KINDS = [*FAMILIES.values(), *AS_TURNS.values(), TOOL_ROW, *(row for rows in GROUPED.values() for row in rows)]
CELLS = [
    *(None, "", " ", "x", "\0", "<|im_end|>", 0, 1, -1, 1.5, True, [], {}, [[]], [{}], [None], "[", "{}"),
    *('[{"role": "user", "content": "a"}]', "{'role': 'user', 'content': 'a'}", "\ud800", "a" * 300, float("inf")),
    *([user("a")], [bot("a")], [user("a"), bot("b")], bot("a"), {"role": "tool", "content": "a"}, "model_a", "tie"),
    *([{"role": "assistant", "tool_calls": "x"}], [{"role": [], "content": {}}], {"text": 1}, [{"text": None}] * 2),
]


def mutated(rng):
    """A row of a known layout with up to three accidents, or a line that is no row."""
    row = json.loads(json.dumps(rng.choice(KINDS)))
    for _ in range(rng.randrange(4)):
        place = rng.choice([*row, "extra"]) if row else "extra"
        accident = rng.randrange(6)
        if accident == 0:
            row.pop(place, None)
        elif accident == 1:
            row[place] = copy.deepcopy(rng.choice(CELLS))
        elif accident == 2:
            row[rng.choice(["prompt", "label", "system", "messages", "tools", "input", "winner"])] = copy.deepcopy(
                rng.choice(CELLS)
            )
        elif accident == 3 and isinstance(row.get(place), list) and row[place]:
            row[place][rng.randrange(len(row[place]))] = copy.deepcopy(rng.choice(CELLS))
        elif accident == 4 and isinstance(row.get(place), list) and row[place] and isinstance(row[place][0], dict):
            turn = row[place][0]
            turn[rng.choice([*turn, "role", "content", "tool_calls"])] = copy.deepcopy(rng.choice(CELLS))
        elif accident == 5 and isinstance(row.get(place), str):
            row[place] = json.dumps([row[place]]) if rng.random() < 0.3 else row[place][::-1]
    return rng.choice(["{", "[1]", "null", '"a"', '{"a": 1e999}']) if rng.random() < 0.02 else row


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutated_row_is_lost_and_none_ends_in_a_traceback(tmp_path, count):
    rng = random.Random(0)
    rows = [mutated(rng) for _ in range(count)]
    path = write(tmp_path, rows)
    for reading in (Reading(), Reading(text_as_turns=True, pairs="all")):
        found, report = load_pairs([path], ENCODER, on_bad_row="skip", reading=reading)
        assert report.read == count == report.kept + report.skipped.total()
        assert len(found) == report.pairs > count / 10
        assert all(any(i >= 0 for i in row.encoded.chosen) for row in found)
    with pytest.raises(RowError):
        load_pairs([path], ENCODER)


# -- tokenizers -------------------------------------------------------------------------------------------------------

KINDS_OF_TOKENIZERS = {
    "chatml": {},
    "bos twice": {"template": tk.CHATML_BOS, "adds_bos": True},
    "no eos": {"eos": None},
    "pad is eos": {"eos": "<|endoftext|>"},
    "adds eos": {"adds_eos": True},
    "no generation prompt": {"template": tk.NO_GENERATION_PROMPT},
    "strict alternation": {"template": tk.STRICT},
    "think strip": {"template": tk.THINK_STRIP},
    "no turn end": {"template": tk.NO_TURN_END},
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", KINDS_OF_TOKENIZERS)
def test_prompt_and_completion_are_the_rendered_text(tmp_path, name, kept):
    tokenizer = tk.build(**KINDS_OF_TOKENIZERS[name])
    if name == "no turn end" and tokenizer.eos_token is None:
        pytest.skip("nothing ends a completion")
    encoder = PairEncoder(tokenizer, 400, keep_template_end=kept)
    turns = [[user("a")], [user("a"), bot("b"), user("c")]]
    rows = [{"prompt": prompt, "chosen": [bot("d é")], "rejected": [bot("e\n")]} for prompt in turns]
    found, _ = load_pairs([write(tmp_path, rows)], encoder)
    for row, given in zip(found, rows, strict=True):
        for ids, reply in ((row.encoded.chosen, "chosen"), (row.encoded.rejected, "rejected")):
            whole = tokenizer.apply_chat_template(given["prompt"] + given[reply], tokenize=False)
            text = tokenizer.decode(row.encoded.prompt + ids)
            if name == "no turn end":
                assert text == whole + tokenizer.eos_token
            else:
                assert text == (whole if kept else whole.rstrip("\n"))
                assert tokenizer(whole, add_special_tokens=False).input_ids[: len(row.encoded.prompt + ids)] == (
                    row.encoded.prompt + ids
                )
            assert text.count("<|bos|>") == (name == "bos twice")
            assert tokenizer.decode(ids).count("<|im_end|>") == 1
