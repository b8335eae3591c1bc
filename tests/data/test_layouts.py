import pickle

import pytest

from lit_dpo.data.rows import LayoutError, RowError, detect, parse_row


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ROW = {"prompt": "Q: 2+2?\nA:", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": [user("2+2?")], "chosen": [bot("4")], "rejected": [bot("5")]}
TALK = [user("hi"), bot("hello"), user("2+2?")]


HH = "\n\nHuman: a\n\nAssistant:"


def implicit(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def parse(row, **options):
    return parse_row(row, "sums", "sums.jsonl:17", **options)


@pytest.mark.parametrize(
    ("layout", "row", "prompt", "chosen", "rejected"),
    [
        ("text", ROW, "Q: 2+2?\nA:", " 4", " 5"),
        ("messages", CHAT, [user("2+2?")], [bot("4")], [bot("5")]),
        ("messages", CHAT | {"chosen": bot("4")}, [user("2+2?")], [bot("4")], [bot("5")]),
        (
            "messages",
            {
                "prompt": [{"from": "human", "value": "2+2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            [user("2+2?")],
            [bot("4")],
            [bot("5")],
        ),
        (
            "messages, prompt contained",
            {"chosen": [SYSTEM, *TALK, bot("4")], "rejected": [SYSTEM, *TALK, bot("5")]},
            [SYSTEM, *TALK],
            [bot("4")],
            [bot("5")],
        ),
        (
            "prompt repeated",
            {"prompt": "hi", "chosen": [*TALK, bot("4")], "rejected": [*TALK, bot("5")], "score": 3},
            TALK,
            [bot("4")],
            [bot("5")],
        ),
        (
            "HH",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the end",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the start",
            },
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            " the end",
            " the start",
        ),
    ],
)
def test_layout(layout, row, prompt, chosen, rejected):
    pair = parse(row)
    assert detect(row) == layout
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    assert (pair.source, pair.row) == ("sums", "sums.jsonl:17")


def test_text_is_never_touched():
    row = {"prompt": " 007 ", "chosen": "null", "rejected": "\x00 [1]\n"}
    pair = parse(row | {"id": 4, "tools": []})
    assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == row


def test_an_empty_system_message_is_legal():
    empty = {"role": "system", "content": ""}
    assert parse(CHAT | {"prompt": [empty, user("2+2?")]}).prompt == [empty, user("2+2?")]


BAD = [
    ("null", ROW | {"chosen": None}, "chosen", "null"),
    ("number", ROW | {"rejected": 5}, "rejected", "a number"),
    ("bool", ROW | {"chosen": True}, "chosen", "a true/false value"),
    ("empty", ROW | {"chosen": ""}, "chosen", "empty"),
    ("blank", ROW | {"rejected": " \n\t"}, "rejected", "empty"),
    ("empty prompt", ROW | {"prompt": ""}, "prompt", "empty"),
    ("identical", ROW | {"rejected": " 4"}, "rejected", "identical"),
    ("lone surrogate", ROW | {"chosen": "\ud800"}, "chosen", "Unicode"),
    ("JSON and text", ROW | {"prompt": '[{"role": "user", "content": "a"}]'}, "chosen", "text where messages"),
    ("repr string", ROW | {"chosen": "{'content': 'a', 'role': 'user'}"}, "chosen", "one string"),
    ("text and messages", CHAT | {"chosen": "4"}, "chosen", "text where messages"),
    ("no messages", CHAT | {"prompt": []}, "prompt", "empty"),
    ("only system", CHAT | {"prompt": [SYSTEM]}, "prompt", "empty"),
    ("empty list", CHAT | {"chosen": []}, "chosen", "empty"),
    ("empty reply", CHAT | {"chosen": [bot("")]}, "chosen", "empty"),
    ("null reply", CHAT | {"chosen": [bot(None)]}, "chosen", "null"),
    ("not an object", CHAT | {"prompt": ["2+2?"]}, "prompt", "not an object"),
    ("parts", CHAT | {"prompt": [user([{"type": "text", "text": "a"}] * 2)]}, "prompt", "several parts"),
    ("image", CHAT | {"prompt": [user([{"type": "image", "url": "a"}])]}, "prompt", "not text"),
    ("unknown role", CHAT | {"prompt": [{"role": "developer", "content": "x"}]}, "prompt", "'developer'"),
    ("no role", CHAT | {"prompt": [{"content": "x"}]}, "prompt", "unknown role"),
    ("tool call", CHAT | {"chosen": [{"role": "assistant", "tool_calls": [{}]}]}, "chosen", "no function name"),
    ("tool answer", CHAT | {"prompt": [user("a"), {"role": "tool", "content": "x"}]}, "prompt", "was not called"),
    ("tools", CHAT | {"tools": "{"}, "tools", "not valid JSON"),
    ("tools of text", ROW | {"tools": [{"name": "f"}]}, "tools", "not rendered by a chat template"),
    ("tools, no list", CHAT | {"tools": {"name": "f"}}, "tools", "no list of objects"),
    ("unused prompt", CHAT | {"question": "3+3?"}, "question", "would be left out"),
    ("unused label", CHAT | {"winner": "model_a"}, "winner", "would be left out"),
    ("empty turn", CHAT | {"prompt": [user(" ")]}, "prompt", "a message is empty"),
    ("ends with assistant", CHAT | {"prompt": [user("a"), bot("b")]}, "prompt", "ends with an assistant"),
    ("starts with assistant", CHAT | {"prompt": [bot("a"), user("b")]}, "prompt", "starts with the assistant"),
    ("same role twice", CHAT | {"prompt": [user("a"), user("b")]}, "prompt", "two turns in a row"),
    ("late system", CHAT | {"prompt": [user("a"), SYSTEM, user("b")]}, "prompt", "system message"),
    ("ends with user", CHAT | {"chosen": [bot("4"), user("ok")]}, "chosen", "its roles are assistant, user"),
    ("user reply", CHAT | {"rejected": [user("5")]}, "rejected", "not the assistant's"),
    ("implicit, no prompt", implicit([user("a"), bot("b")], [user("A"), bot("c")]), "rejected", "no prompt"),
    ("implicit, empty", implicit([], [user("a"), bot("b")]), "chosen", "empty"),
    ("implicit, no reply", implicit([user("a")], [user("a"), bot("b")]), "chosen", "empty"),
    ("implicit, identical", implicit([user("a"), bot("b")], [user("a"), bot("b")]), "rejected", "identical"),
    (
        "implicit, questions part ways",
        implicit([user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("b"), user("x"), bot("e")]),
        "rejected",
        "the prompts differ",
    ),
    (
        "repeated prompt differs",
        {"prompt": "b"} | implicit([user("a"), bot("b")], [user("a"), bot("c")]),
        "prompt",
        "first user turn",
    ),
    ("no turns", implicit("Paris ", "London"), "chosen", "no prompt"),
    ("hh, prompts differ", implicit(HH + " b", HH.replace(": a", ": A") + " c"), "rejected", "differ"),
    ("hh, empty reply", implicit(HH + " ", HH + " c"), "chosen", "empty"),
    ("hh, same role twice", implicit(HH + " b\n\nAssistant: c", HH + " d"), "chosen", "alternate"),
    ("hh, turn after reply", implicit(HH + " b\n\nHuman: c", HH + " d"), "chosen", "alternate"),
]


@pytest.mark.parametrize(("row", "column", "part"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_row_names_place_and_column(row, column, part):
    with pytest.raises(RowError) as caught:
        parse(row)
    assert not isinstance(caught.value, LayoutError)
    assert str(caught.value).startswith(f"sums.jsonl:17, column `{column}`: ")
    assert part in str(caught.value)
    assert (caught.value.where, caught.value.column) == ("sums.jsonl:17", column)


def test_unknown_columns_say_what_is_there_and_what_is_missing():
    with pytest.raises(LayoutError) as caught:
        parse({"question": "a", "chosen_reply": "b", "rejected": "c"})
    assert str(caught.value) == (
        "sums.jsonl:17: the columns `question`, `chosen_reply`, `rejected` fit no known layout; the nearest has "
        "`question`, `chosen`, `rejected`: add `chosen`, or set `columns: {chosen: chosen_reply}`."
    )
    with pytest.raises(LayoutError, match="add `rejected`"):
        detect({"prompt": "a", "chosen": "b"})


def test_columns_can_be_named():
    row = {"q": "a", "good": "b", "bad": "c", "prompt": "not this one"}
    pair = parse(row, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a", "b", "c")
    with pytest.raises(LayoutError, match="names `best`, which is not there"):
        parse(row, columns={"chosen": "best"})
    with pytest.raises(ValueError, match="maps `choosen`, which is no column of ours"):
        parse(row, columns={"choosen": "good"})


def test_errors_survive_a_process_boundary():
    error = RowError("a.jsonl:1", "chosen", "it is empty", "fill it in")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason) == ("a.jsonl:1, column `chosen`: it is empty; fill it in.", "it is empty")
