"""What a configuration or a checkpoint of somebody else's may do: nothing but be wrong."""

import os
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lit_dpo.checkpoints.io import keep_as
from lit_dpo.checkpoints.shards import check_index
from lit_dpo.checkpoints.verify import verify, write_shards_manifest
from lit_dpo.cli import main
from tests import runs
from tests.test_cli import CONFIGS, built, command, quick  # noqa: F401 - fixtures

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("canary").touch()

class Thing:
    def __init__(self, *args, **kwargs):
        pathlib.Path(__file__).with_name("canary").touch()

def function(*args, **kwargs):
    Thing()
"""


def spec(path, **options):
    return {"class_path": path, "init_args": options}


def nested(path):
    """A class deep inside an allowed one."""
    return spec("WeightedLoss", losses=[spec("IntermediateLoss", base=spec(path, command="touch canary"))])


# Each is a configuration on top of configs/dpo.yaml. `evil_module` lies in the working folder, ready to be imported.
PAYLOADS = {
    "loss": {"model": {"loss": spec("evil_module.Thing")}},
    "loss os.system": {"model": {"loss": spec("os.system", command="touch canary")}},
    "loss posix": {"model": {"loss": spec("posix.system", command="touch canary")}},
    "loss subprocess": {"model": {"loss": spec("subprocess.Popen", args=["touch", "canary"])}},
    "loss in a loss": {"model": {"loss": nested("os.system")}},
    "own loss in a loss": {"model": {"loss": nested("evil_module.Thing")}},
    "loss alias torch": {"model": {"loss": spec("torch.os.system", command="touch canary")}},
    "loss alias lit_dpo": {"model": {"loss": spec("lit_dpo.losses.base.torch.os.system", command="touch canary")}},
    "loss alias functional": {"model": {"loss": spec("torch.nn.functional.torch.load", f="canary")}},
    "loss by name": {"model": {"loss": "evil_module.Thing"}},
    "reference": {"model": {"reference": spec("evil_module.Thing")}},
    "reference Popen": {"model": {"reference": spec("subprocess.Popen", args=["touch", "canary"])}},
    "adapter": {"model": {"adapter": spec("evil_module.Thing")}},
    "optimizer": {"model": {"optimizer": spec("evil_module.Thing")}},
    "optimizer function": {"model": {"optimizer": "evil_module.function"}},
    "optimizer os": {"model": {"optimizer": spec("os.system", command="touch canary")}},
    "optimizer eval": {"model": {"optimizer": spec("builtins.eval", source="open('canary','w')")}},
    "optimizer lambda": {"model": {"optimizer": "functools.partial"}},
    "scheduler": {"model": {"lr_scheduler": spec("evil_module.Thing")}},
    "scheduler runpy": {"model": {"lr_scheduler": spec("runpy.run_path", path_name="evil_module.py")}},
    "partition": {"data": {"partition": spec("evil_module.Thing")}},
    "partition exec": {"data": {"partition": spec("builtins.exec", source="open('canary','w')")}},
    "tokenizer object": {"data": {"tokenizer": spec("evil_module.Thing")}},
    "tokenizer remote": {"data": {"tokenizer": spec("transformers.AutoTokenizer", trust_remote_code=True)}},
    "callback": {"trainer": {"callbacks": [spec("evil_module.Thing")]}},
    "callback pathlib": {"trainer": {"callbacks": [spec("pathlib.Path", args=["canary"])]}},
    "callback through lightning": {"trainer": {"callbacks": [spec("lightning.pytorch.cli.os.system", command="x")]}},
    "callback cloud_io": {"trainer": {"callbacks": [spec("lightning.fabric.utilities.cloud_io._load", f="x")]}},
    "logger": {"trainer": {"logger": spec("evil_module.Thing")}},
    "logger through a module": {"trainer": {"logger": spec("lightning.pytorch.loggers.csv_logs.os.system", c="x")}},
    "strategy": {"trainer": {"strategy": spec("evil_module.Thing")}},
    "plugins": {"trainer": {"plugins": [spec("evil_module.Thing")]}},
    "profiler": {"trainer": {"profiler": spec("evil_module.Thing")}},
    "plugin pickle": {"trainer": {"plugins": [spec("pickle.loads", data="x")]}},
}  # fmt: skip


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A working folder with a module that leaves a file when it is imported or used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(EVIL, encoding="utf-8")
    yield tmp_path
    assert not (tmp_path / "canary").exists()
    assert "evil_module" not in sys.modules


def refused(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_in_a_configuration_is_imported_or_run(evil, capsys, name):
    assert len(PAYLOADS) >= 30
    (evil / "payload.yaml").write_text(yaml.safe_dump(PAYLOADS[name]), encoding="utf-8")
    text = refused(capsys, command("fit", evil / "run", "dpo", "--config", evil / "payload.yaml"))
    assert "lit-dpo: error: " in text
    assert not (evil / "run").exists()


@pytest.mark.parametrize("option", ["--model.loss", "--model.optimizer", "--data.partition", "--trainer.callbacks"])
def test_no_payload_on_the_command_line_is_imported_or_run(evil, capsys, option):
    text = refused(capsys, command("fit", evil / "run", "dpo", option, "evil_module.Thing"))
    assert "may not name `evil_module.Thing`" in text
    assert "--allow-import evil_module" in text


@pytest.mark.parametrize("prefix", ["PL", "LIT_DPO", "JSONARGPARSE"])
def test_no_payload_in_the_environment_is_read(evil, monkeypatch, prefix):
    for name in ("MODEL__LOSS", "MODEL__OPTIMIZER", "CONFIG", "TRAINER__CALLBACKS"):
        monkeypatch.setenv(f"{prefix}_FIT__{name}", '{"class_path": "evil_module.Thing"}')
    main(command("fit", evil / "run", "dpo", "--trainer.fast_dev_run", "true"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    main(command("fit", folder, "dpo"))
    return folder / "version_0" / "checkpoints" / "last.ckpt"


HYPER_PARAMETERS = {
    "loss": {"loss": spec("evil_module.Thing")},
    "reference": {"reference": spec("evil_module.Thing")},
    "instantiator": {"_instantiator": "evil_module.function"},
    "class path": {"_class_path": "evil_module.Thing"},
    "optimizer": {"optimizer": spec("evil_module.Thing")},
    "data": {"data": spec("evil_module.Thing")},
}


@pytest.mark.every(5)
@pytest.mark.parametrize("name", HYPER_PARAMETERS)
@pytest.mark.parametrize("stage", ["fit", "validate", "export"])
def test_hyperparameters_of_a_checkpoint_never_import_anything(evil, checkpoint, name, stage):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= HYPER_PARAMETERS[name]
    content["datamodule_hyper_parameters"] = HYPER_PARAMETERS[name]
    torch.save(content, evil / "bad.ckpt")
    if stage == "export":
        main(["export", str(evil / "bad.ckpt"), str(evil / "out")])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another folder
            main(command(stage, evil / "run", "dpo", "--ckpt_path", evil / "bad.ckpt"))


def test_an_index_of_shards_runs_nothing(evil):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {evil / 'canary'}",)

    folder = evil / "shards"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match=r"may not name (posix|os)\.system"):
        check_index(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_no_tensor_in_the_shards_runs_nothing(evil):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {evil / 'canary'}",)

    dcp.save({"state_dict.policy.w": torch.arange(6.0), "lr": Bomb()}, checkpoint_id=evil / "shards")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        check_index(evil / "shards")


# -- forged checkpoints -----------------------------------------------------------------------------------------------


def put(*path, value):
    """A change that puts a value at a place in a checkpoint."""

    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


def removed(name):
    return lambda content: content["state_dict"].pop(name)


NORM = "policy.model.norm.weight"
ODD = {
    **{f"{name} is 3": put(name, value=3) for name in (
        "state_dict", "hyper_parameters", "loops", "callbacks", "optimizer_states", "lr_schedulers", "lit_dpo")},
    **{f"{name} is text": put(name, value="x") for name in ("epoch", "global_step", "pytorch-lightning_version")},
    "nothing": lambda content: content.clear(),
    "no weights": put("state_dict", value={}),
    "a weight is missing": removed(NORM),
    "a weight too many": put("state_dict", "policy.x", value=torch.zeros(2)),
    "a weight of another shape": put("state_dict", NORM, value=torch.zeros(7)),
    "a weight is text": put("state_dict", NORM, value="x"),
    "a weight is sparse": put("state_dict", NORM, value=torch.zeros(32).to_sparse()),
    "a weight's name is 3": put("state_dict", 3, value=torch.zeros(2)),
    "loops are empty": put("loops", value={}),
    "loops hold text": put("loops", "fit_loop", value="x"),
    "progress is text": put("loops", "fit_loop", "epoch_progress", value="x"),
    "no optimizer states": put("optimizer_states", value=[]),
    "optimizer states are text": put("optimizer_states", value=["x"]),
    "an optimizer state of another shape": put("optimizer_states", 0, "state", 0, "exp_avg", value=torch.zeros(3)),
    "schedules are text": put("lr_schedulers", value=["x"]),
    "callbacks hold text": put("callbacks", "LastCheckpoint", value="x"),
    "our part is empty": put("lit_dpo", value={}),
    "our names are 3": put("lit_dpo", "names", value=3),
    "our sums are text": put("lit_dpo", "sums", value="x"),
    "our layout is 3": put("lit_dpo", "step_layout", value=3),
    "our metrics are text": put("lit_dpo", "metrics", value={"val/loss": "x"}),
    "our metrics are 3": put("lit_dpo", "metrics", value=3),
    "our version is absent": lambda content: content.pop("pytorch-lightning_version"),
}  # fmt: skip
ODD_OPTIONS = {
    "empty": {"model": None}, "model 3": {"model": 3}, "model list": {"model": [1]}, "model kind": {"model": {"a": 1}},
    "model of no size": {"model": {**runs.LLAMA, "hidden_size": 0}},
    "model of no heads": {"model": {**runs.LLAMA, "num_attention_heads": 0}},
    "model of text": {"model": {**runs.LLAMA, "hidden_size": "x"}},
    "model too large": {"model": {**runs.LLAMA, "vocab_size": 1 << 50}},
    "tokenizer 3": {"tokenizer": 3}, "dtype": {"dtype": "load"}, "dtype 3": {"dtype": 3},
    "seed": {"init_seed": "x"}, "adapter 3": {"adapter": 3}, "adapter": {"adapter": {"x": 1}},
    "rank": {"adapter": {"rank": "x"}}, "modules": {"adapter": {"target_modules": "nothing_there"}},
    "loss 3": {"loss": 3}, "loss path": {"loss": {"class_path": 3, "init_args": 3}},
    "deep loss": {"loss": spec("a", base=None)},
}  # fmt: skip


def say_one_sentence(capsys, args):
    """Run a command; if it fails, it fails in one sentence."""
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err
    if code == 0:
        return None
    assert code == 2
    sentence = text[text.index("lit-dpo: error: ") :].strip()
    assert len(sentence.splitlines()) == 2, text
    assert len(sentence) < 900, text
    return sentence


COMMANDS = [(name, stage) for name in ODD for stage in ("fit", "validate", "export")]
FEW = {(name, "fit") for name in ODD if re.search("empty$|another shape$", name)}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "stage"), [case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in COMMANDS]
)
def test_a_forged_checkpoint_is_refused_in_one_sentence_or_does_no_harm(evil, checkpoint, capsys, name, stage):
    content = torch.load(checkpoint, weights_only=True)
    ODD[name](content)
    torch.save(content, evil / "bad.ckpt")
    if stage == "export":
        said = say_one_sentence(capsys, ["export", evil / "bad.ckpt", evil / "out"])
        assert (said is None) == (evil / "out").exists()
    else:
        args = command(stage, evil / "run", "dpo", "--ckpt_path", evil / "bad.ckpt", "--trainer.max_steps", 3)
        said = say_one_sentence(capsys, args)
    if name.startswith(("a weight", "no weights", "nothing", "state_dict")):
        assert said


@pytest.mark.parametrize("name", ODD_OPTIONS)
def test_forged_options_of_a_checkpoint_are_refused_in_one_sentence(evil, checkpoint, capsys, name):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= ODD_OPTIONS[name]
    torch.save(content, evil / "bad.ckpt")
    said = say_one_sentence(capsys, ["export", evil / "bad.ckpt", evil / "out"])
    assert said or name.startswith(("loss", "deep"))
    assert (said is None) == (evil / "out").exists()


@pytest.mark.parametrize("stage", ["validate", "export"])
def test_a_pipe_for_a_checkpoint_is_refused_without_waiting_for_it(evil, capsys, stage):
    os.mkfifo(evil / "bad.ckpt")
    more = ["export", evil / "bad.ckpt", evil / "out"] if stage == "export" else None
    args = more or command(stage, evil / "run", "dpo", "--ckpt_path", evil / "bad.ckpt")
    assert "is a pipe, and only regular files are read" in say_one_sentence(capsys, args)


# -- folders of shards ------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder of shards as a save leaves it, but for its manifest."""
    folder = tmp_path / "run" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict.policy.w": torch.arange(600.0), "n": 3}, checkpoint_id=folder)
    torch.save({"hyper_parameters": {"model": "x"}, "global_step": 1}, folder / "meta.pt")
    return folder


def forged(folder, change):
    with (folder / ".metadata").open("rb") as file:
        index = pickle.load(file)
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def renamed(folder, name):
    """Let the index name another file, and put the real one there."""

    def change(index):
        for place in index.storage_data.values():
            place.relative_path = name

    (folder / "__0_0.distcp").rename(folder / name)
    forged(folder, change)


def enlarged(index):
    index.state_dict_metadata["state_dict.policy.w"].size = torch.Size([1 << 50])


def lengthened(index):
    next(iter(index.storage_data.values())).length = 1 << 40


def replaced(folder, name, make):
    (folder / name).rename(folder.parent / "moved")
    make(folder / name)


FORGED = {
    "outside": (lambda f: renamed(f, "../elsewhere"), "which is no file of that folder"),
    "absolute": (lambda f: renamed(f, str(f.parent / "elsewhere")), "which is no file of that folder"),
    "shard is a link": (lambda f: replaced(f, "__0_0.distcp", lambda p: p.symlink_to("../moved")), "symbolic link"),
    "shard is a pipe": (lambda f: replaced(f, "__0_0.distcp", os.mkfifo), "is a pipe"),
    "index is a pipe": (lambda f: replaced(f, ".metadata", os.mkfifo), "is a pipe"),
    "index is a link": (lambda f: replaced(f, ".metadata", lambda p: p.symlink_to("../moved")), "symbolic link"),
    "meta is a pipe": (lambda f: replaced(f, "meta.pt", os.mkfifo), "is a pipe"),
    "shard is a folder": (lambda f: replaced(f, "__0_0.distcp", Path.mkdir), "is a folder"),
    "shard is gone": (lambda f: (f / "__0_0.distcp").unlink(), "No such file"),
    "too large": (lambda f: forged(f, enlarged), "larger than all of its files"),
    "too long": (lambda f: forged(f, lengthened), "is shorter than its index says"),
    "no entries": (lambda f: forged(f, lambda i: setattr(i, "storage_data", 3)), "no usable index"),
    "another object": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "no usable index"),
    "cut index": (lambda f: os.truncate(f / ".metadata", 200), "pickle data was truncated"),
    "empty index": (lambda f: os.truncate(f / ".metadata", 0), "cut off or forged"),
    "cut shard": (lambda f: os.truncate(f / "__0_0.distcp", 500), "shorter than its index says"),
    "cut meta": (lambda f: os.truncate(f / "meta.pt", 300), "not a zip file"),
}


@pytest.mark.every(3)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FORGED)
def test_an_index_names_only_regular_files_of_its_own_folder(shards, capsys, name):
    """With every decoy left as it was; and without a manifest, no cut folder counts as sound or replaces a good one."""
    spoil, sentence = FORGED[name]
    good = shards.with_name("previous.ckpt")
    shutil.copytree(shards, good)
    write_shards_manifest(good)
    decoy = shards.parent / "decoy.txt"
    decoy.write_text("mine")
    spoil(shards)
    commands = (
        ["export", shards, shards.parent / "out"],
        command("validate", shards.parent, "dpo", "--ckpt_path", shards),
    )
    for args in commands:
        text = refused(capsys, list(map(str, args)))
        assert sentence in text
        assert "Traceback" not in text
    keep_as(shards, good)
    verify(good)
    assert not shards.exists()
    assert decoy.read_text() == "mine"
    assert (shards.parent / "moved").exists() == ("is a" in sentence or "link" in sentence)


def test_nobody_vouches_for_a_folder_but_the_save_that_wrote_it(shards):
    good = shards.with_name("previous.ckpt")
    shutil.copytree(shards, good)
    write_shards_manifest(good)
    mark = (good / "meta.pt").stat().st_mtime_ns
    keep_as(shards, good)  # sound as far as can be told, but nobody has vouched for it
    assert (good / "meta.pt").stat().st_mtime_ns == mark
    assert not shards.exists()
    shutil.copytree(good, shards)
    (shards / "manifest.json").unlink()
    os.truncate(good / "__0_0.distcp", 500)
    keep_as(shards, good)  # better than a damaged one
    verify(good)
    assert not (good / "manifest.json").exists()


def test_an_index_builds_nothing_but_what_an_index_is_made_of(evil):
    class Writer:
        def __reduce__(self):
            return FileSystemWriter, (str(evil / "canary"),)

    folder = evil / "shards"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Writer()))
    with pytest.raises(pickle.UnpicklingError, match="may not name"):
        check_index(folder)


@pytest.mark.parametrize("path", ["https://example.invalid/x.ckpt", "a:b.ckpt"])
def test_a_remote_checkpoint_is_no_way_around_the_checks(evil, capsys, path):
    assert "there is no `" in refused(capsys, command("validate", evil / "run", "dpo", "--ckpt_path", path))


def test_no_configuration_can_ask_for_unsafe_loading(evil, capsys):
    (evil / "payload.yaml").write_text("weights_only: false\n", encoding="utf-8")
    assert "weights_only" in refused(capsys, command("fit", evil / "run", "dpo", "--config", evil / "payload.yaml"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_good_index_of_shards_is_read(tmp_path):
    dcp.save({"state_dict.policy.w": torch.arange(6.0), "n": 3}, checkpoint_id=tmp_path / "x")
    check_index(tmp_path / "x")


def test_a_package_may_be_allowed_on_the_command_line_but_not_in_a_file(evil, capsys, monkeypatch):
    (evil / "payload.yaml").write_text("allow_import: evil_module\n", encoding="utf-8")
    text = refused(capsys, command("fit", evil / "run", "dpo", "--config", evil / "payload.yaml"))
    assert "allow_import" in text
    assert "needs the import path" in refused(capsys, ["fit", "--allow-import", "a b"])


def test_no_secret_is_written_to_the_run(tmp_path, monkeypatch):
    """Canaries where secrets live: nothing in the run's folder repeats them."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-0123456789")
    main(command("fit", tmp_path, "dpo"))
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if b"canary-0123456789" in path.read_bytes()]


def test_the_package_unpickles_nothing_by_itself():
    """`torch.load` always says ``weights_only=True``; the one unpickler is the restricted one."""
    for path in sorted((CONFIGS.parent / "lit_dpo").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        calls = re.findall(r"torch\.load\(.*", source)
        assert all("weights_only=True" in call for call in calls), path
        assert "pickle.load" not in source
        assert "trust_remote_code=True" not in source
