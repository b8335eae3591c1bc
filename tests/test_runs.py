"""Folders of runs: each run makes its own, and the newest is the one with the highest number."""

import csv
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lit_dpo.runs import RunFolder, newest_run, rotate_metrics
from tests import runs
from tests.test_cli import command

ROOT = Path(__file__).parents[1]


def test_a_number_is_claimed_once_however_many_start_together(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: RunFolder.claim(tmp_path / "new" / "root").path.name, range(64)))
    assert sorted(claimed) == sorted(f"version_{n}" for n in range(64))


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_gaps_stay_gaps_so_that_the_newest_is_last(tmp_path, kind):
    for name in ("version_0", "version_x", "version_9_old"):
        (tmp_path / name).mkdir()
    top = tmp_path / "version_7"
    {"folder": top.mkdir, "file": top.touch, "broken link": lambda: top.symlink_to("nowhere")}[kind]()
    run = RunFolder.claim(tmp_path).path
    assert run == tmp_path / "version_8"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert newest_run(tmp_path) == run


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for root in ("file", "file/deep"):
        with pytest.raises(OSError, match=r"`.*file.*`.*: choose another `default_root_dir`"):
            RunFolder.claim(tmp_path / root)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("inside", "goes"),
    [
        ([], True),
        (["config.yaml", "hparams.yaml", "checkpoints/"], True),
        (["config.yaml", "metrics.csv"], False),
        (["config.yaml", "checkpoints/mine.txt"], False),
        (["config.yaml", "mine.txt"], False),
        (["mine/"], False),
        (["config.yaml/"], False),
        (["checkpoints"], False),
    ],
)
def test_a_folder_goes_only_with_what_a_run_writes_at_its_start(tmp_path, inside, goes):
    run = RunFolder.claim(tmp_path / "root")
    for name in inside:
        path = run.path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(name)
    before = sorted(run.path.rglob("*"))
    run.abandon()
    assert (tmp_path / "root").exists() != goes
    assert sorted(run.path.rglob("*")) == ([] if goes else before)


def test_a_folder_that_somebody_else_made_stays(tmp_path):
    (tmp_path / "version_0").mkdir()
    RunFolder(tmp_path / "version_0").abandon()
    assert (tmp_path / "version_0").exists()
    (tmp_path / "root").mkdir()
    RunFolder.claim(tmp_path / "root").abandon()
    assert list((tmp_path / "root").iterdir()) == []


def test_links_in_a_run_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine")
    for link, target in (("checkpoints", "mine"), ("config.yaml", "mine/config.yaml")):
        run = RunFolder.claim(tmp_path)
        (run.path / link).symlink_to(tmp_path / target)
        run.abandon()
        assert (run.path / link).is_symlink()
    assert (tmp_path / "mine" / "config.yaml").read_text() == "mine"


def test_earlier_metrics_are_never_written_over(tmp_path):
    for name in ("metrics.csv", "metrics_1.csv", "metrics_best.csv"):
        (tmp_path / name).write_text(name)
    rotate_metrics(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {n: n for n in ("metrics_1.csv", "metrics_best.csv")} | {"metrics_2.csv": "metrics.csv"}


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dpo", "sdpo"])
def test_runs_of_several_processes_that_start_together_get_a_folder_each(tmp_path, config):
    """Two with Lightning's own launcher, one with torchrun."""
    files = [runs.pairs_file(tmp_path, 12, f"{n}.jsonl", start=20 * n) for n in (1, 2)]
    more = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.train", str(files).replace("'", '"')]
    more += ["--data.batch_size", "2", "--trainer.accumulate_grad_batches", "1"]
    fit = command("fit", tmp_path / "root", config, *more)
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m", "lit_dpo"]
    started = []
    for module in (["lit_dpo"], ["lit_dpo"], torchrun):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": port()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *module, *fit], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    logs = [process.communicate(timeout=200)[0] for process in started]
    # (Not the status: a process of PyTorch's on a CPU aborts now and then when all is done.)
    names = sorted(path.name for path in (tmp_path / "root").iterdir())
    assert names == ["version_0", "version_1", "version_2"], "\n".join(log[-3000:] for log in logs)
    for name in names:
        run = tmp_path / "root" / name
        parts = [run / "partition_0" / "version_0", run / "partition_1" / "version_0"] if config == "sdpo" else [run]
        assert not list(run.rglob("version_1"))
        for part in parts:
            last = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)
            assert last["global_step"] == 2
            with open(part / "metrics.csv", encoding="utf-8") as file:
                assert len([row for row in csv.DictReader(file) if row["train/loss"]]) == 2
