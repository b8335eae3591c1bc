"""One row of every family of layouts, and the pair that it means."""

import json

import pytest

from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.load import load_pairs
from lit_dpo.data.rows import LayoutError, Reading, RowError

from . import tokenizers as tk

ASK, GOOD, BAD = "Which colour?", "Blue it is.", "Seven."


def user(text=ASK):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def parts(role, text):
    return {"role": role, "parts": [{"text": text}]}


def typed(role, text):
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 1.0}


WHOLE = {"chosen": [user(), bot(GOOD)], "rejected": [user(), bot(BAD)]}
TEXTS = {"chosen": GOOD, "rejected": BAD}
RANKED = [{"answer": "It is.", "rank": 2}, {"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 3}]
TALK = f"\n\nHuman: {ASK}\n\nAssistant:"
FAMILIES = {
    "trl messages": {"prompt": [user()], "chosen": [bot(GOOD)], "rejected": [bot(BAD)]},
    "trl implicit": WHOLE,
    "margins": {**WHOLE, "margin": 1.5, "ref_chosen_logps": -4.0},
    "template options": {**WHOLE, "chat_template_kwargs": {"enable_thinking": False}},
    "no tools": {**WHOLE, "tools": []},
    "ultrafeedback": {**WHOLE, "prompt": ASK, "messages": WHOLE["chosen"], "score_chosen": 8.0},
    "argilla cleaned": {**WHOLE, "prompt": ASK, "chosen-rating": 5.0},
    "argilla mix": {**WHOLE, "chosen_rating": 5.0, "rejected_rating": 3.0},
    "orca": {**TEXTS, "system": "", "question": ASK},
    "distilabel orca": {**TEXTS, "system": "", "input": ASK, "status": "swapped", "rating": [4, 5]},
    "alpaca": {**TEXTS, "instruction": ASK, "input": "", "history": []},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK}], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
    "sharegpt, texts": {"conversations": [{"from": "human", "value": ASK}], **TEXTS},
    "typed parts": {
        "chosen_messages": [typed("user", ASK), typed("assistant", GOOD)],
        "rejected_messages": [typed("user", ASK), typed("assistant", BAD)],
    },
    "outputs": {"instruction": ASK, "input": "", "output": [GOOD, "It is.", BAD]},
    "axolotl": {"messages": [user()], "chosen": bot(GOOD), "rejected": bot(BAD)},
    "axolotl argilla": {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD},
    "nemo": {"prompt": ASK, "chosen_response": GOOD, "rejected_response": BAD},
    "swift": {"messages": [user(), bot(GOOD)], "rejected_response": BAD},
    "swift, messages": {"messages": [user(), bot(GOOD)], "rejected_messages": [user(), bot(BAD)]},
    "swift, query": {"query": ASK, "response": GOOD, "rejected_response": BAD},
    "torchtune": {"chosen_conversations": WHOLE["chosen"], "rejected_conversations": WHOLE["rejected"]},
    "openai": {
        "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [bot(GOOD)],
        "non_preferred_output": [bot(BAD)],
    },
    "gemini": {
        "contents": [parts("user", ASK)],
        "completions": [
            {"score": 0, "completion": parts("model", BAD)},
            {"score": 1, "completion": parts("model", GOOD)},
        ],
    },
    "halos": {"prompt": [user()], "output_A": [bot(BAD)], "output_B": [bot(GOOD)], "label": 0, "reward_A": 0.0},
    "nectar": {"prompt": TALK + " ", "answers": RANKED},
    "oasst": {"messages": [user()], "answers": [{**one, "rank": one["rank"] - 1} for one in RANKED]},
    "shp": {"history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 2, "score_B": 9},
    "stack exchange": {"question": ASK, "response_j": GOOD, "response_k": BAD},
    "pku": {
        "prompt": ASK,
        "response_0": BAD,
        "response_1": GOOD,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "webgpt": {"question": {"full_text": ASK}, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5},
    "summaries": {"info": {"post": ASK}, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 1},
    "helpsteer 2": {"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference_strength": -2},
    "helpsteer 3": {"context": [user()], "response1": BAD, "response2": GOOD, "overall_preference": 1},
    "arena": {
        "conversation_a": [user(), bot(BAD)],
        "conversation_b": [user(), bot(GOOD)],
        "winner": "model_b",
    },
    "arena, texts": {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "model_a"},
    "nemo, ranked": {
        "context": [user()],
        "completions": [{"rank": 1, "completion": [bot(BAD)]}, {"rank": 0, "completion": [bot(GOOD)]}],
    },
    "JSON in CSV": {name: json.dumps(cell) for name, cell in WHOLE.items()},
}
GROUPED = {
    "helpsteer pointwise": [
        {"prompt": ASK, "response": BAD, "helpfulness": 1},
        {"prompt": ASK, "response": GOOD, "helpfulness": 4},
    ],
    "kto": [
        {"prompt": [user()], "completion": [bot(GOOD)], "label": True},
        {"prompt": [user()], "completion": [bot(BAD)], "label": False},
    ],
    "kto, conversations": [
        {"messages": [user(), bot(GOOD)], "label": True},
        {"messages": [user(), bot(BAD)], "label": False},
    ],
    "kto tag": [
        {"instruction": ASK, "input": "", "output": BAD, "kto_tag": False},
        {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": True},
    ],
}
AS_TURNS = {
    "trl text": {"prompt": ASK, **TEXTS},
    "trl transcript": {"prompt": TALK, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    "HH": {"chosen": f"{TALK} {GOOD}", "rejected": f"{TALK} {BAD}"},
}
ENCODER = PairEncoder(tk.build(), 400)


def load(tmp_path, *rows, encoder=ENCODER, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading(**{k: options.pop(k) for k in [*options] if k in Reading.__dataclass_fields__})
    found, report = load_pairs([str(path)], encoder, reading=reading, **options)
    assert report.read == report.kept + report.skipped.total()
    return [tuple(ENCODER.tokenizer.decode(ids) for ids in triple(row)) for row in found], report


def triple(row):
    return row.encoded.prompt, row.encoded.chosen, row.encoded.rejected


def rendered(prompt=(("user", ASK),), good=GOOD, bad=BAD):
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in prompt)
    return f"{text}<|im_start|>assistant\n", f"{good}<|im_end|>", f"{bad}<|im_end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_means_what_it_says(tmp_path, name):
    found, _ = load(tmp_path, FAMILIES[name])
    assert found == [rendered()]


@pytest.mark.parametrize("name", GROUPED)
def test_rows_of_one_prompt_make_a_pair(tmp_path, name):
    other = json.loads(json.dumps(GROUPED[name][0]).replace(ASK, "Why?"))
    found, report = load(tmp_path, GROUPED[name][0], other, GROUPED[name][1])
    assert found == [rendered()]
    assert dict(report.skipped) == {"no other answer to the prompt": 1}
    assert (report.kept, report.pairs) == (2, 1)


@pytest.mark.parametrize("name", AS_TURNS)
def test_text_becomes_turns_where_it_is_asked_to(tmp_path, name):
    found, report = load(tmp_path, AS_TURNS[name], text_as_turns=True)
    assert found == [rendered()]
    assert "as turns" in report.overview(ENCODER.tokenizer.decode)
    plain, report = load(tmp_path, AS_TURNS[name])
    row = AS_TURNS[name]
    whole = row.get("prompt", "") + row["chosen"]
    assert plain[0][0] + plain[0][1] == whole + "<|im_end|>"
    assert "`text_as_turns: true` renders it" in report.overview(ENCODER.tokenizer.decode, has_template=True)


def test_what_belongs_to_the_prompt_stands_in_it(tmp_path):
    row = {"instruction": "Sort.", "input": "b a", "system": "Be brief.", "history": [["Hi", "Hello"]], **TEXTS}
    found, _ = load(tmp_path, row)
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Sort.\nb a"))
    assert found == [rendered(turns)]
    found, _ = load(tmp_path, {"prompt": ASK, "system": "Be brief.", **TEXTS})
    assert found == [rendered((("system", "Be brief."), ("user", ASK)))]


@pytest.mark.parametrize("name", ["orca", "pku", "shp", "nectar"])
def test_turns_without_a_template_are_refused_with_the_remedy(tmp_path, name):
    with pytest.raises(ValueError, match=r"no chat template .* use an instruct model's tokenizer"):
        load(tmp_path, FAMILIES[name], encoder=PairEncoder(tk.build(template=None), 400))


TIES = {
    "halos": {"label": 0.5},
    "pku": {"better_response_id": -1},
    "webgpt": {"score_0": 0.5},
    "helpsteer 2": {"preference_strength": 0},
    "helpsteer 3": {"overall_preference": 0},
    "arena": {"winner": "tie (bothbad)"},
    "distilabel orca": {"status": "tie"},
    "gemini": {"completions": [{"score": 1, "completion": parts("model", text)} for text in (GOOD, BAD)]},
}


@pytest.mark.parametrize("name", TIES)
def test_a_tie_is_left_out_and_counted_and_stops_nothing(tmp_path, name):
    found, report = load(tmp_path, FAMILIES[name], {**FAMILIES[name], **TIES[name]})
    assert found == [rendered()]
    assert (dict(report.skipped), report.bad.total()) == ({"a tie": 1}, 0)


FLIPPED = {
    "halos": {"label": 1, "reward_A": 1.0},
    "shp": {"labels": 1, "score_A": 12},
    "pku": {"better_response_id": 0},
    "webgpt": {"score_0": 2.0},
    "summaries": {"choice": 0},
    "helpsteer 2": {"preference_strength": 1},
    "helpsteer 3": {"overall_preference": -3},
    "arena": {"winner": "model_a"},
}


@pytest.mark.parametrize("name", FLIPPED)
def test_the_label_decides(tmp_path, name):
    found, _ = load(tmp_path, {**FAMILIES[name], **FLIPPED[name]})
    assert found == [rendered(good=BAD, bad=GOOD)]
    row = {key: cell for key, cell in FAMILIES[name].items() if key not in FLIPPED[name]}
    with pytest.raises(RowError):  # never a guess without the label
        load(tmp_path, row)


def test_a_label_that_its_scores_contradict_is_refused(tmp_path):
    with pytest.raises(RowError, match=r"rows.jsonl:1, column `labels`: label and scores disagree"):
        load(tmp_path, {**FAMILIES["shp"], "labels": 1})


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, ["14"]),
        ({"pairs": "adjacent"}, ["13", "24"]),
        ({"pairs": "all"}, ["12", "13", "14", "24", "34"]),
        ({"pairs": "all", "max_pairs": 2}, ["13", "14"]),
    ],
)
def test_pairs_of_ranked_answers(tmp_path, options, pairs):
    ranks = {"3": 1, "1": 0, "4": 2, "2": 1}  # 2 and 3 are equally good, and make no pair
    row = {"messages": [user()], "answers": [{"answer": text, "rank": rank} for text, rank in ranks.items()]}
    found, report = load(tmp_path, row, **options)
    assert sorted(good[0] + bad[0] for _, good, bad in found) == pairs
    assert (report.read, report.kept, report.pairs) == (1, 1, len(pairs))


@pytest.mark.parametrize(
    "row",
    [
        {"question": ASK, "answer": GOOD, "wrong": BAD},
        {"question": ASK, "good": GOOD, "bad": BAD, "winner": "good"},
        {"prompt": ASK, "answer_1": GOOD, "answer_2": BAD, "label": 1},
    ],
)
def test_advice_drops_no_label_and_glues_nothing(tmp_path, row):
    with pytest.raises(LayoutError) as caught:
        load(tmp_path, row)
    advice = str(caught.value)
    assert "prompt: question" not in advice
    if {"winner", "label"} & row.keys():
        assert "chosen:" not in advice
        assert "tell which answer is better" in advice


def test_columns_that_name_a_prompt_or_a_label_are_not_left_aside(tmp_path):
    row = {"prompt": ASK, **TEXTS}
    for column in ("question", "label", "preference", "context"):
        with pytest.raises(RowError, match=f"rows.jsonl:1, column `{column}`: a column that reads like a"):
            load(tmp_path, {**row, column: "x"})
        assert load(tmp_path, {**row, column: "x"}, ignored_columns=[column])[1].kept == 1
        assert load(tmp_path, {**row, column: None})[1].kept == 1


def test_names_of_ones_own_lead_to_any_layout(tmp_path):
    row = {"ask": ASK, "one": BAD, "two": GOOD, "best": 1}
    columns = {"prompt": "ask", "response_0": "one", "response_1": "two", "better_response_id": "best"}
    assert load(tmp_path, row, columns=columns)[0] == [rendered()]


def test_a_function_of_ones_own(tmp_path):
    def mine(row):
        if row["n"] == 2:
            return None
        if row["n"] == 3:
            raise KeyError("no text")
        return {"question": ASK, "chosen": row["a"], "rejected": row["b"]}

    rows = [{"n": n, "a": GOOD, "b": BAD} for n in (1, 2, 3)]
    found, report = load(tmp_path, *rows, rows=mine, on_bad_row="skip")
    assert found == [rendered()]
    assert set(report.skipped) == {"left out by the function in `rows`", "the function in `rows` raised KeyError"}
    with pytest.raises(RowError, match=r"rows.jsonl:3: the function in `rows` raised KeyError"):
        load(tmp_path, *rows, rows=mine)


# -- tools ------------------------------------------------------------------------------------------------------------

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}NO THINKING\n{% endif %}{% endif %}"
)
SCHEMA = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]}
TOOL_ROW = {"prompt": [user()], "chosen": [CALL], "rejected": [bot(BAD)], "tools": SCHEMA}


@pytest.mark.parametrize("tools", [SCHEMA, json.dumps(SCHEMA)])
def test_tools_are_rendered_as_the_template_does(tmp_path, tools):
    encoder = PairEncoder(tk.build(template=TOOLS), 900)
    ((prompt, chosen, _),), _ = load(tmp_path, {**TOOL_ROW, "tools": tools}, encoder=encoder)
    whole = encoder.tokenizer.apply_chat_template([user(), CALL], tools=SCHEMA, tokenize=False)
    assert prompt + chosen == whole.rstrip()
    assert chosen == 'CALL look {"a": 1}<|im_end|>'


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (TOOL_ROW, "tools"),
        ({**TOOL_ROW, "tools": None}, "chosen"),
        ({**TOOL_ROW, "tools": None, "chosen": [{**bot(GOOD), "reasoning_content": "hm"}]}, "chosen"),
        ({**WHOLE, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ],
)
def test_what_the_template_has_no_words_for_is_refused_by_name(tmp_path, row, column):
    with pytest.raises(RowError, match=f"rows.jsonl:1, column `{column}`: .*template"):
        load(tmp_path, row)


def test_template_options_of_a_row_reach_the_template(tmp_path):
    encoder = PairEncoder(tk.build(template=TOOLS), 900)
    row = {**WHOLE, "chat_template_kwargs": {"enable_thinking": False}}
    (plain,), _ = load(tmp_path, WHOLE, encoder=encoder)
    (found,), _ = load(tmp_path, row, encoder=encoder)
    assert "NO THINKING" not in plain[0]
    # The reply is rendered without the generation prompt's words, so that they are in neither text.
    assert found[0].endswith("<|im_start|>assistant\n")


def test_only_what_the_assistant_says_is_scored(tmp_path):
    encoder = PairEncoder(tk.build(template=TOOLS), 900)
    turns = [CALL, {"role": "tool", "content": "42"}, bot("It is 42.")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**TOOL_ROW, "chosen": turns}))
    ((row,), report) = load_pairs([str(path)], encoder)
    chosen, decode = row.encoded.chosen, encoder.tokenizer.decode
    assert decode([i for i in chosen if i >= 0]) == 'CALL look {"a": 1}<|im_end|>It is 42.<|im_end|>'
    assert decode([~i for i in chosen if i < 0]) == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert dict(report.notes) == {"completions of several messages": 1}


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several(tmp_path):
    encoder = PairEncoder(tk.build(template=tk.THINK_STRIP), 400)
    turns = [bot("<think>a</think>b"), user("and?"), bot("c")]
    with pytest.raises(RowError, match=r"rows.jsonl:1, column `chosen`: the chat template rewrites an earlier turn"):
        load(tmp_path, {"prompt": [user()], "chosen": turns, "rejected": [bot(BAD)]}, encoder=encoder)
