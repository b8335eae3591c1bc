"""However a run fails, what it did not make is still there afterwards, byte for byte."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedTokenizerBase

import lit_dpo.checkpoints.io
from lit_dpo import PreferenceModule
from lit_dpo.callbacks import BestCheckpoint, RunSummary
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

    made = []  # noqa: RUF012

    def __init__(self, save_dir=None):
        super().__init__()
        self.folder, self.params, self.values = save_dir, {}, []
        self.made.append(self)

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


@pytest.mark.every(3)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_deletes_nothing_and_leaves_nothing(work, tmp_path, mistake):
    before = seen(tmp_path)
    fails(command("fit", "root", "dpo", *MISTAKES[mistake]))
    left = new(before, tmp_path)
    if "csv logger" in mistake or "two loggers" in mistake:  # what a logger of the user's makes is left alone
        left = [name for name in left if not name.startswith(("work/own", "work/fresh"))]
    assert left == []


# -- runs that get further --------------------------------------------------------------------------------------------


def at(monkeypatch, moment, act, kind=RunSummary):
    """Have something happen at a moment of a run."""
    monkeypatch.setattr(kind, moment, lambda *args, **kwargs: act(), raising=False)


def refuse(error=ValueError):
    raise error("No space left on device")


def of_mine():
    """The newest run's folder; a user puts something into it, and rearranges what is around it."""
    run = Path("root/version_4")
    (run / "mine.txt").write_text("mine, in the run")
    Path("root/version_2").rename("root/version_9")
    shutil.move("root/version_0", "root/moved")
    raise ValueError("something of the user's")


def interrupt(number):
    return lambda: os.kill(os.getpid(), number)


def broken_disk(monkeypatch):
    monkeypatch.setattr(lit_dpo.checkpoints.io.torch, "save", lambda *args, **kwargs: refuse(OSError))


def broken_tokenizer(monkeypatch, act=lambda: refuse(OSError)):
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", lambda *args, **kwargs: act())


def count(number, act):
    """Act the n-th time."""
    calls = []

    def counted():
        calls.append(1)
        if len(calls) == number:
            act()

    return counted


BATCH = "on_train_batch_start"
TWO = ["--data.train", '["one.jsonl", "two.jsonl"]', "--data.validation", "one.jsonl"]
LATER = {
    "user's error before the first step": (lambda patch: at(patch, "on_train_start", refuse), [], 2),
    "user's error in a step": (lambda patch: at(patch, "on_train_batch_end", refuse), [], 2),
    "user's error at the end": (lambda patch: at(patch, "on_fit_end", refuse), [], 2),
    "error of ours": (lambda patch: at(patch, BATCH, lambda: refuse(KeyError)), [], KeyError),
    "what is around it changes": (lambda patch: at(patch, "on_train_start", of_mine), [], 2),
    "full disk": (broken_disk, [], 2),
    "Ctrl-C": (lambda patch: at(patch, BATCH, interrupt(signal.SIGINT)), [], 130),
    "SIGTERM": (lambda patch: at(patch, BATCH, interrupt(signal.SIGTERM)), [], 143),
    "Ctrl-C before training": (lambda patch: at(patch, "on_fit_start", lambda: refuse(KeyboardInterrupt)), [], 130),
    "export fails": (broken_tokenizer, ["--trainer.callbacks+=ExportModel"], 2),
    "export is stopped": (
        lambda patch: broken_tokenizer(patch, interrupt(signal.SIGTERM)), ["--trainer.callbacks+=ExportModel"], 143,
    ),
    "csv logger of its own and an error": (
        lambda patch: at(patch, "on_train_start", refuse), csv_logger("fresh", version=""), 2,
    ),
    "checkpoints of mine": (
        lambda patch: None, ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.dirpath=exp1"], 2,
    ),
    "stepwise, in its second partition": (
        lambda patch: at(patch, "on_train_start", count(2, refuse)), ["--config", "stepwise.yaml", *TWO], 2,
    ),
    "stepwise, in its export": (broken_tokenizer, ["--config", "stepwise.yaml", *TWO], 2),
}  # fmt: skip


@pytest.mark.every(4)
@pytest.mark.parametrize("failure", LATER)
def test_a_run_that_fails_later_deletes_nothing_of_others(work, tmp_path, monkeypatch, failure):
    runs.pairs_file(work, 12, "one.jsonl")
    runs.pairs_file(work, 12, "two.jsonl", start=20)
    before = seen(tmp_path)
    arrange, more, code = LATER[failure]
    arrange(monkeypatch)
    args = command("fit", "root", "dpo", "--trainer.max_steps", 1, *more)
    if isinstance(code, int):
        fails(args, code)
    else:
        with pytest.raises(code):
            main(args)
    for path, name in (("moved", "version_0"), ("version_9", "version_2")):
        if (work / "root" / path).exists():
            (work / "root" / path).rename(work / "root" / name)
            assert (work / "root/version_4/mine.txt").read_text() == "mine, in the run"
    left = new(before, tmp_path)
    assert [name for name in left if not name.startswith(("work/root/version_4", "work/fresh"))] == []
    assert [name for name in left if ".export." in name or name.endswith(".part")] == []
    if failure in ("user's error before the first step", "Ctrl-C before training"):
        assert any("version_4" in name for name in left) == (failure == "Ctrl-C before training")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, built):  # noqa: F811
    """A run with a best checkpoint, and its last."""
    folder = tmp_path_factory.mktemp("trained")
    main(command("fit", folder, "dpo", "--model.optimizer.lr", 0.01, "--trainer.val_check_interval", 4))
    checkpoints = folder / "version_0" / "checkpoints"
    assert len(list(checkpoints.glob("step=*.ckpt"))) == 1
    return checkpoints / "last.ckpt"


PREDICT = {
    "a file": ("notes.txt", [], 2),
    "a file, from a configuration": (None, ["--config", "predictions.yaml"], 2),
    "a file, by a writer from a configuration": ("new.jsonl", ["--config", "writer.yaml"], 2),
    "a folder": ("exp1", ["--overwrite"], 2),
    "a link": ("link", ["--overwrite"], 2),
    "a broken link": ("broken_link", ["--overwrite"], 2),
    "a missing file": ("new.jsonl", ["--data.predict", "missing.jsonl"], 2),
    "an error in the middle": ("new.jsonl", ["--data.predict", "pairs.jsonl"], 2),
    "below a file": ("notes.txt/new.jsonl", [], 2),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("failure", PREDICT)
def test_a_prediction_that_fails_deletes_nothing(work, tmp_path, trained, monkeypatch, failure):
    out, more, code = PREDICT[failure]
    runs.pairs_file(work, 4)
    (work / ".new.jsonl.0").write_text("a neighbour")
    (work / "predictions.yaml").write_text("predictions: notes.txt")
    writer = "{class_path: PairPredictionWriter, init_args: {path: notes.txt}}"
    (work / "writer.yaml").write_text(f"trainer: {{callbacks: [{writer}]}}")
    if failure == "an error in the middle":
        monkeypatch.setattr(PreferenceModule, "predict_step", lambda *args: refuse())
    before = seen(tmp_path)
    fails(
        command(
            "predict", "root", "dpo", "--ckpt_path", trained, *([] if out is None else ["--predictions", out]), *more
        ),
        code,
    )
    assert new(before, tmp_path) == []


def test_a_configuration_cannot_say_overwrite(work, tmp_path, trained):
    (work / "overwrite.yaml").write_text("overwrite: true")
    writer = "{class_path: PairPredictionWriter, init_args: {path: notes.txt, overwrite: true}}"
    (work / "writer.yaml").write_text(f"trainer: {{callbacks: [{writer}]}}")
    before = seen(tmp_path)
    for name in ("overwrite", "writer"):
        fails(command("predict", "root", "dpo", "--ckpt_path", trained, "--config", f"{name}.yaml"))
    fails(command("fit", "root", "dpo", "--overwrite"))
    assert new(before, tmp_path) == []
    main(command("predict", "root", "dpo", "--ckpt_path", trained, "--predictions", "notes.txt", "--overwrite"))
    assert len((work / "notes.txt").read_text().splitlines()) > 1


def test_a_failing_export_deletes_nothing(work, tmp_path, trained, monkeypatch):
    before = seen(tmp_path)
    fails(["export", str(trained), "exp1"])
    fails(["export", str(trained), "notes.txt"])
    fails(["export", str(trained), "link"])
    fails(["export", "notes.txt", "out"])
    fails(["export", "exp1", "out"])
    fails(["export", "last", "out", "--root", "exp1"])
    broken_tokenizer(monkeypatch)
    fails(["export", str(trained), "out"])
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        broken_tokenizer(monkeypatch, interrupt(number))
        fails(["export", str(trained), "out"], code)
    assert new(before, tmp_path) == []


# -- checkpoints that name what is not theirs -------------------------------------------------------------------------

POISONS = (
    "local://{work}/exp1", "file://{work}/exp1", "{work}/exp1", "{checkpoints}/../../../exp1", "{work}/notes.txt",
    "{checkpoints}/mine", "{checkpoints}/link.ckpt", "{checkpoints}/linked.ckpt", "{checkpoints}/last.ckpt", "", ".",
    "{checkpoints}", "{checkpoints}/..", "{checkpoints}/../config.yaml", "exp1", "../exp1/last.ckpt", "../x.ckpt",
    "{checkpoints}/none.ckpt", 3, None, ["{work}"],
)  # fmt: skip


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_no_path_of_another_folder_is_believed(work, poison):
    folder = work / "checkpoints"
    plant(folder)
    (folder / "own.ckpt").touch()
    (folder / "link.ckpt").symlink_to(work / "exp1")
    (folder / "linked.ckpt").symlink_to(work / "notes.txt")
    path = poison.format(work=work, checkpoints=folder) if isinstance(poison, str) else poison
    callback = BestCheckpoint(dirpath=str(folder))
    key = str(path)
    state = {**callback.state_dict(), **dict.fromkeys(("kth_best_model_path", "best_model_path"), path)}
    state |= {"best_k_models": {key: torch.tensor(0.5), "/renamed/own.ckpt": torch.tensor(0.2)}, "dirpath": "/renamed"}
    callback.load_state_dict(state | {"last_model_path": path})
    own = str(folder / "own.ckpt")
    assert callback.best_k_models == {own: torch.tensor(0.2)}
    assert (callback.best_model_path, callback.kth_best_model_path) == (own, own)
    last = str(folder / "last.ckpt") if key.endswith("last.ckpt") else ""  # it may be this callback's own
    assert (callback.best_model_score, callback.last_model_path) == (torch.tensor(0.2), last)
    callback.load_state_dict({**state, "best_k_models": {}})
    assert callback.best_model_path == ""


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", ["BestCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("poison", ["local://{work}/exp1", "{checkpoints}/../../../exp1/last.ckpt"])
def test_a_checkpoint_deletes_nothing(work, tmp_path, trained, poison, kind):
    """Restored paths are those that Lightning removes, recursively, when a better checkpoint comes."""
    root = work / "poisoned"
    shutil.copytree(trained.parents[2], root)
    checkpoints = root / "version_0" / "checkpoints"
    (checkpoints / "link.ckpt").symlink_to(work / "exp1")
    for name in ("mine", "mine.ckpt"):
        plant(checkpoints / name)
    last = checkpoints / "last.ckpt"
    content = torch.load(last, weights_only=True)
    [key] = [key for key in content["callbacks"] if key.startswith("BestCheckpoint")]
    state = content["callbacks"].pop(key)
    path = poison.format(work=work, checkpoints=checkpoints)
    worst = torch.tensor(-1.0)
    state |= {"dirpath": str(checkpoints), "best_k_models": {path: worst}, "kth_value": worst}
    state |= dict.fromkeys(("kth_best_model_path", "best_model_path", "last_model_path"), path)
    save_last = kind == "ModelCheckpoint"
    config = {"monitor": "val/rewards/accuracies", "mode": "max", "save_top_k": 1}
    config |= {"save_last": True, "save_on_train_epoch_end": False} if save_last else {}
    more = [{"class_path": kind, "init_args": config}, {"class_path": "RewardEarlyStopping"}]
    (work / "kind.yaml").write_text(json.dumps({"trainer": {"callbacks": more}}))
    content["callbacks"][key.replace("BestCheckpoint", kind)] = state
    torch.save(content, last)
    (checkpoints / "last.ckpt.json").unlink()
    kept = [p for p in seen(checkpoints) if p not in ("last.ckpt", "previous.ckpt", "previous.ckpt.json")]
    before, inside = seen(tmp_path / "work"), seen(checkpoints)
    main(
        command(
            "fit", root, "dpo", "--ckpt_path", "last", "--allow-changes", "--model.optimizer.lr", 0.01,
            "--config", "kind.yaml", "--trainer.val_check_interval", 4, "--trainer.max_steps", 3,
        )
    )  # fmt: skip
    outside = {name: what for name, what in before.items() if not name.startswith("poisoned/version_0")}
    after = seen(tmp_path / "work")
    assert {name: after.get(name) for name in outside} == outside
    now = seen(checkpoints)
    assert [name for name in kept if now.get(name) != inside[name] and name != "link.ckpt"] == []
