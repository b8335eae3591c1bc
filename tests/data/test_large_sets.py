"""Sets of thousands of rows: encoded once and by all processors, mapped by all processes, kept when one is killed."""

import errno
import fcntl
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_dpo import PreferenceDataModule
from lit_dpo.data import encoding, token_cache, token_writer, unchanged
from lit_dpo.data.dataset import BatchPlan, PairDataset
from lit_dpo.data.encode import Encoded, PairEncoder
from lit_dpo.data.encoding import SpreadEncoder
from lit_dpo.data.load import EncodedRow
from lit_dpo.data.places import join_place, split_place
from lit_dpo.data.token_blocks import Check
from lit_dpo.references.table import content_keys

from . import tokenizers as tk
from .test_encode import text_pair

ROWS = 2500  # above what is worth a file


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    rows = ({"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1 + i % 3)} for i in range(ROWS))
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def data(path, **options):
    module = PreferenceDataModule(str(path), tokenizer=tk.build(), max_length=64, **options)
    module.setup("fit")
    return module


def batches(module):
    return [(batch.input_ids.tolist(), batch.row_ids.tolist()) for batch in module.train_dataloader()]


def test_a_second_start_reads_no_row(path, folder, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        first, plain = data(path), data(path, cache_tokens=False)
        said = [line for line in caplog.messages if "rows read" in line]
        monkeypatch.setattr("lit_dpo.data.token_cache.load_pairs", lambda *_, **__: pytest.fail("rows were read"))
        second = data(path)
    assert batches(first) == batches(second) == batches(plain)
    assert first.state_dict() == second.state_dict() == plain.state_dict()
    assert [line for line in caplog.messages if "rows read" in line] == [*said, said[0]]
    assert second.origin([0, 2, ROWS - 1], training=True) == [f"{path}:{line}" for line in (1, 3, ROWS)]
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".tokens"]
    assert str(next(folder.glob("*.tokens"))) in Path("/proc/self/maps").read_text()


def test_a_change_that_leaves_size_and_time_alone_is_noticed(path):
    data(path)
    times, content = path.stat().st_mtime_ns, path.read_bytes()
    path.write_bytes(content.replace(b'"7+7="', b'"7-7="'))
    os.utime(path, ns=(times, times))
    module = data(path)
    assert tk.build().decode(module._sets["train"].pair(7)[0]) == "7-7="
    path.write_bytes(content)
    assert tk.build().decode(data(path)._sets["train"].pair(7)[0]) == "7+7="


@pytest.mark.slow
@pytest.mark.parametrize(
    "forge",
    [
        lambda header: header.update(places=[["a", "b", "c", "d"]]),
        lambda header: header.update(sources=[]),
        lambda header: header.update(values=["margin"]),
        lambda header: header.update(report=5),
        lambda header: header.update(sums="0"),
        lambda header: header.clear(),
    ],
)
def test_a_forged_header_costs_a_look_at_the_rows(path, folder, monkeypatch, forge):
    expected = batches(data(path))
    (file,) = folder.glob("*.json")
    header = json.loads(file.read_text())
    forge(header)
    file.write_text(json.dumps(header))
    monkeypatch.setattr(PairEncoder, "many", lambda self, pairs: [] if not pairs else pytest.fail("tokenized again"))
    assert batches(data(path)) == expected


def test_a_forged_report_does_not_reach_the_terminal_as_commands(path, folder, caplog):
    data(path)
    (file,) = folder.glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"report": "\x1b]0;owned\x07 2 rows read"}))
    with caplog.at_level(logging.INFO):
        data(path)
    assert "2 rows read" in caplog.text
    assert "\x1b" not in caplog.text


def test_nothing_is_removed_but_what_a_killed_run_left(path, folder):
    data(path)
    (file,) = folder.glob("*.tokens")
    key, content = file.stem, file.read_bytes()
    (folder / f"{key}.abcdefgh.part").write_bytes(content[:-9])  # torn: as a kill leaves it
    decoys = [folder / f"{key}.{name}" for name in ("my_notes.part", "12345678.part", "tokens.old")]
    decoys.append(folder / "other.abcdefgh.part")
    for decoy in decoys:
        decoy.write_text("mine")
    (folder / f"{key}.folder__.part").mkdir()
    (folder / f"{key}.folder__.part" / "file").write_text("mine")
    os.mkfifo(folder / f"{key}.fifo____.part")
    path.write_bytes(path.read_bytes().replace(b'"7+7="', b'"7-7="'))
    data(path)
    assert not (folder / f"{key}.abcdefgh.part").exists()
    assert {decoy.read_text() for decoy in decoys} == {"mine"}
    assert (folder / f"{key}.folder__.part" / "file").read_text() == "mine"
    assert (folder / f"{key}.fifo____.part").exists()


KILLED = """
import os, sys, time
from lit_dpo import PreferenceDataModule
from lit_dpo.data.encode import PairEncoder
from tests.data import tokenizers as tk
encode, done = PairEncoder.many, 0
def many(self, pairs):
    global done
    if done >= 4000:
        os.write(1, b"%d\\n" % done)  # one line at once, as another process may write its own
        time.sleep(60)
    done += len(pairs)
    return encode(self, pairs)
PairEncoder.many = many
PreferenceDataModule(sys.argv[1], tokenizer=tk.build(), max_length=64).setup("fit")
"""


@pytest.mark.slow
def test_a_kill_keeps_nine_tenths_of_what_was_encoded(tmp_path, folder, monkeypatch, caplog):
    path = tmp_path / "many.jsonl"
    rows = ({"prompt": f"{i}=", "chosen": str(i), "rejected": str(i + 1)} for i in range(4500))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True) as process:
        done = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert done >= 4000
    with next(folder.glob("*.part")).open("rb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)  # free as soon as the processes that encoded for it have followed it
    asked, encode = [], PairEncoder.many
    monkeypatch.setattr(PairEncoder, "many", lambda self, pairs: asked.extend(pairs) or encode(self, pairs))
    monkeypatch.setattr(encoding, "MANY", 10**9)  # all in this process, where they are counted
    resumed = data(path)
    assert 4500 - len(asked) >= 0.9 * done
    assert batches(resumed) == batches(data(path, cache_tokens=False))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".tokens"]


def test_a_full_disk_costs_a_line(path, folder, monkeypatch, caplog):
    write, calls = token_writer._write, []

    def full(file, content):
        calls.append(content)
        if len(calls) > 2:
            write(file, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    expected = batches(data(path, cache_tokens=False))
    monkeypatch.setattr(token_writer, "_write", full)
    with caplog.at_level(logging.INFO):
        assert batches(data(path)) == expected
    assert caplog.text.count("No space left on device") == 1
    assert list(folder.iterdir()) == []


def test_all_processors_encode_as_one_does(monkeypatch):
    monkeypatch.setattr(encoding, "MANY", 1)
    encoder = PairEncoder(tk.build(), 20)
    pairs = [text_pair(f"{i}+{i}=" * (1 + i % 9), str(i), "<|bos|>" if i % 7 else str(i + 1)) for i in range(300)]
    alone = encoder.many(pairs)
    assert {type(result) for result in alone} == {Encoded, encoding.RowError}
    with SpreadEncoder(encoder, processes=2) as spread:
        together = spread.many(pairs)
        workers = list(spread._pool._processes)
        assert len(workers) == 2
        assert list(map(repr, together)) == list(map(repr, alone))
        os.kill(workers[0], signal.SIGKILL)
        assert list(map(repr, spread.many(pairs))) == list(map(repr, alone))
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_far_the_encoding_is(path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(encoding, "MANY", 1000)
    monkeypatch.setattr(SpreadEncoder, "many", lambda self, pairs: self.encoder.many(pairs))
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    data(path)
    assert (f"/{ROWS}" in capsys.readouterr().err) == terminal


def test_a_data_set_goes_to_another_process_as_the_name_of_its_file(path):
    dataset = data(path)._sets["train"]
    sent = pickle.dumps(dataset.store)
    assert len(sent) < 5000
    again, plan = PairDataset(pickle.loads(sent)), BatchPlan([7, 3])
    assert again[plan].input_ids.tolist() == dataset[plan].input_ids.tolist()
    assert again.origins[7] == dataset.origins[7]
    path.write_bytes(path.read_bytes().replace(b'"7+7="', b'"7-7="'))
    data(path)  # replaces the file
    assert dataset[plan].input_ids.tolist() == again[plan].input_ids.tolist()
    with pytest.raises(ValueError, match="replaced by another run"):
        pickle.loads(sent)


def test_what_is_kept_of_a_row_is_what_its_batch_gives():
    """Ids of tokens that are not scored lie below 0."""
    encoded = [Encoded([5], [~7, 8], [9]), Encoded([1, 2], [3], [~11, 4], True, prompt_key=b"k" * 16)]
    dataset = PairDataset([EncodedRow(one, "s", f"f:{i}") for i, one in enumerate(encoded)])
    assert [dataset.pair(row) for row in range(2)] == [(one.prompt, one.chosen, one.rejected) for one in encoded]
    assert dataset.largest_id == 11
    rows = torch.tensor([1, 0])
    batch = dataset[BatchPlan(rows.tolist())]
    assert torch.equal(dataset.content_keys(rows), content_keys(batch))


@pytest.mark.parametrize(
    "place", ["f.jsonl:17", "a1/b22.csv:3", "x007.jsonl:5", "rows, row 1000000", "no number", "9" * 30, "", "1:2:3:04"]
)
def test_a_place_is_kept_as_it_is(place):
    assert join_place(*split_place(place)) == place
    assert max(split_place(place)[1]) < 2**63


# -- files that are not read again ------------------------------------------------------------------------------------


@pytest.fixture
def settled(path, folder, monkeypatch):
    """A set whose second start would trust the times of its files; what is read of them then."""
    monkeypatch.setattr(unchanged, "_SETTLED", 0)
    expected = batches(data(path))
    seen, piece, passes = [], unchanged._piece, Check.passes
    monkeypatch.setattr(unchanged, "_piece", lambda of: [seen.append("data"), piece(of)][1])
    monkeypatch.setattr(Check, "passes", lambda *args: [seen.append("ids"), passes(*args)][1])
    return expected, seen


def test_a_start_reads_no_file_that_the_system_says_is_unchanged(path, settled):
    expected, seen = settled
    module = data(path)
    assert seen == []
    assert batches(module) == expected
    assert seen == ["ids"] * len(module.training.dataset.store.blocks)  # each block once, when it is first needed
    copy = pickle.loads(pickle.dumps(module.training.dataset.store))
    assert copy.ids([0]).tolist() == module.training.dataset.store.ids([0]).tolist()
    assert len(seen) == len(copy.blocks) + 1


@pytest.mark.parametrize("how", ["written", "replaced", "touched"])
def test_a_file_that_was_written_to_is_read_whatever_its_size_and_time(path, settled, how):
    expected, seen = settled
    times, content = path.stat().st_mtime_ns, path.read_bytes()
    if how == "replaced":
        path.rename(path.with_name("old.jsonl"))
    if how != "touched":
        path.write_bytes(content.replace(b'"7+7="', b'"7-7="'))
    os.utime(path, ns=(times, times))
    module = data(path)
    assert "data" in seen
    assert tk.build().decode(module._sets["train"].pair(7)[0]) == ("7+7=" if how == "touched" else "7-7=")
    assert (batches(module) == expected) is (how == "touched")


def test_a_file_of_ids_that_was_written_to_is_checked_at_the_start(path, folder, settled, caplog):
    expected, _ = settled
    (file,) = folder.glob("*.tokens")
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with caplog.at_level(logging.INFO):
        assert batches(data(path)) == expected
    assert "checksum does not match" in caplog.text


@pytest.mark.usefixtures("settled")
def test_damage_that_no_time_tells_of_is_one_sentence_when_it_is_met(path, folder):
    (file,) = folder.glob("*.tokens")
    (header,) = folder.glob("*.json")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    known = json.loads(header.read_text())
    known["stamp"] = unchanged.stamp(file, settled=False)
    header.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"tokens` is damaged: remove it, and start again"):
        batches(data(path))


def test_a_file_that_changes_while_its_rows_are_read_is_read_again(path, monkeypatch):
    """It was hashed before; its first content comes back afterwards, with the same hash and other rows kept."""
    monkeypatch.setattr(unchanged, "_SETTLED", 0)
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 8)
    content, load = b"".join(path.read_bytes().splitlines(keepends=True)[:16]), token_cache.load_pairs
    path.write_bytes(content)

    def changing(*args, **options):
        path.write_bytes(content.replace(b'"7+7="', b'"7-7="'))
        return load(*args, **options)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(token_cache, "load_pairs", changing)
        assert tk.build().decode(data(path)._sets["train"].pair(7)[0]) == "7-7="
    path.write_bytes(content)
    assert tk.build().decode(data(path)._sets["train"].pair(7)[0]) == "7+7="


def test_a_file_that_has_just_changed_is_read_again(path):
    """Another change could have the same time."""
    assert unchanged.stamp(path) is None
    os.utime(path, (1, 1))
    assert unchanged.stamp(path) is None
