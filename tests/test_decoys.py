"""However a run fails, what it did not make is still there afterwards, byte for byte."""

import os

import pytest
from lightning.pytorch.loggers import Logger

from lit_dpo.cli import main
from tests import runs
from tests.test_cli import built, command, quick  # noqa: F401 - fixtures

pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.usefixtures("quick"),
]

NAMES = ("metrics.csv", "hparams.yaml", "config.yaml", "last.ckpt", "DONE", "notes.txt", ".probe", "export.ckpt")


def plant(folder):
    """What a user may have in a folder: files, some with names that a run uses too, folders, links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(f"mine: {folder.name}/{name}\0".encode())
    (folder / "empty").mkdir()
    (folder / "deep" / "checkpoints").mkdir(parents=True)
    (folder / "deep" / "checkpoints" / "last.ckpt").write_bytes(b"mine, deep")
    (folder / "link").symlink_to(folder / "notes.txt")
    (folder / "broken_link").symlink_to("nowhere")


def seen(folder):
    """Everything below a folder, by path: a folder, a link's target, or a file's bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = what
    return found


class Elsewhere(Logger):
    """As Weights & Biases or MLflow: a logger of another kind, with a folder of its own or none."""

    def __init__(self, save_dir=None):
        super().__init__()
        self.folder, self.params, self.values = save_dir, {}, []

    name, version = "elsewhere", "abc"
    save_dir = property(lambda self: self.folder)

    def log_metrics(self, metrics, step=None):
        self.values.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.params.update(params)


def csv_logger(save_dir=".", name="", version=None):
    given = {"save_dir": save_dir, "name": name, "version": version}
    more = [f"--trainer.logger.{key}={value}" for key, value in given.items() if value is not None]
    return ["--trainer.logger", "CSVLogger", *more]


MISSING = ["--data.train", "missing.jsonl"]
ELSEWHERE = ["--allow-import", "tests", "--trainer.logger", "tests.test_decoys.Elsewhere"]

# Command-line options of a fit in the folder `work`, full of decoys, with the run's root in `work/root`. All fail.
MISTAKES = {
    "csv logger over the folder itself": [*MISSING, *csv_logger(version="")],
    "csv logger over a folder of mine": [*MISSING, *csv_logger(version="exp1")],
    "csv logger with the save_dir of mine": [*MISSING, *csv_logger("exp3", version="")],
    "csv logger over an existing version": [*MISSING, *csv_logger("root", version="0")],
    "csv logger beside the runs": [*MISSING, *csv_logger("root")],
    "csv logger of its own": [*MISSING, *csv_logger("own", "lightning_logs")],
    "csv logger above": [*MISSING, *csv_logger("exp3/deep", version="..")],
    "no logger": [*MISSING, "--trainer.logger", "false"],
    "the default logger": [*MISSING, "--trainer.logger", "true"],
    "two loggers": [*MISSING, "--config", "two_loggers.yaml"],
    "a logger without a folder": [*MISSING, *ELSEWHERE],
    "a logger with a folder of mine": [*MISSING, *ELSEWHERE, "--trainer.logger.save_dir", "exp1"],
    "missing file": MISSING,
    "bad value": ["--model.loss.beta", "-1"],
    "bad value found by the trainer": ["--trainer.accelerator", "gpus"],
    "bad value found with the model": ["--model.loss", "IntermediateLoss", "--model.loss.layers", "[7]"],
    "bad value found at the start": ["--trainer.precision", "bf16-true"],
    "broken row": ["--data.train", "notes.txt"],
    "bad checkpoint": ["--ckpt_path", "notes.txt"],
    "bad checkpoint in a folder of mine": ["--ckpt_path", "root/version_0/last.ckpt"],
    "missing checkpoint": ["--ckpt_path", "none.ckpt"],
    "last without a run": ["--ckpt_path", "last"],
    "unwritable root": ["--trainer.default_root_dir", "notes.txt/run"],
    "root that is a file": ["--trainer.default_root_dir", "notes.txt"],
    "unwritable checkpoints": ["--config", "unwritable.yaml"],
    "root here": ["--trainer.default_root_dir", ".", *MISSING],
    "root above": ["--trainer.default_root_dir", "exp1/..", *MISSING],
    "linked root": ["--trainer.default_root_dir", "linked", *MISSING],
    "a new root": ["--trainer.default_root_dir", "deep/new/root", *MISSING],
    "export in the way": ["--config", "export.yaml"],
    "exception checkpoint over mine": ["--config", "exception.yaml", *MISSING],
    "stepwise": ["--config", "stepwise.yaml", "--data.partition.order", "[nothing]"],
    "stepwise with a csv logger over mine": [
        "--config", "stepwise.yaml", "--data.partition.order", "[nothing]", *csv_logger(version=""),
    ],
}  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder full of decoys, which is the current one; beside it another."""
    folder = tmp_path / "work"
    for place in (tmp_path / "beside", folder, folder / "exp1", folder / "exp3", folder / "root"):
        plant(place)
    for name in ("version_0", "version_2", "version_x"):
        plant(folder / "root" / name)
    (folder / "root" / "version_3").write_text("a file")
    (folder / "linked").symlink_to("root", target_is_directory=True)
    csv = "{class_path: CSVLogger, init_args: {save_dir: %s, name: '', version: ''}}"
    texts = {
        "two_loggers": f"trainer: {{logger: [{csv % 'fresh'}, {csv % 'exp1'}]}}",
        "unwritable": "trainer: {callbacks: [{class_path: LastCheckpoint, init_args: {dirpath: notes.txt}}]}",
        "export": f"trainer: {{callbacks: [{{class_path: ExportModel, init_args: {{folder: {folder}/exp1}}}}]}}",
        "exception": "trainer: {callbacks: [{class_path: OnExceptionCheckpoint, "
        "init_args: {dirpath: ., filename: export}}]}",
        "stepwise": "data: {partition: BySource}",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(folder)
    return folder


def fails(args, code=2):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == code


def new(before, folder):
    """What is there now and was not before; every decoy must be as it was."""
    after = seen(folder)
    assert {name: after.get(name) for name in before} == before
    return sorted(after.keys() - before.keys())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_deletes_nothing_and_leaves_nothing(work, tmp_path, mistake):
    before = seen(tmp_path)
    fails(command("fit", "root", "dpo", *MISTAKES[mistake]))
    left = new(before, tmp_path)
    if "csv logger" in mistake or "two loggers" in mistake:  # what a logger of the user's makes is left alone
        left = [name for name in left if not name.startswith(("work/own", "work/fresh"))]
    assert left == []
