"""Scoring the reference: a pass that is killed goes on where it stood and ends with the same values, bit for bit."""

import json
import logging
import os
import pty
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lit_dpo.references.cached as subject
from lit_dpo import CachedReference, IntermediateLoss, LDDPOLoss, Scorer
from lit_dpo.checkpoints.journal import Journal
from lit_dpo.checkpoints.tensor_store import TensorStore
from lit_dpo.references.table import LogpsTable
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")]
ROWS, BATCH = 120, 2
ROOT = Path(__file__).parents[1]


def start(folder, cache, kill_at=None, callbacks=(), **options):
    """A fit without a step, which scores the reference; kills its own process at a batch."""
    calls = []
    original = Scorer.__call__

    def score(scorer, model, batch):
        if not scorer.per_token:  # of the audit at the start
            return original(scorer, model, batch)
        calls.append(len(batch))
        if kill_at is not None and len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(scorer, model, batch)

    reference = CachedReference(str(cache), audit_rows=0)
    module = runs.module(reference=reference, loss=IntermediateLoss(LDDPOLoss(), layers=(1,)))
    data = runs.data(str(folder / "rows.jsonl"), validation=str(folder / "val.jsonl"), eval_batch_size=BATCH)
    Scorer.__call__ = score
    try:
        runs.trainer(folder, max_steps=0, **options).fit(module, data)
    finally:
        Scorer.__call__ = original
    return sum(calls), reference


def killed(*args, **options):
    """The same in a process of its own that is killed."""
    child = os.fork()
    if not child:
        try:
            start(*args, **options)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def table(cache):
    (header,) = cache.glob("*.json")
    identity = json.loads(header.read_text())["identity"]
    return TensorStore(cache, {k: v for k, v in identity.items() if k != "format"}).read()[0]


@pytest.fixture
def place(tmp_path):
    rows = runs.rows(ROWS)
    runs.write(tmp_path / "rows.jsonl", rows[:60] + rows[:3] + rows[60:])  # some stand there twice
    runs.write(tmp_path / "val.jsonl", runs.rows(20, start=ROWS - 5))
    return tmp_path


@pytest.mark.parametrize("batch", [31, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (61, 66))])
def test_a_killed_reference_pass_goes_on_bit_for_bit(place, batch, caplog):
    """At half of the training rows, at their end, and within the validation rows."""
    scored, _ = start(place, place / "whole")
    assert scored == ROWS + 15  # equal rows once
    killed(place, place / "cache", kill_at=batch)
    assert [path.suffix for path in (place / "cache").iterdir()] == [".journal"]
    with caplog.at_level(logging.INFO):
        rest, reference = start(place, place / "cache")
    done = (batch - 1) * BATCH
    assert ROWS + 15 - rest >= 0.9 * done
    assert rest >= ROWS + 15 - done
    assert "rows of a pass that was cut short are there" in caplog.text
    assert reference.scored + reference.reused == ROWS + 3 + 20
    expected, found = table(place / "whole"), table(place / "cache")
    layers = {"last", "layer.1"}
    kept = {"keys", *layers, *(f"{what}.{layer}" for what in ("tokens", "counts") for layer in layers)}
    assert expected.keys() == found.keys() == kept
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {path.suffix for path in (place / "cache").iterdir()} == {".json", ".safetensors"}
    assert start(place, place / "cache")[0] == 0


@pytest.mark.slow
def test_a_pass_killed_again_and_again_loses_little(place):
    start(place, place / "whole")
    for batch in (15, 20, 25):
        killed(place, place / "cache", kill_at=batch)
    rest, _ = start(place, place / "cache")
    assert ROWS + 15 - rest >= 0.9 * BATCH * (14 + 19 + 24)
    expected, found = table(place / "whole"), table(place / "cache")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_passes_at_a_time_neither_spoil_nor_lose_each_others_values(place, monkeypatch):
    """One begins and ends while another is under way, on other rows of the same model."""
    other = place / "other"
    other.mkdir()
    runs.write(other / "rows.jsonl", runs.rows(12, start=500))
    runs.write(other / "val.jsonl", runs.rows(4, start=600))
    original, seen = subject.Pass.keep, []

    def keep(self, block):
        original(self, block)
        if not seen:
            seen.append(True)
            seen.append(start(other, place / "cache")[0])
            assert len(list((place / "cache").glob("*.journal"))) == 1  # that of the pass under way

    monkeypatch.setattr(subject.Pass, "keep", keep)
    start(place, place / "cache")
    assert seen == [True, 16]
    assert not list((place / "cache").glob("*.journal"))
    assert len(table(place / "cache")["keys"]) == ROWS + 15 + 16
    assert start(place, place / "cache")[0] == start(other, place / "cache")[0] == 0


def test_a_cache_that_cannot_be_written_is_noticed_before_scoring(place, monkeypatch):
    (place / "file").write_text("in the way")
    monkeypatch.setattr(subject, "score_rows", lambda *a, **k: pytest.fail("scored in vain"))
    with pytest.raises(OSError, match=r"The reference cache `.*file/cache` cannot be written to .*: name another"):
        start(place, place / "file" / "cache")


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_run(place, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    monkeypatch.setattr(TensorStore, "write", full)
    with caplog.at_level(logging.INFO):
        assert start(place, place / "cache")[0] == ROWS + 15
    assert caplog.text.count("would not survive a kill") == 1
    assert caplog.text.count("could not be kept") == 1


def test_a_cache_that_is_complete_need_not_be_writable(place, monkeypatch):
    start(place, place / "cache")
    monkeypatch.setattr(Journal, "__init__", lambda *a: pytest.fail("written to"))
    assert start(place, place / "cache")[0] == 0


@pytest.mark.slow
def test_a_forged_cache_and_a_forged_journal_are_scored_anew(place, caplog):
    start(place, place / "cache")
    expected = table(place / "cache")
    (header,) = (place / "cache").glob("*.json")
    identity = json.loads(header.read_text())["identity"]
    store = TensorStore(place / "cache", {k: v for k, v in identity.items() if k != "format"})
    short, negative = expected["tokens.last"][1:], torch.full_like(expected["counts.last"], -1)
    for forged in (
        {"a": torch.ones(2)},
        {**expected, "last": expected["last"][1:]},
        {**expected, "tokens.last": short},
        {**expected, "counts.last": negative},
        {name: value for name, value in expected.items() if name != "counts.last"},
    ):
        store.write(forged)
        journal = Journal(store)
        journal.append(forged)
        journal.close()
        with caplog.at_level(logging.INFO):
            assert start(place, place / "cache")[0] == ROWS + 15
        assert "is damaged (it" in caplog.text
        assert torch.equal(table(place / "cache")["last"], expected["last"])


# -- the journal ------------------------------------------------------------------------------------------------------


def blocks(count):
    return [{"keys": torch.full((n + 1, 2), n), "last": torch.rand(n + 1, 2)} for n in range(count)]


def equal(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def test_a_torn_or_damaged_block_ends_a_journal(tmp_path):
    store, ends = TensorStore(tmp_path, {"who": "a test"}), [0]
    journal, written = Journal(store), blocks(3)
    for block in written:
        journal.append(block)
        ends.append(journal.path.stat().st_size)
    journal.close()
    whole, draw = journal.path.read_bytes(), random.Random(0)
    for cut in range(0, len(whole) + 1, 7):
        journal.path.write_bytes(whole[:cut])
        assert equal(Journal.read_all(store)[0], written[: sum(end <= cut for end in ends[1:])])
    for _ in range(100):
        bad, place = bytearray(whole), draw.randrange(len(whole))
        bad[place] ^= 1 << draw.randrange(8)
        journal.path.write_bytes(bytes(bad))
        assert equal(Journal.read_all(store)[0], written[: sum(end <= place for end in ends[1:])])
    journal.path.write_bytes(whole)
    assert equal(Journal.read_all(store)[0], written)
    assert Journal.read_all(TensorStore(tmp_path, {"who": "another"}))[0] == []
    renamed = TensorStore(tmp_path, {"who": "another"})
    journal.path.rename(tmp_path / f"{renamed.key}.x.journal")
    assert Journal.read_all(renamed)[0] == []  # the sum is over who it is of, too


def test_clearing_removes_what_was_read_and_left_behind_alone(tmp_path):
    store = TensorStore(tmp_path, {"who": "a test"})
    left, open_one, grown = (Journal(store) for _ in range(3))
    for journal in (left, open_one, grown):
        journal.append(blocks(1)[0])
    left.close()
    decoys = [tmp_path / name for name in (f"{store.key}.journal", "0.x.journal", "notes.txt", f"{store.key}.x.json")]
    for decoy in decoys:
        decoy.write_text("mine")
    (tmp_path / f"{store.key}.dir.journal").mkdir()
    os.mkfifo(tmp_path / f"{store.key}.fifo.journal")
    found, sizes = Journal.read_all(store)
    assert len(found) == len(sizes) == 3
    grown.append(blocks(1)[0])
    grown.close()
    Journal.clear(sizes)
    assert not left.path.exists()
    assert open_one.path.exists()
    assert grown.path.exists()
    assert all(decoy.read_text() == "mine" for decoy in decoys)
    assert len(list(tmp_path.iterdir())) == 2 + 4 + 2
    assert (open_one.path.stat().st_mode & 0o077) == 0
    open_one.close()


def test_writers_at_the_same_time_leave_a_sound_store_with_everything(tmp_path):
    """Eight processes; each adds a row of its own, forty times over."""
    store, children = TensorStore(tmp_path, {"who": "a test"}), []

    def merge(there, ours):
        return LogpsTable.from_tensors(there).merged(LogpsTable.from_tensors(ours)).tensors()

    for number in range(8):
        child = os.fork()
        if not child:
            code = 1
            try:
                for turn in range(5):
                    row = {"keys": torch.tensor([[number, turn]]), "last": torch.full((1, 2), 1.0)}
                    store.write(row, merge)
                    code = 0 if store.read()[1] is None else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert len(store.read()[0]["keys"]) == 40


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_a_terminal_shows_how_far_the_pass_is_and_a_pipe_nothing(place, monkeypatch, capsys):
    terminal, end = pty.openpty()
    with os.fdopen(end, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setenv("TERM", "xterm")
        start(place, place / "one", enable_progress_bar=True, enable_model_summary=False)
    shown = os.read(terminal, 100000).decode()
    os.close(terminal)
    assert "rows, left:" in shown
    assert f"/{ROWS + 15}" in shown
    monkeypatch.undo()
    capsys.readouterr()
    start(place, place / "two", enable_progress_bar=True)
    said = capsys.readouterr()
    assert "left:" not in said.out + said.err


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(place):
    """One of two is killed in the pass; two go on."""

    def launch(cache, kill_at=0):
        with runs.socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.test_reference_pass", str(place), str(cache), str(kill_at)]
        started = [
            subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        try:
            if kill_at:
                assert started[1].wait(120) == -signal.SIGKILL
            else:
                assert [process.wait(120) for process in started] == [0, 0]
        finally:
            for process in started:
                process.kill()
                process.wait()

    launch(place / "whole")
    launch(place / "cache", kill_at=17)
    assert not list((place / "cache").glob("*.json"))
    launch(place / "cache")
    expected, found = table(place / "whole"), table(place / "cache")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    scored = json.loads((place / "cache.scored").read_text())
    assert scored <= ROWS + 20 + 3 - 0.9 * 2 * BATCH * 16


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, kill_at = int(os.environ["RANK"]), int(sys.argv[3])
    more = {"strategy": "ddp", "devices": 2}
    _, reference = start(Path(sys.argv[1]), Path(sys.argv[2]), kill_at if rank and kill_at else None, **more)
    if not rank:
        Path(f"{sys.argv[2]}.scored").write_text(json.dumps(reference.scored))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
