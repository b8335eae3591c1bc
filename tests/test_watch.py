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

import pytest

from tests import runs

pytestmark = runs.QUIET
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
    ("kind", "rank", "strategy", "sentence"),
    [
        ("kill", 0, "fsdp2", "Process 0 of this run is gone, so process 1 ends too."),
        pytest.param("kill", 1, "ddp", "Process 1 of this run is gone, so process 0 ends too.", marks=pytest.mark.slow),
        ("fail", 0, "fsdp2", "Process 0 failed (OSError: the disk is full), so process 1 ends too."),
        ("fail", 1, "ddp", "Process 1 failed (OSError: the disk is full), so process 0 ends too."),
    ],
)
def test_the_others_end_when_one_is_killed_or_fails(tmp_path, kind, rank, strategy, sentence):
    """But not while one is only busy. Three processes: the third learns of it as well. Workers are gone, too."""
    folder, count = tmp_path / "run", 3 if (kind, rank) == ("kill", 1) else 2
    workers = 1 if count == 3 else 0
    options = plan(tmp_path, strategy=strategy, devices=count, mishap=[kind, rank], workers=workers)
    codes = ends(start(folder, options, count), 60)
    assert codes.pop(rank) == (-signal.SIGKILL if kind == "kill" else 1)
    assert codes == [1] * len(codes)
    for other in {*range(count)} - {rank}:
        text = said(folder, other)
        assert sentence.replace("process 0 ends", f"process {other} ends") in text
        assert "Traceback" not in text
    assert wait_until(lambda: not left(folder), 30)


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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sigterm_to_one_process_alone_ends_the_command_with_143(tmp_path, strategy):
    """Lightning starts the second process; it is that one that gets the signal."""
    folder = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("lit-dpo")), "fit", "-c", "configs/dpo.yaml", "-c", "tests/conf/tiny.yaml",
        "--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.default_root_dir", str(folder),
        "--trainer.max_epochs", "500", "--trainer.max_steps", "-1",
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
