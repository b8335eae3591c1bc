"""Folders of runs: each run makes its own, and the newest is the one with the highest number."""

import csv
import os
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_dpo.checkpoints.run import Run
from lit_dpo.cli import main
from tests import runs
from tests.test_cli import built, command, fails, quick  # noqa: F401 - fixtures
from tests.test_decoys import ELSEWHERE, Elsewhere, csv_logger, seen

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick"),
]
ROOT = Path(__file__).parents[1]


def test_a_number_is_claimed_once_however_many_start_together(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: Run.claim(tmp_path / "new" / "root").folder.name, range(64)))
    assert sorted(claimed) == sorted(f"version_{n}" for n in range(64))


def test_a_run_knows_what_is_where_in_its_folder(tmp_path):
    plain, steps = Run.claim(tmp_path), Run.claim(tmp_path)
    for path in ("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "config.yaml"):
        (plain.folder / path).parent.mkdir(exist_ok=True)
        (plain.folder / path).touch()
    for number in (0, 2, 10):
        inner = steps.folder / f"partition_{number}" / "version_0"
        (inner / "checkpoints").mkdir(parents=True)
        (inner / "config.yaml").touch()
        (inner / "checkpoints" / ("last.ckpt" if number < 10 else "previous.ckpt")).touch()
    (steps.folder / "partition_11_old").mkdir()
    assert [run.folder.name for run in Run.all_in(tmp_path)] == ["version_0", "version_1"]
    assert (plain.last, plain.config) == (plain.checkpoints / "last.ckpt", plain.folder / "config.yaml")
    assert (plain.is_stepwise, steps.is_stepwise) == (False, True)
    assert [path.name for path in steps.partitions] == ["partition_0", "partition_2", "partition_10"]
    assert steps.last == steps.folder / "partition_10" / "version_0" / "checkpoints" / "previous.ckpt"
    assert steps.config == steps.folder / "partition_0" / "version_0" / "config.yaml"
    assert Run.of(plain.last) == Run.named(plain.checkpoints) == Run.named(plain.folder) == plain
    assert Run.named(tmp_path) == Run.newest(tmp_path) == steps
    assert (Run.of(tmp_path / "a.ckpt"), Run.named(plain.last)) == (None, None)
    assert (plain.is_in(tmp_path), plain.is_in(tmp_path.parent), Run.of(steps.last).is_in(tmp_path)) == (
        True,
        *[False] * 2,
    )


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_gaps_stay_gaps_so_that_the_newest_is_last(tmp_path, kind):
    for name in ("version_0", "version_x", "version_9_old"):
        (tmp_path / name).mkdir()
    top = tmp_path / "version_7"
    {"folder": top.mkdir, "file": top.touch, "broken link": lambda: top.symlink_to("nowhere")}[kind]()
    run = Run.claim(tmp_path).folder
    assert run == tmp_path / "version_8"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert Run.newest(tmp_path).folder == run


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for root in ("file", "file/deep"):
        with pytest.raises(OSError, match=r"`.*file.*`.*: choose another `default_root_dir`"):
            Run.claim(tmp_path / root)
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
    run = Run.claim(tmp_path / "root")
    for name in inside:
        path = run.folder / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(name)
    before = sorted(run.folder.rglob("*"))
    run.abandon()
    assert (tmp_path / "root").exists() != goes
    assert sorted(run.folder.rglob("*")) == ([] if goes else before)


def test_a_folder_that_somebody_else_made_stays(tmp_path):
    (tmp_path / "version_0").mkdir()
    Run.make(tmp_path / "version_0").abandon()
    assert (tmp_path / "version_0").exists()
    (tmp_path / "root").mkdir()
    Run.claim(tmp_path / "root").abandon()
    assert list((tmp_path / "root").iterdir()) == []


def test_links_in_a_run_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine")
    for link, target in (("checkpoints", "mine"), ("config.yaml", "mine/config.yaml")):
        run = Run.claim(tmp_path)
        (run.folder / link).symlink_to(tmp_path / target)
        run.abandon()
        assert (run.folder / link).is_symlink()
    assert (tmp_path / "mine" / "config.yaml").read_text() == "mine"


def test_earlier_metrics_are_never_written_over(tmp_path):
    for name in ("metrics.csv", "metrics_1.csv", "metrics_best.csv"):
        (tmp_path / name).write_text(name)
    Run(tmp_path).rotate_metrics()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {n: n for n in ("metrics_1.csv", "metrics_best.csv")} | {"metrics_2.csv": "metrics.csv"}


# -- the same folder whatever the logger ------------------------------------------------------------------------------

OPTIONS = {
    "model.loss.class_path": "lit_dpo.losses.DPOLoss", "model.optimizer.init_args.lr": 0.01, "data.batch_size": 8,
    "data.train": "quickstart", "trainer.max_steps": 2, "trainer.accumulate_grad_batches": 4, "seed_everything": 0,
}  # fmt: skip
LOGGERS = {
    "default": [],
    "none": ["--trainer.logger", "false"],
    "true": ["--trainer.logger", "true"],
    "csv": csv_logger("own", "lightning_logs"),
    "csv in a fixed folder": csv_logger("own", "fixed", ""),
    "no folder": ELSEWHERE,
    "a folder elsewhere": [*ELSEWHERE, "--trainer.logger.save_dir", "own"],
    "tensorboard": ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "own"],
    "wandb": [
        "--trainer.logger",
        "WandbLogger",
        "--trainer.logger.offline",
        "true",
        "--trainer.logger.save_dir",
        "own",
    ],
    "mlflow": ["--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", "file:./own"],
}
SHORT = ("default", "csv in a fixed folder")  # the others are like one of these
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def logged(path, name):
    with open(path, encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    "logger", [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in LOGGERS]
)
def test_a_run_keeps_its_folder_and_resumes_whatever_the_logger(tmp_path, monkeypatch, logger):
    if logger in PACKAGES:
        pytest.importorskip(PACKAGES[logger])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Elsewhere, "made", [])
    args = command("fit", "root", "dpo", "--model.optimizer.lr", 0.01, "--trainer.val_check_interval", 4)
    main([*args, *LOGGERS[logger]])
    run = tmp_path / "root" / "version_0"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "own"] == ["root"]
    assert logged(run / "metrics.csv", "lr") == pytest.approx([0.005, 0.01])  # as each step used it: one warms up
    assert len(logged(run / "metrics.csv", "val/loss")) == 2
    kept = flat(yaml.safe_load((run / "hparams.yaml").read_text()))
    for name, value in OPTIONS.items():
        assert kept[name.removeprefix("model.")] == value or name == "model.loss.class_path"
    main([*args, *LOGGERS[logger], "--trainer.max_steps", "3", "--ckpt_path", "last", "--allow-changes"])
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["version_0"]
    assert len(logged(run / "metrics_0.csv", "train/loss")) == 2
    assert len(logged(run / "metrics.csv", "train/loss")) == 1
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    for one, steps in zip(Elsewhere.made, (2, 1), strict=False):
        assert len([values for values in one.values if "train/loss" in values]) == steps
        assert flat(one.params)["optimizer.init_args.lr"] == 0.01
        assert flat(one.params)["data.train"] == "quickstart"
    assert len(Elsewhere.made) == (2 if "folder" in logger and "fixed" not in logger else 0)
    if logger == "csv in a fixed folder":
        fixed = tmp_path / "own" / "fixed"
        assert [len(logged(fixed / name, "train/loss")) for name in ("metrics_0.csv", "metrics.csv")] == [2, 1]
    if logger == "csv":
        names = sorted(path.name for path in (tmp_path / "own" / "lightning_logs").iterdir())
        assert names == ["version_0", "version_1"]


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: v for name, value in values.items() for key, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()}


# -- runs by their folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory, built):  # noqa: F811
    """A run whose best checkpoint is its first, and whose last is another."""
    folder = tmp_path_factory.mktemp("done")
    more = ("--model.optimizer.lr", 0.01, "--trainer.val_check_interval", 4, "--trainer.max_steps", 3)
    main(command("fit", folder / "root", "dpo", *more))
    [best] = (folder / "root" / "version_0" / "checkpoints").glob("step=*.ckpt")
    return more, best


@pytest.fixture
def renamed(done, tmp_path, monkeypatch):
    """That run under another name."""
    more, best = done
    shutil.copytree(best.parents[2], tmp_path / "runs" / "moved")
    monkeypatch.chdir(tmp_path)
    return more, Path("runs/moved/version_0/checkpoints") / best.name


def test_a_renamed_run_resumes_and_exports_its_best(renamed, done, capsys, tmp_path):
    more, best = renamed
    others = seen(done[1].parents[2])
    args = command("fit", "runs/moved", "dpo", *more, "--trainer.max_steps", 4, "--allow-changes")
    main([*args, "--ckpt_path", "last", "--trainer.callbacks+=ExportModel"])
    said = capsys.readouterr().out
    kept = list(best.parent.glob("step=*.ckpt"))
    assert len(kept) == 1  # the one before was found, and removed if it was beaten
    assert str(kept[0]) in said.partition("Best checkpoint: ")[2]
    assert (best.parents[1] / "export" / "model.safetensors").exists()
    assert seen(done[1].parents[2]) == others


@pytest.mark.parametrize("given", ["runs/moved/version_0", "runs/moved/version_0/checkpoints", "runs/moved/"])
def test_a_fit_resumes_from_a_folder(renamed, given):
    more, best = renamed
    args = command("fit", "runs/moved", "dpo", *more, "--trainer.max_steps", 4, "--allow-changes")
    main([*args, "--ckpt_path", given])
    assert [path.name for path in Path("runs/moved").iterdir()] == ["version_0"]
    assert torch.load(best.with_name("last.ckpt"), weights_only=True)["global_step"] == 4


GIVEN = {
    "a run": ["runs/moved/version_0", "out"],
    "its checkpoints": ["runs/moved/version_0/checkpoints/", "out"],
    "where it is": ["runs/moved", "out"],
    "last": ["last", "out"],
    "last in a root": ["last", "out", "--root", "runs/moved"],
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("which", ["best", "last"])
def test_export_takes_the_best_checkpoint_of_a_run_or_else_the_last(renamed, capsys, given, which):
    best = renamed[1]
    if which == "last":
        best.unlink()
    path = best if which == "best" else best.with_name("last.ckpt")
    main(["export", *GIVEN[given]])
    said = capsys.readouterr().out
    assert f"Exporting the {which} checkpoint of its run" in said
    assert f"`{path}`" in said
    assert "Wrote the policy to `out`: README.md, chat_template.jinja, config.json" in said
    state = torch.load(path, weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained("out")
    assert runs.same(runs.weights(model), {k.removeprefix("policy."): v for k, v in state.items()})
    assert best.name.startswith("step=3") or which == "last" or not runs.same(state, load(best.with_name("last.ckpt")))
    next_command = shlex.split(said.partition("Next: ")[2])
    assert next_command[:2] == ["python", "-c"]
    compile(next_command[2], "next", "exec")


def load(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_export_says_what_it_misses(renamed, capsys):
    Path("runs/other").mkdir()
    assert "No checkpoint of a run is in `runs/other`" in fails(capsys, ["export", "runs/other", "out"])
    shutil.rmtree("runs/moved")
    line = fails(capsys, ["export", "last", "out"])
    assert "no run with a checkpoint is in `.`, `runs/other`. Give `--root`" in line
    assert "give `last`, or leave `root` out" in fails(capsys, ["export", "a.ckpt", "out", "--root", "runs"])
    assert not Path("out").exists()


# -- several processes ------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dpo", "sdpo"])
def test_a_sharded_run_starts_under_torchrun(tmp_path, config):
    """As the manual starts it on several nodes: the processes agree on a folder before there is anything to shard."""
    files = [runs.pairs_file(tmp_path, 12, f"{n}.jsonl", start=20 * n) for n in (1, 2)]
    more = ["--config", "configs/overlays/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    more += ["--trainer.devices", "2", "--data.train", str(files).replace("'", '"'), "--data.batch_size", "2"]
    fit = command("fit", tmp_path / "root", config, *more)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m",
         "lit_dpo", *fit], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200,
    )  # fmt: skip
    [run] = (tmp_path / "root").iterdir()
    last = run / ("partition_1/version_0" if config == "sdpo" else ".") / "checkpoints"
    assert (last / "last.ckpt").exists(), done.stdout[-3000:]
    assert "AssertionError" not in done.stdout
