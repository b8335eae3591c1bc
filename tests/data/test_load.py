import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.load import load_pairs
from lit_dpo.data.rows import LayoutError, RowError

from . import tokenizers as tk

GOOD = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
ENCODE = PairEncoder(tk.build(), 20)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_rows_keep_their_order_source_and_place(tmp_path):
    sums = write(tmp_path / "sums.jsonl", GOOD, GOOD | {"chosen": "four"})
    words = write(tmp_path / "words.jsonl", {"q": "New Yo", "chosen": "rk", "rejected": "ghurt"})
    rows, report = load_pairs([sums], ENCODE)
    assert [(row.source, row.row) for row in rows] == [("sums", f"{sums}:1"), ("sums", f"{sums}:2")]
    prompt, four, five = ENCODE._ids(["2+2=", "4", "5"], True)
    assert rows[0].encoded == Encoded(prompt, [*four, 2], [*five, 2], prompt_key=rows[0].encoded.prompt_key)
    assert str(report) == "2 rows read, 2 kept, 0 skipped"
    rows, report = load_pairs([words], ENCODE, columns={"prompt": "q"})
    assert str(report).splitlines() == [
        "1 rows read, 1 kept, 0 skipped, 1 healed at the prompt's end",
        f"of these: healed {words}:1",
    ]


def test_everything_worth_knowing_is_counted(tmp_path):
    long = GOOD | {"chosen": "4" * 30}
    path = write(
        tmp_path / "a.jsonl",
        GOOD,
        GOOD,
        {"prompt": "2+2=", "chosen": "5", "rejected": "4"},
        long,
        GOOD | {"rejected": "<|bos|>"},
        GOOD | {"rejected": None},
        "{broken",
        GOOD | {"rejected": None},
        {"prompt": "2+2="},
    )
    rows, report = load_pairs([path], ENCODE, on_bad_row="skip")
    assert len(rows) == report.kept == 5
    assert str(report) == (
        "9 rows read, 5 kept, 4 skipped, 1 truncated (chosen 1), 1 with special tokens spelled out as text, "
        "1 exact duplicates, "
        f"1 contradicting an earlier row\nskipped: 2x null where text is expected ({path}:6, {path}:8); "
        f"1x the line is not valid JSON ({path}:7); 1x the columns `prompt` fit no known layout ({path}:9)\n"
        f"of these: truncated {path}:4; with special tokens {path}:5; duplicates {path}:2; contradictions {path}:3"
    )
    assert report.bad.total() == 4
    with pytest.raises(RowError, match=r"a.jsonl:6, column `rejected`"):
        load_pairs([path], ENCODE)


def test_the_first_bad_row_is_the_one_that_is_raised(tmp_path):
    """Rows are encoded many at a time; what is wrong behind a bad row must not be said before it."""
    null, chat = GOOD | {"chosen": None}, {"role": "user", "content": "hi"}
    chats = {"prompt": [chat], "chosen": [chat | {"role": "assistant"}], "rejected": [{**chat, "content": "x"}]}
    path = write(tmp_path / "a.jsonl", GOOD, null, chats)
    with pytest.raises(RowError, match=r"a.jsonl:2, column `chosen`"):
        load_pairs([path], PairEncoder(tk.build(template=None), 20))
    damaged = tmp_path / "b.csv"
    damaged.write_bytes(b"prompt,chosen,rejected\n2+2=,4,5\n2+2=,,5\n2+2=,\xff\xfe,5\n")
    with pytest.raises(RowError, match=r"b.csv:3, column `chosen`: null"):
        load_pairs([str(damaged)], ENCODE)


def test_unknown_columns_of_a_whole_file_are_raised_even_when_skipping(tmp_path):
    good = write(tmp_path / "good.jsonl", GOOD)
    unknown = write(tmp_path / "unknown.jsonl", {"q": "a", "good": "b", "bad": "c"})
    with pytest.raises(LayoutError, match=r"unknown.jsonl:1: the columns `q`, `good`, `bad`"):
        load_pairs([good, unknown], ENCODE, on_bad_row="skip")


def test_nothing_left(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"No row to train on in .*empty.jsonl"):
        load_pairs([empty], ENCODE)
    bad = write(tmp_path / "bad.jsonl", GOOD | {"chosen": ""})
    with pytest.raises(ValueError, match=r"1 skipped\nskipped: 1x the completion is empty"):
        load_pairs([bad], ENCODE, on_bad_row="skip")
    with pytest.raises(ValueError, match="`on_bad_row` must be `error`, `warn` or `skip`, got `ignore`"):
        load_pairs([bad], ENCODE, on_bad_row="ignore")


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=4),
    st.just([]),
    st.just([{"role": "user", "content": "a"}]),
)
ROW = st.one_of(
    st.just(GOOD),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "tools"]), CELL).map(lambda change: GOOD | change),
    st.sets(st.sampled_from([*GOOD]), min_size=1).map(lambda gone: {k: v for k, v in GOOD.items() if k not in gone}),
    CELL,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, max_size=8))
def test_every_row_is_accounted_for(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.jsonl", GOOD, *map(json.dumps, rows))
    kept, report = load_pairs([path], ENCODE, on_bad_row="skip")
    assert report.read == 1 + len(rows)
    assert report.read == report.kept + report.skipped.total()
    assert report.kept == len(kept) >= 1
