"""Token ids kept on disk: the same as fresh ones, found only where nothing that decides them has changed."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lit_dpo import PreferenceDataModule
from lit_dpo.data import token_cache as tokens
from lit_dpo.data.dataset import PairDataset
from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.load import EncodedRow, load_pairs
from lit_dpo.data.rows import Pair, RowError
from lit_dpo.data.token_blocks import pack, record
from lit_dpo.data.token_cache import TokenCache
from lit_dpo.data.token_store import open_blocks
from lit_dpo.data.token_writer import of_flags

from . import tokenizers as tk
from .test_encode import chat_pair, text_pair

REPLIES = [[{"role": "assistant", "content": text}] for text in "45"]
ROWS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    {"prompt": "New Yo", "chosen": "rk", "rejected": "ghurt"},  # healed
    {"prompt": "2+2=", "chosen": "4" * 90, "rejected": "5"},  # truncated
    {"prompt": "2+2=", "chosen": "4", "rejected": "<|bos|>"},  # control text
    {"prompt": "2+2=", "chosen": "4", "rejected": None},  # refused by its layout
    {"prompt": "Yo", "chosen": "rk", "rejected": "ghurt"},  # refused by the encoder
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},  # a duplicate
    {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": REPLIES[0], "rejected": REPLIES[1]},
]
LIMIT = 80
FOUND = 6  # rows that are not refused


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 1)
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, encoder=None):
    cache = TokenCache(encoder or PairEncoder(tk.build(), LIMIT), [path])
    _, report = load_pairs([path], cache, on_bad_row="skip", into=cache)
    store = cache.keep(report)
    cache.close()
    return (rows_of(store), report), cache.reused


def rows_of(store):
    """What was taken in, read back."""
    data = PairDataset(store)
    found = []
    for row, (source, prompt) in enumerate(zip(data.sources, data.prompts, strict=True)):
        flags = of_flags(int(store.record(row)["flags"]))
        values = {name: float(column[row]) for name, column in data.columns.items()}
        encoded = Encoded(*data.pair(row), **flags, prompt_key=prompt.tobytes())
        found.append(EncodedRow(encoded, source, data.origins[row], values))
    return found


def test_kept_ids_are_the_fresh_ones_and_nothing_is_tokenized_again(path, monkeypatch):
    plain = load_pairs([path], PairEncoder(tk.build(), LIMIT), on_bad_row="skip")
    assert plain[1].kept == FOUND
    assert plain[1].truncated == plain[1].healed == plain[1].control_text == 1
    assert load(path) == (plain, 0)
    asked = []
    encode = PairEncoder.many
    monkeypatch.setattr(PairEncoder, "many", lambda self, pairs: asked.extend(pairs) or encode(self, pairs))
    assert load(path) == (plain, FOUND)
    assert [pair.row for pair in asked] == [f"{path}:6"]  # a refused row is asked about again


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({}, FOUND),
        ({"max_length": LIMIT + 1}, 0),
        ({"truncation": "keep_end"}, 0),
        ({"append_eos": False}, 0),
        ({"template": tk.THINK_STRIP}, 0),
        ({"eos": "<|endoftext|>"}, 0),
        ({"adds_bos": True}, 0),
        ({"extra": "New"}, 0),
        ({"merge": ("2", "+")}, 0),
        ({"version": 99}, 0),
        ({"rows": ROWS[::-1]}, FOUND),
        ({"rows": ROWS[:1]}, 1),
        ({"rows": [*ROWS, ROWS[0] | {"chosen": "44"}]}, FOUND),
        ({"rows": [ROWS[0] | {"chosen": "44"}, *ROWS[1:]]}, FOUND - 1),
        ({"rows": [{"prompt": "2", "chosen": "+2=4", "rejected": "+2=5"}, *ROWS[1:]]}, FOUND - 1),
        ({"rows": [{"prompt": "2+2=", "chosen": "5", "rejected": "4"}, *ROWS[1:]]}, FOUND - 1),
    ],
    ids=str,
)
def test_ids_are_found_only_where_nothing_that_decides_them_has_changed(path, tmp_path, monkeypatch, change, reused):
    load(path)
    if "rows" in change:
        write(tmp_path / "rows.jsonl", change["rows"])
    if "version" in change:
        monkeypatch.setattr("lit_dpo.data.encode._VERSION", change["version"])
    tokenizer = tk.build(**{name: change[name] for name in ("template", "eos", "adds_bos") if name in change})
    if "extra" in change:
        tokenizer.add_special_tokens({"extra_special_tokens": [change["extra"]]})
    if "merge" in change:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["model"]["merges"].append(list(change["merge"]))
        state["model"]["vocab"]["".join(change["merge"])] = len(state["model"]["vocab"])
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    options = {name: change[name] for name in ("truncation", "append_eos") if name in change}
    encoder = PairEncoder(tokenizer, change.get("max_length", LIMIT), **options)
    plain = load_pairs([path], encoder, on_bad_row="skip")
    assert load(path, encoder) == (plain, reused)
    assert load(path, encoder) == (plain, plain[1].kept)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "flipped"])
def test_a_damaged_file_is_noticed_and_written_anew(path, folder, caplog, damage):
    plain, _ = load(path)
    (data,) = folder.glob("*.tokens")
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[:-5])
    else:
        content[-3] = 0 if damage == "zeroed" else content[-3] ^ 4
        content[-9] ^= 1
        data.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert load(path) == (plain, 0)
    assert caplog.text.count("is damaged") == 1
    assert load(path) == (plain, FOUND)


@pytest.mark.parametrize(
    "forge",
    [
        lambda rows, ids: ids.__setitem__(0, 5000),
        lambda rows, ids: ids.__setitem__(0, -5000),
        lambda rows, ids: rows["lengths"].__setitem__((0, 0), -1),
        lambda rows, ids: rows["lengths"].__setitem__((0, 0), 1 << 30),
        lambda rows, ids: rows["largest"].__setitem__(0, -7),
    ],
)
def test_a_forged_file_is_noticed_and_written_anew(path, folder, caplog, forge):
    """With a right checksum: whoever can write there can make one."""
    plain, _ = load(path)
    (file,) = folder.glob("*.tokens")
    [block] = open_blocks(file, file.stem.encode(), 5000)[0].blocks
    content = file.read_bytes()
    rows = np.frombuffer(bytearray(content[block.records : block.ids]), record(0))
    ids = np.frombuffer(bytearray(content[block.ids :]), "<i4")
    forge(rows, ids)
    file.write_bytes(pack(rows, ids, file.stem.encode())[0])
    with caplog.at_level(logging.INFO):
        assert load(path) == (plain, 0)
    assert caplog.text.count("is damaged (it") == 1
    assert load(path) == (plain, FOUND)


@pytest.mark.parametrize("forged", [b"", b"litdpo", b"litdpo\0\1" + b"\xff" * 99, b"\x80\x04cos\nsystem\n."], ids=str)
def test_what_is_no_file_of_rows_is_not_used(path, folder, caplog, forged):
    plain, _ = load(path)
    (file,) = folder.glob("*.tokens")
    file.write_bytes(forged)
    with caplog.at_level(logging.INFO):
        assert load(path) == (plain, 0)
    assert caplog.text.count("is damaged (") == 1


def test_small_sets_leave_nothing_behind(path, folder, monkeypatch):
    monkeypatch.setattr(tokens, "WORTH_KEEPING", FOUND + 1)
    load(path)
    assert not folder.exists()
    monkeypatch.setattr(tokens, "WORTH_KEEPING", FOUND)
    load(path)
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_one_line(path, folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        found, _ = load(path)
    assert found[1].kept == FOUND
    assert caplog.text.count("were not kept") == 1


def test_nothing_is_kept_of_a_template_that_writes_the_date(path, folder):
    encoder = PairEncoder(tk.build(template="{{ strftime_now('%d %b %Y') }}" + tk.CHATML), LIMIT)
    assert encoder.identity() is None
    load(path, encoder)
    assert not folder.exists()


def test_pairs_encoded_together_are_those_encoded_one_by_one():
    """Text and messages in turn, refused ones between them."""
    encoder = PairEncoder(tk.build(), 40)
    pairs = [
        text_pair(),
        chat_pair(),
        text_pair("Yo", "rk", "ghurt"),
        text_pair("New Yo", "rk", "ghurt"),
        chat_pair("<|im_end|>"),
        chat_pair("5", "4"),
        text_pair(chosen="<|im_end|>"),
    ]

    def one(pair: Pair):
        try:
            return encoder(pair)
        except RowError as error:
            return str(error)

    together = [result if isinstance(result, Encoded) else str(result) for result in encoder.many(pairs)]
    assert together == [one(pair) for pair in pairs]
    assert [isinstance(result, str) for result in together] == [False, False, True, False, True, False, True]
    assert encoder.many([]) == []


@pytest.mark.parametrize("stage", TrainerFn)
def test_the_first_process_of_a_node_encodes_for_the_others(path, tmp_path, monkeypatch, stage):
    names = ("train", "validation", "test", "predict")
    files = {
        name: write(tmp_path / f"{name}.jsonl", [ROWS[0] | {"prompt": f"{name}{i}+2="} for i in range(9)])
        for name in names
    }

    def data(**files):
        module = PreferenceDataModule(**files, tokenizer=tk.build(), max_length=LIMIT)
        module.trainer = SimpleNamespace(world_size=2, state=SimpleNamespace(fn=stage))
        return module

    first = data(**files)
    first.prepare_data()
    assert not first._sets
    encode = PairEncoder.many
    monkeypatch.setattr(PairEncoder, "many", lambda self, pairs: [] if not pairs else pytest.fail("tokenized again"))
    other = data(**files)
    other.setup(stage.value)
    read = {"fit": {"train", "validation"}, "validate": {"validation"}}.get(stage.value, {stage.value})
    assert other._sets.keys() == read
    monkeypatch.setattr(PairEncoder, "many", encode)
    bad = data(**dict.fromkeys(names, path))
    bad.prepare_data()  # every process says what is wrong, in `setup`
    with pytest.raises(RowError, match=r"rows.jsonl:5"):
        bad.setup(stage.value)


def test_nothing_is_encoded_ahead_where_nothing_can_be_kept(path, monkeypatch):
    monkeypatch.setattr(PairEncoder, "many", lambda self, pairs: pytest.fail("encoded for nothing") if pairs else [])
    for options in ({"cache_tokens": False}, {"tokenizer": tk.build(template="{{ strftime_now('%Y') }}")}):
        module = PreferenceDataModule(path, **{"tokenizer": tk.build(), **options})
        module.trainer = SimpleNamespace(world_size=2, state=SimpleNamespace(fn=TrainerFn.FITTING))
        module.prepare_data()


def test_the_cache_can_be_left_out(tmp_path, folder):
    good = write(tmp_path / "good.jsonl", [ROWS[0] | {"prompt": f"{i}+2="} for i in range(9)])
    module = PreferenceDataModule(good, tokenizer=tk.build(), max_length=LIMIT, cache_tokens=False)
    module.setup("fit")
    assert not folder.exists()


def test_a_user_without_a_home_trains_without_a_cache(path, monkeypatch, caplog):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIT_DPO_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    with caplog.at_level(logging.INFO):
        cache = TokenCache(PairEncoder(tk.build(), LIMIT), [])
    assert cache.many([text_pair()])[0] == PairEncoder(tk.build(), LIMIT)(text_pair())
    cache.keep()
    assert "set the environment variable LIT_DPO_CACHE" in caplog.text


def test_one_file_whatever_its_path_is_called(path, folder, monkeypatch):
    load(path)
    monkeypatch.chdir(Path(path).parent)
    assert load(Path(path).name)[1] == FOUND
