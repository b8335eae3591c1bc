"""No process outlives its run: when one of several is gone, the others end, soon and with one sentence."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerStatus

from lit_dpo import watch
from tests import runs

pytestmark = runs.QUIET
slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def start(folder, options, processes=2, **environment):
    """The processes of a run, started as by torchrun, each with a file for what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    command, found = [sys.executable, "-m", "tests.interrupted", str(folder), json.dumps(options)], []
    for rank in range(processes):
        with folder.with_name(f"{folder.name}_{rank}.txt").open("w") as said:
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            found.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT))
    return found


def said(folder, rank):
    return folder.with_name(f"{folder.name}_{rank}.txt").read_text()


def ends(processes, limit):
    """The statuses of processes that must end within so many seconds."""
    try:
        end = time.monotonic() + limit
        return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def plan(folder, **more):
    pairs = runs.pairs_file(folder, 25)
    return {"file": pairs, "batch_size": 2, "strategy": "ddp", "devices": 2, "every": 1000, **more}


def left(folder):
    """Processes whose command names a folder, data loader workers included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def wait_until(condition, limit):
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    ("kind", "rank", "strategy"),
    [
        pytest.param("kill", 0, "fsdp2", marks=slow),
        pytest.param("kill", 1, "ddp", marks=slow),
        pytest.param("fail", 0, "fsdp2", marks=slow),
        pytest.param("fail", 1, "ddp", marks=slow),
    ],
)
def test_the_others_end_when_one_is_killed_or_fails(tmp_path, kind, rank, strategy):
    """But not while one is only busy. Three processes: the third learns of it as well. Workers are gone, too."""
    folder, count = tmp_path / "run", 3 if (kind, rank) == ("kill", 1) else 2
    workers = 1 if count == 3 else 0
    options = plan(tmp_path, strategy=strategy, devices=count, mishap=[kind, rank], workers=workers)
    codes = ends(start(folder, options, count), 60)
    assert codes.pop(rank) == (-signal.SIGKILL if kind == "kill" else 1)
    assert codes == [1] * len(codes)
    what = {"kill": "of this run is gone", "fail": "failed (OSError: the disk is full)"}[kind]
    for other in {*range(count)} - {rank}:
        text = said(folder, other)
        assert f"Process {rank} {what}, so process {other} ends too." in text
        assert "Traceback" not in text
    assert wait_until(lambda: not left(folder), 30)


@pytest.mark.slow
def test_no_process_waits_for_a_first_one_that_is_gone(tmp_path):
    """Killed while the one it started is still importing, so that there is no connection between them yet."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.interrupted", str(folder), json.dumps(plan(tmp_path))]
    first = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert wait_until(lambda: len(left(folder)) == 2, 60)
        first.kill()
        first.wait()
        assert wait_until(lambda: not left(folder), 60)
    finally:
        for process in left(folder):
            os.kill(process, signal.SIGKILL)


@slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sigterm_to_one_process_alone_ends_the_command_with_143(tmp_path, strategy):
    """Lightning starts the second process; it is that one that gets the signal."""
    folder = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("lit-dpo")), "fit", "-c", "configs/dpo.yaml", "-c", "tests/conf/tiny.yaml",
        "-c", "tests/conf/endless.yaml",
        "--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        metrics = folder / "version_0" / "metrics.csv"
        assert wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 60)
        [second] = set(left(folder)) - {first.pid}
        os.kill(second, signal.SIGTERM)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 143, err[-3000:]
        assert b"Stopped by SIGTERM after step" in err
        assert (folder / "version_0" / "checkpoints" / "last.ckpt").exists()
        assert wait_until(lambda: not left(folder), 20)
    finally:
        for process in left(folder):
            os.kill(process, signal.SIGKILL)


class Connected:
    """The first process of three as far as the watch is concerned, and its peers' ends of the connections."""

    def __init__(self):
        self.port = self.token = None
        strategy = SimpleNamespace(broadcast=self.note)
        state = SimpleNamespace(status=TrainerStatus.RUNNING)
        self.trainer = SimpleNamespace(global_rank=0, world_size=3, num_nodes=1, strategy=strategy, state=state)
        self.watch = watch._Watch(object(), self.trainer)

    def note(self, shared):
        self.port, self.token = shared
        return shared

    def connect(self, *lines):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(b"".join(line + b"\n" for line in lines))
        return connection

    def hello(self, rank):
        return json.dumps({"token": self.token, "rank": rank}).encode()

    def reasons(self):
        return [sentence.partition(",")[0] for _, sentence, _ in self.watch._reasons]


def test_what_a_connection_says_and_how_it_ends_is_told_apart():
    """Strangers are nobody; a good-bye is an end in order; an end without one is a loss, told to the others."""
    first = Connected()
    third = first.connect(first.hello(2))
    for lines in ([b"GET / HTTP/1.1", b""], [b"[]"], [b"null"], [b'{"token": "", "rank": 1, "failed": "ha"}'], []):
        first.connect(*lines).close()
    first.connect(b"x" * 100_000).close()
    first.connect(first.hello(1), b'{"bye": true}').close()
    assert not wait_until(first.reasons, 1)
    first.connect(first.hello(1)).close()
    assert wait_until(first.reasons, 5) == ["Process 1 of this run is gone"]
    assert json.loads(third.recv(1000)) == {"failed": "Process 1 of this run is gone", "run": None}
    third.sendall(b'{"failed": "Process 2 failed (OSError: full)", "run": 1}\n')
    assert wait_until(lambda: len(first.reasons()) == 2, 5)
    first.watch.runs = 2  # another run has begun since: that failure is none of its own, the loss is
    with pytest.raises(watch.PeerLostError, match="Process 1 of this run is gone, so process 0 ends too"):
        first.watch.failed(RuntimeError("Connection closed by peer"))
    first.watch.failed(ValueError("its own"))  # and is told to the others
    told = b""
    while b"Process 0 failed (ValueError: its own)" not in told:  # behind what it had said itself
        told += third.recv(1000) or pytest.fail("the connection has ended")
    third.close()
    third.close()
