"""The command line, driven as a user drives it: real commands, the shipped configs, a tiny model on top."""

import csv
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import lit_dpo.cli.app
from lit_dpo import DPOLoss, DPOPLoss, IntermediateLoss, IPOLoss, LoRA, SFTLoss, WeightedLoss
from lit_dpo.cli import main
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TINY = str(ROOT / "tests" / "conf" / "tiny.yaml")
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ROUNDS = ("active", "code", "d2po", "fdpo", "iterative_length", "online", "online_reward_model", "sapo")


def command(name, folder, config="dpo", *more):
    """Arguments of a command over a shipped config, made tiny."""
    return [
        name, "--config", str(CONFIGS / f"{config}.yaml"), "--config", TINY,
        "--trainer.default_root_dir", str(folder), *map(str, more),
    ]  # fmt: skip


def metrics(folder, name="metrics.csv"):
    """Every value in a run's csv file, by name, in order; the speed, which differs from run to run, left out."""
    with open(folder / name, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) - {"epoch", "step", "train/tokens_per_second"}
    return {name: [float(row[name]) for row in rows if row[name]] for name in sorted(names)}


@pytest.fixture(scope="module")
def built():
    return {}


@pytest.fixture
def quick(monkeypatch, built):
    """Build the parser of a command once for many: it takes most of what a mistake costs."""
    original = lit_dpo.cli.app.PreferenceCLI.setup_parser
    names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")

    def setup_parser(cli, *args):
        if cli._called not in built:
            original(cli, *args)
            built[cli._called] = {name: getattr(cli, name) for name in names}
        vars(cli).update(built[cli._called])

    monkeypatch.setattr(lit_dpo.cli.app.PreferenceCLI, "setup_parser", setup_parser)


@pytest.fixture
def parsed(monkeypatch, quick):
    """Parse a command and return the CLI object instead of running it."""

    def parsed(*args):
        found = []
        monkeypatch.setattr(lit_dpo.cli.app.PreferenceCLI, "_run_subcommand", lambda cli, name: found.append(cli))
        main(list(args))
        return found[0]

    return parsed


def file(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


# -- the shipped configs ----------------------------------------------------------------------------------------------


def test_no_config_is_forgotten():
    assert METHODS == [
        "active", "adpo", "apo_down", "apo_zero", "bco_pair", "code", "cpo", "d2po", "dpo", "dpo_norm", "dpo_shift",
        "dpop", "exo", "f_dpo", "fdpo", "hinge", "intermediate", "ipo", "irpo", "iterative_length", "lddpo",
        "minor_dpo", "mpo", "nca_pair", "odpo", "online", "online_reward_model", "orpo", "quickstart", "rdpo",
        "robust_dpo", "rpo", "sapo", "sdpo", "sft", "simpo", "sppo",
    ]  # fmt: skip
    overlays = ["bf16", "ddp", "fsdp", "fsdp1", "lora", "synced"]
    assert sorted(path.stem for path in (CONFIGS / "overlays").iterdir()) == overlays


# Of every pair where the policy is the reference: what a run starts at. The others depend on the pairs.
LOG_2 = math.log(2)
STARTS = dict.fromkeys(["dpo", "dpo_norm", "dpo_shift", "dpop", "f_dpo", "intermediate", "lddpo", "minor_dpo"], LOG_2)
STARTS |= {"adpo": 4 * LOG_2, "bco_pair": 2 * LOG_2, "nca_pair": 2 * LOG_2, "robust_dpo": LOG_2}
STARTS |= {"apo_down": 1.0, "apo_zero": 1.0, "hinge": 1.0, "exo": 2.76123, "ipo": 25.0, "sppo": 2 * 500.0**2}
STARTS["odpo"] = math.log(3)  # of a gap of 2


# The others are these with another loss, which has its own tests; CI runs them all.
QUICK = ("adpo", "intermediate", "odpo", "quickstart", "sft")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "method",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
        if name not in ("sdpo", *ROUNDS)
    ],
)
def test_every_config_trains(method, tmp_path):
    scores = [{**row, "score_chosen": 2 + n, "score_rejected": n} for n, row in enumerate(runs.rows(48))]
    more = ("--data.train", runs.write(tmp_path / "scores.jsonl", scores)) if method == "odpo" else ()
    main(command("fit", tmp_path, method, *more))
    found = metrics(tmp_path / "version_0")
    assert len(found["train/loss"]) == 2
    if method in STARTS:
        assert found["train/loss"][0] == pytest.approx(STARTS[method], rel=1e-5)
    assert all(math.isfinite(value) for values in found.values() for value in values)
    assert (tmp_path / "version_0" / "config.yaml").exists()
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").exists()


def test_the_stepwise_config_trains_partition_after_partition(tmp_path):
    files = [runs.pairs_file(tmp_path, 12, f"{n}.jsonl", start=20 * n) for n in (1, 2)]
    more = ("--data.train", json.dumps(files), "--data.batch_size", 4, "--trainer.accumulate_grad_batches", 1)
    main(command("fit", tmp_path / "run", "sdpo", *more))
    root = tmp_path / "run" / "version_0"
    assert sorted(path.name for path in root.iterdir()) == ["config.yaml", "partition_0", "partition_1"]
    for part in root.glob("partition_*"):
        AutoModelForCausalLM.from_pretrained(part / "export")
        assert metrics(part / "version_0")["train/loss"][0] == pytest.approx(math.log(2), rel=1e-5)
        assert json.loads((part / "DONE").read_text())["rows"]
        assert list(part.rglob("step=*.ckpt"))
        assert (part / "version_0" / "config.yaml").exists()


@pytest.mark.slow
def test_steps_compare_by_what_is_measured_from_the_first_model(tmp_path, capsys, quick):
    files = [runs.pairs_file(tmp_path, 12, f"{n}.jsonl", start=20 * n) for n in (1, 2)]
    best = [{"class_path": "BestCheckpoint", "init_args": {"monitor": "val/first/rewards/accuracies"}}]
    more = ("--data.train", json.dumps(files), "--data.batch_size", 4, "--trainer.callbacks", json.dumps(best))
    assert "watches `val/first/rewards/accuracies`" in fails(capsys, command("fit", tmp_path / "none", "sdpo", *more))
    more = (*more, "--first_reference", "true")
    main(command("fit", tmp_path / "run", "sdpo", *more))
    for step in (0, 1):
        found = metrics(tmp_path / "run" / "version_0" / f"partition_{step}" / "version_0")
        assert {name[4:] for name in found if name.startswith("val/")} == {
            name for key in found if key.startswith("val/") and not key.startswith("val/first/")
            for name in (key[4:], f"first/{key[4:]}")
        }  # fmt: skip
    run = tmp_path / "run" / "version_0"
    main(["compare", str(run), str(run / "partition_0")])  # whose configuration asks for it, too
    assert "The intervals cover the rows alone" in " ".join(capsys.readouterr().out.split())
    line = fails(capsys, command("fit", tmp_path / "plain", "dpo", "--first_reference", "true"))
    assert "set a `--data.partition` of several steps" in line
    line = fails(capsys, command("validate", tmp_path / "plain", "dpo", "--first_reference", "true"))
    assert "`--first_reference` is for `fit` alone" in line
    assert not (tmp_path / "plain").exists()


def test_the_configs_differ_where_the_methods_do():
    """Against dpo.yaml, by path in the file."""

    def flat(node, path=""):
        if not isinstance(node, dict):
            return {path: node}
        return {k: v for name, child in node.items() for k, v in flat(child, f"{path}/{name}").items()}

    configs = {method: flat(yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())) for method in METHODS}
    allowed = {
        "odpo": ("/data/values",),
        "sdpo": ("/data/train", "/data/partition"),
        "sft": ("/model/optimizer/init_args/lr", "/trainer/callbacks"),
    }
    for method in set(METHODS) - {"dpo", "quickstart", *ROUNDS}:
        paths = configs["dpo"].keys() | configs[method].keys()
        different = {path for path in paths if configs["dpo"].get(path) != configs[method].get(path)}
        known = ("/model/loss", "/trainer/default_root_dir", *allowed.get(method, ()))
        assert [path for path in different if not path.startswith(known)] == []
        assert configs[method]["/trainer/default_root_dir"] == f"runs/{method}"


def test_every_config_says_how_to_run_it():
    for path in CONFIGS.rglob("*.yaml"):
        onto = "dpo --config " if path.parent != CONFIGS else ""
        assert f"\n#   lit-dpo fit --config {onto}{path.stem}" in path.read_text()


@pytest.mark.every(3)
@pytest.mark.parametrize("overlay", ["lora", "bf16", "synced"])
def test_overlays_train_on_top_of_a_method(overlay, tmp_path):
    main(command("fit", tmp_path, "dpo", "--config", CONFIGS / "overlays" / f"{overlay}.yaml"))
    assert metrics(tmp_path / "version_0")["train/loss"][0] == pytest.approx(math.log(2), rel=1e-5)
    content = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert any("lora_" in name for name in content["state_dict"]) == (overlay == "lora")
    assert {value.dtype for value in content["state_dict"].values()} == {torch.float32}


def printed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_sharding_overlay_is_understood(capsys, tmp_path):
    text = printed(capsys, *command("fit", tmp_path, "dpo", "--config", CONFIGS / "overlays" / "fsdp.yaml"))
    trainer = yaml.safe_load(text)["trainer"]
    assert (trainer["strategy"], trainer["precision"], trainer["devices"]) == ("fsdp2", "bf16-mixed", -1)


def test_a_printed_config_is_one(capsys, tmp_path):
    first = printed(capsys, *command("fit", tmp_path, "intermediate", "--model.loss.weight", 0.5))
    assert yaml.safe_load(first)["model"]["loss"]["init_args"]["weight"] == 0.5
    assert printed(capsys, "fit", "--config", file(tmp_path, "printed.yaml", first)) == first


def test_a_saved_config_repeats_the_run(tmp_path):
    main(command("fit", tmp_path, "quickstart", "--model.loss.weights", "[1.0, 0.5]"))
    main(["fit", "--config", str(tmp_path / "version_0" / "config.yaml")])
    assert metrics(tmp_path / "version_1") == metrics(tmp_path / "version_0")


# -- configs on top of each other, and classes that change ------------------------------------------------------------

DPO_07 = "model: {loss: {class_path: DPOLoss, init_args: {beta: 0.7, label_smoothing: 0.2}}}"
INTERMEDIATE = """
model:
  loss:
    class_path: IntermediateLoss
    init_args: {layers: [1], base: {class_path: DPOLoss, init_args: {beta: 0.7}}}
"""


@pytest.mark.parametrize(
    ("config", "more", "loss"),
    [
        (DPO_07, ["--model.loss", "DPOPLoss"], DPOPLoss()),
        (DPO_07, ["--model.loss", "IPOLoss", "--model.loss.length_normalize", "false"], IPOLoss(0.1, False)),
        (DPO_07, ["--config={}/dpop.yaml"], DPOPLoss()),
        (DPO_07, ["--config={}/ipo.yaml"], IPOLoss(beta=0.2)),
        (DPO_07, ["--model.loss", "DPOPLoss", "--model.loss", "DPOLoss"], DPOLoss()),
        (INTERMEDIATE, ["--model.loss.base", "IPOLoss"], IntermediateLoss(IPOLoss(), (1,))),
    ],
)
def test_another_class_inherits_nothing(parsed, tmp_path, config, more, loss):
    file(tmp_path, "dpop.yaml", "model: {loss: DPOPLoss}")
    file(tmp_path, "ipo.yaml", "model: {loss: {class_path: IPOLoss, init_args: {beta: 0.2}}}")
    more = [arg.format(tmp_path) for arg in more]
    cli = parsed(*command("fit", tmp_path, "dpo", "--config", file(tmp_path, "a.yaml", config), *more))
    assert cli.model.loss == loss


@pytest.mark.parametrize(
    ("config", "more", "loss"),
    [
        (DPO_07, [], DPOLoss(0.7, 0.2)),
        (DPO_07, ["--model.loss", "DPOLoss"], DPOLoss(0.7, 0.2)),
        (DPO_07, ["--model.loss", "lit_dpo.losses.dpo.DPOLoss"], DPOLoss(0.7, 0.2)),
        (DPO_07, ["--model.loss.beta", "0.3"], DPOLoss(0.3, 0.2)),
        (DPO_07, ["--config={}/same.yaml"], DPOLoss(0.7, 0.1)),
        (INTERMEDIATE, ["--model.loss.base.label_smoothing", "0.1"], IntermediateLoss(DPOLoss(0.7, 0.1), (1,))),
        (INTERMEDIATE, ["--model.loss.weight", "0.1"], IntermediateLoss(DPOLoss(0.7), (1,), weight=0.1)),
    ],
)
def test_the_same_class_keeps_its_options(parsed, tmp_path, config, more, loss):
    file(tmp_path, "same.yaml", "model: {loss: {class_path: lit_dpo.DPOLoss, init_args: {label_smoothing: 0.1}}}")
    more = [arg.format(tmp_path) for arg in more]
    cli = parsed(*command("fit", tmp_path, "dpo", "--config", file(tmp_path, "a.yaml", config), *more))
    assert cli.model.loss == loss


def test_options_of_other_classes_are_not_inherited_either(parsed, tmp_path):
    cli = parsed(*command("fit", tmp_path, "dpo", "--model.optimizer", "torch.optim.NAdam"))
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-3, 0)
    cli = parsed(*command("fit", tmp_path, "sdpo", "--data.partition", "RandomSplit", "--data.partition.parts", "3"))
    assert cli.datamodule.partition.parts == 3


def test_later_configs_win(parsed, tmp_path):
    first = file(tmp_path, "1.yaml", "model: {adapter: {rank: 4, alpha: 8}, dtype: float64}\ndata: {batch_size: 3}")
    second = file(tmp_path, "2.yaml", "model: {adapter: {rank: 2}}\ndata: {batch_size: 5}")
    args = ["--config", first, "--config", second, "--data.max_length", 77, "--model.model.hidden_size", 16]
    cli = parsed(*command("fit", tmp_path, "quickstart", *args))
    assert cli.model.adapter == LoRA(rank=2, alpha=8)
    assert cli.model.dtype_name == "float64"
    assert (cli.datamodule.batch_size, cli.datamodule.max_length) == (5, 77)
    assert cli.model.model["hidden_size"] == 16
    assert cli.model.loss == WeightedLoss((DPOLoss(), SFTLoss()), (1.0, 1.0))


def test_a_loss_from_a_file_of_ones_own(tmp_path, monkeypatch, caplog):
    file(
        tmp_path,
        "my_losses.py",
        "from dataclasses import dataclass\n"
        "from lit_dpo import PreferenceLoss\n"
        "@dataclass(frozen=True)\n"
        "class OwnHinge(PreferenceLoss):\n"
        "    '''A hinge.'''\n"
        "    beta: float = 0.1\n"
        "    def __call__(self, policy, reference):\n"
        "        return (1 - self.beta * (policy.margin - reference.margin)).clamp(min=0)\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = command("fit", tmp_path / "run", "dpo", "--model.loss", "my_losses.OwnHinge", "--model.loss.beta", 0.5)
    args += ["--allow-import", "my_losses"]
    with caplog.at_level("INFO"):
        main(args)
    assert "Loss: OwnHinge(beta=0.5); reference: FrozenReference" in caplog.text
    assert metrics(tmp_path / "run" / "version_0")["train/loss"][0] == pytest.approx(1.0)


# -- the other commands -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder and its last checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    main(command("fit", folder, "dpo", "--model.optimizer.lr", 0.01, "--trainer.val_check_interval", 8))
    return folder / "version_0", folder / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_measure_a_checkpoint(trained, tmp_path, capsys, stage, monkeypatch):
    run, checkpoint = trained
    found = []
    original = lit_dpo.cli.app.PreferenceCLI._run_subcommand

    def keep(cli, name):
        original(cli, name)
        found.append(cli.trainer.callback_metrics)

    monkeypatch.setattr(lit_dpo.cli.app.PreferenceCLI, "_run_subcommand", keep)
    main(command(stage, tmp_path / "run", "dpo", "--ckpt_path", checkpoint))
    prefix = {"validate": "val", "test": "test"}[stage]
    in_training = metrics(run)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert float(found[0][f"{prefix}/{name}"]) == pytest.approx(in_training[f"val/{name}"][-1], rel=1e-5)
    assert f"{prefix}/rewards/accuracies" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_predict_writes_one_line_a_pair(trained, tmp_path):
    _, checkpoint = trained
    pairs = runs.write(tmp_path / "pairs.jsonl", runs.rows(5))
    out = tmp_path / "out.jsonl"
    more = ("--ckpt_path", checkpoint, "--data.predict", pairs, "--predictions", out)
    main(command("predict", tmp_path / "run", "dpo", *more))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == [f"{pairs}:{n}" for n in range(1, 6)]
    assert all(row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"]) for row in rows)
    assert any(row["margin"] for row in rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held_out", [0, 0.25])
def test_predict_takes_the_training_rows_in_their_order(held_out, trained, tmp_path, monkeypatch):
    """And only those that are trained on; files that are named like the stages do not stand in the way."""
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "train", runs.rows(3, start=80))
    _, checkpoint = trained
    pairs, out = runs.pairs_file(tmp_path, 24), tmp_path / "out.jsonl"
    more = ("--data.train", pairs, "--data.predict", "train", "--data.validation_fraction", held_out)
    main(command("predict", tmp_path / "run", "dpo", "--ckpt_path", checkpoint, *more, "--predictions", out))
    found = [json.loads(line)["row"] for line in out.read_text().splitlines()]
    everything = [f"{pairs}:{n}" for n in range(1, 25)]
    data = runs.data(pairs, validation_fraction=held_out, tokenizer=runs.module().tokenizer)
    data.setup("fit")
    trained_on = sorted(row for batch in data.train_dataloader() for row in batch.row_ids.tolist())
    assert found == [everything[row] for row in trained_on]
    assert len(found) == (24 if not held_out else 18)


def test_explicit_options_win_over_a_checkpoints(trained, tmp_path, caplog):
    _, checkpoint = trained
    with caplog.at_level("INFO"):
        main(command("validate", tmp_path, "dpo", "--ckpt_path", checkpoint, "--model.loss.beta", 0.9))
    assert "Loss: DPOLoss(beta=0.9, label_smoothing=0.0, length_normalize=False)" in caplog.text


def test_export_writes_the_policy_of_a_checkpoint(trained, tmp_path):
    _, checkpoint = trained
    main(["export", str(checkpoint), str(tmp_path / "model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert runs.same(runs.weights(model), {k.removeprefix("policy."): v for k, v in state.items()})


def test_a_run_continues_from_a_checkpoint_of_another(trained, tmp_path):
    _, checkpoint = trained
    more = ("--ckpt_path", checkpoint, "--trainer.max_steps", 3, "--allow-changes")
    main(command("fit", tmp_path, "dpo", *more))
    last = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3


def test_a_changed_configuration_is_shown_and_refused(trained, tmp_path, capsys):
    run, _ = trained
    folder = tmp_path / "runs"
    shutil.copytree(run.parent, folder)
    args = command("fit", folder, "dpo", "--model.optimizer.lr", 0.05, "--trainer.val_check_interval", 8)
    with pytest.raises(SystemExit):
        main([*args, "--ckpt_path", "last"])
    said = capsys.readouterr()
    assert re.search(r"optimizer\S* +│ 0\.01 +│ 0\.05 +│ 0\.01", said.out)
    assert "differs from that of the run to resume in model.optimizer.init_args.lr: undo that" in said.err
    main([*args, "--ckpt_path", "last", "--allow-changes"])


def test_a_run_that_was_begun_with_release_0_1_0_goes_on(trained, tmp_path, capsys):
    """Its configuration knows one option by another name and some not at all; a real change is refused all the same."""
    folder = tmp_path / "runs"
    shutil.copytree(trained[0].parent, folder)
    path = folder / "version_0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["layout"] = config["model"].pop("form")
    del config["model"]["loss"]["init_args"]["length_normalize"], config["data"]["append_eos"]
    path.write_text(yaml.safe_dump(config))
    args = command("fit", folder, "dpo", "--model.optimizer.lr", 0.01, "--trainer.val_check_interval", 8)
    args += ["--ckpt_path", "last"]
    for option, name in (
        ("--model.form=padded", "model.form"),
        ("--model.loss.length_normalize=true", "model.loss.init_args.length_normalize"),
        ("--data.append_eos=false", "data.append_eos"),
    ):
        with pytest.raises(SystemExit):
            main([*args, option])
        assert f"differs from that of the run to resume in {name}: undo that" in capsys.readouterr().err
    main(args)


@pytest.mark.slow
def test_references_nest_on_the_command_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    policy = tmp_path / "policy"
    main(command("fit", tmp_path, "dpo", "--trainer.max_steps", 1, "--model.optimizer.lr", 0.01))
    main(["export", str(tmp_path / "version_0" / "checkpoints" / "last.ckpt"), str(policy)])
    given = ("--model.reference", "CachedReference", "--model.reference.of", "FrozenReference")
    args = command("fit", tmp_path, "dpo", *given, "--model.reference.of.model", policy, "--trainer.max_steps", 1)
    main(args)
    assert metrics(tmp_path / "version_1")["train/loss"][0] != pytest.approx(math.log(2), abs=1e-6)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    with caplog.at_level("INFO"):
        main([*args, "--ckpt_path", "last"])
    assert "Reference: 0 rows scored" in caplog.text


def test_ctrl_c_prints_the_command_to_go_on_with(tmp_path, capsys, monkeypatch):
    """And that command, pasted, goes on in the same folder."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)

    args = command("fit", tmp_path / "stopped", "dpo", "--trainer.max_steps", 4, "--trainer.log_every_n_steps", 1)
    main(command("fit", tmp_path / "whole", "dpo", "--trainer.max_steps", 4, "--trainer.log_every_n_steps", 1))
    monkeypatch.setattr(lit_dpo.cli.app.RunSummary, "on_train_batch_start", on_train_batch_start)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 130
    said = capsys.readouterr().err
    found = re.search(r"Stopped by SIGINT after step (\d); saved (.*)", said)
    assert found[2] == f"{tmp_path}/stopped/version_0/checkpoints/last.ckpt"
    again = shlex.split(said.partition("To go on: ")[2])
    assert again == ["lit-dpo", *args, "--ckpt_path", "last"]
    monkeypatch.undo()
    main(again[1:])
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["version_0"]
    whole, stopped = tmp_path / "whole" / "version_0", tmp_path / "stopped" / "version_0"
    first, rest = metrics(stopped, "metrics_0.csv"), metrics(stopped)
    expected = metrics(whole)
    assert len(first["train/loss"]) == int(found[1])
    assert {name: first.get(name, []) + rest.get(name, []) for name in expected} == expected
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, stopped)]
    assert runs.same(*states)


def test_last_is_never_a_fresh_start(tmp_path, capsys, quick):
    (tmp_path / "version_0" / "checkpoints").mkdir(parents=True)
    line = fails(capsys, command("fit", tmp_path, "dpo", "--ckpt_path", "last"))
    assert "the newest run" in line
    assert "has no checkpoint yet; leave `ckpt_path` out" in line
    (tmp_path / "version_0" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "version_1").mkdir()
    line = fails(capsys, command("fit", tmp_path, "dpo", "--ckpt_path", "last"))
    assert "name one, such as" in line
    assert "version_0/checkpoints/last.ckpt" in line


@pytest.mark.parametrize("name", ["validate", "fit"])
def test_a_users_own_files_are_left_alone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    mine = file(tmp_path, "config.yaml", "# mine\n" + Path(TINY).read_text())
    before = Path(mine).read_text()
    args = [name, "--config", str(CONFIGS / "dpo.yaml"), "--config", mine, "--trainer.default_root_dir", str(tmp_path)]
    if name == "fit":
        main([*args, "--trainer.logger", "false"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "version_0"]
    else:
        main(args)
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert Path(mine).read_text() == before


def test_a_dry_run_leaves_nothing(tmp_path):
    main(command("fit", tmp_path / "run", "dpo", "--trainer.fast_dev_run", "true"))
    assert not (tmp_path / "run").exists()


def test_one_callback_may_stand_alone(tmp_path, parsed):
    cli = parsed(*command("fit", tmp_path, "dpo", "--trainer.callbacks", "BestCheckpoint"))
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert "BestCheckpoint" in names
    assert "RewardEarlyStopping" not in names


# -- mistakes ---------------------------------------------------------------------------------------------------------

ROW = {"prompt": "Hello", "chosen": " yes", "rejected": " no"}
TURN = [{"role": "user", "content": "Hello"}]
FILES = {
    "pairs.jsonl": [ROW, {**ROW, "prompt": "Hi there"}],
    "renamed.jsonl": [{"question": "a", "good": "b", "bad": "c"}],
    "broken.jsonl": [ROW, {**ROW, "chosen": None}],
    "empty.jsonl": [],
    "one_prompt.jsonl": [ROW, {**ROW, "rejected": " nope"}],
    "chat.jsonl": [
        {
            "prompt": TURN,
            "chosen": {"role": "assistant", "content": c},
            "rejected": {"role": "assistant", "content": "n"},
        }
        for c in "xy"
    ],
}
MISTAKES = {
    "unknown loss": (["--model.loss", "DPOLos"], ["`DPOLos`", "Did you mean DPOLoss", "import path"]),
    "unknown loss in a loss": (
        ["--model.loss", "IntermediateLoss", "--model.loss.base", "IPOLos"],
        ["`IPOLos`", "Did you mean IPOLoss"],
    ),
    "unknown optimizer": (["--model.optimizer", "AdamV"], ["`AdamV`", "import path"]),
    "misspelt option": (["--data.batchsize", "4"], ["--data.batchsize", "Did you mean --data.batch_size"]),
    "misspelt option of a class": (["--model.loss.betta", "0.3"], ["`betta`", "Did you mean beta?"]),
    "option of another class": (
        ["--model.loss", "SFTLoss", "--model.loss.beta", "0.3"],
        ["no option `beta`", "--model.loss.help CLASS"],
    ),
    "beta": (["--model.loss.beta", "-0.1"], ["`beta` must be positive, got -0.1."]),
    "beta in words": (["--model.loss.beta", "small"], ["error: `beta` must be a number, got 'small'."]),
    "parts": (
        ["--data.partition", "RandomSplit", "--data.partition.parts", "0"],
        ["error: `parts` must be at least 1, got 0."],
    ),
    "layer": (
        ["--model.loss", "IntermediateLoss", "--model.loss.layers", "[3]"],
        ["`layers` holds 3, but the decoder has 2 blocks", "from 1 to 2"],
    ),
    "batch size": (["--data.batch_size", "0"], ["`batch_size` must be at least 1"]),
    "warmup": (["--model.lr_scheduler.warmup", "-1"], ["`warmup` must be at least 0"]),
    "precision": (["--trainer.precision", "bf16-true"], ["set the module's `dtype: bfloat16`"]),
    "model": (["--model.model", "./no/model"], ["`model` './no/model'", "Give a folder saved by `save_pretrained`"]),
    "model type": (["--model.model.model_type", "lama"], ["`model_type`: 'lama'"]),
    "model size": (["--model.model.hidden_size", "big"], ["`model`", "'hidden_size' expected int", "'big'"]),
    "tokenizer": (["--model.tokenizer", "./no/model"], ["`tokenizer` './no/model'"]),
    "reference": (["--model.reference", "AdapterReference"], ["set `adapter`, or use `FrozenReference`"]),
    "missing file": (["--data.train", "{}/pears.jsonl"], ["There is no `pears.jsonl`", "did you mean `pairs.jsonl`?"]),
    "columns": (["--data.train", "{}/renamed.jsonl"], ["renamed.jsonl:1", "`question`", "set `columns:"]),
    "broken row": (["--data.train", "{}/broken.jsonl"], ["broken.jsonl:2", "column `chosen`"]),
    "no rows": (["--data.train", "{}/empty.jsonl"], ["No row to train on in", "empty.jsonl"]),
    "one prompt": (["--data.train", "{}/one_prompt.jsonl"], ["All pairs share one prompt", "give `validation`"]),
    "no chat template": (
        ["--data.train", "{}/chat.jsonl", "--model.tokenizer", "{}/plain_tokenizer"],
        ["no chat template", "give the data as text"],
    ),
    "long prompt": (
        ["--data.max_length", "2", "--data.truncation", "keep_start"],
        ["pairs.jsonl:", "column `prompt`", "`max_length` is 2", "`truncation: keep_end`"],
    ),
    "too many parts": (
        ["--data.partition", "RandomSplit", "--data.partition.parts", "3"],
        ["`parts` is 3, but there are only 1 pairs"],
    ),
    "overfit": (["--trainer.overfit_batches", "1"], ["`overfit_batches` is not supported", "`limit_train_batches`"]),
    "checkpoint": (["--ckpt_path", "{}/none.ckpt"], ["none.ckpt"]),
    "no checkpoint": (["--ckpt_path", "{}/pairs.jsonl"], ["pairs.jsonl` is damaged", "not a zip file"]),
    "no run": (["--ckpt_path", "last"], ["no run is in", "Leave `ckpt_path` out"]),
    "foreign class": (["--model.loss", "os.system"], ["may not name `os.system`", "--allow-import os"]),
    "option of no class": (
        ["--model.reference.model", "a/b"],
        ["`model.reference.model` is an option of a class, and none is named: name the class for `model.reference`"],
    ),
    "option of no class's class": (
        ["--model.reference", "CachedReference", "--model.reference.of.model", "a/b"],
        ["`of.model` is an option of a class, and none is named: name the class for `of` before it"],
    ),
    "misspelt class path": (
        ["--model.reference.class_path", "FrozenReferense"],
        ["`model.reference`: there is no class `FrozenReferense`", "Did you mean FrozenReference"],
    ),
    "foreign class path": (["--model.reference.class_path", "os.system"], ["may not name `os.system`"]),
    "config": (["--config", "no.yaml"], ["no.yaml"]),
    "accelerator": (["--trainer.accelerator", "gpus"], ["gpus"]),
}


def fails(capsys, args):
    """Run a command that must fail; return what it says."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("lit-dpo: error: ")]
    return line


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, rows in FILES.items():
        runs.write(folder / name, rows)
    return folder


@pytest.mark.every(2)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(mistake, files, tmp_path, capsys, quick):
    more, words = MISTAKES[mistake]
    if mistake == "no chat template":
        tokenizer = lit_dpo.tokenizers.quickstart_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(files / "plain_tokenizer")
    more = [arg.format(files) if "{}" in arg else arg for arg in more]
    line = fails(capsys, command("fit", tmp_path / "run", "dpo", "--data.train", files / "pairs.jsonl", *more))
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_stepwise_training_leaves_nothing(files, tmp_path, capsys, quick):
    more = ("--data.train", files / "pairs.jsonl", "--data.partition.order", "[a, b]")
    line = fails(capsys, command("fit", tmp_path / "run", "sdpo", *more))
    assert "`order` names a, b, but the data have the sources pairs" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_gpu(tmp_path, capsys, quick):
    line = fails(capsys, command("fit", tmp_path / "run", "dpo", "--trainer.accelerator", "gpu"))
    assert "use `--trainer.accelerator cpu`" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [["--model.model.hidden_size", "16"], ["--model.adapter.rank", "2"]])
def test_a_checkpoint_of_another_model(trained, tmp_path, capsys, change, quick):
    line = fails(capsys, command("validate", tmp_path / "run", "dpo", "--ckpt_path", trained[1], *change))
    assert "give the `model` and `adapter` it was made with" in line


def test_mistakes_in_export(trained, tmp_path, capsys):
    assert "No checkpoint `none.ckpt`" in fails(capsys, ["export", "none.ckpt", str(tmp_path / "deep" / "out")])
    assert list(tmp_path.iterdir()) == []
    missing = str(trained[1].with_name("lst.ckpt"))
    assert "there are last.ckpt" in fails(capsys, ["export", missing, str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "exists already" in fails(capsys, ["export", str(trained[1]), str(tmp_path / "out")])
    assert "output_dir" in fails(capsys, ["export", "a.ckpt"])


def test_mistakes_in_the_command(capsys, quick):
    assert "Did you mean fit?" in fails(capsys, ["fitt"])
    assert "{fit,validate,test,predict,inspect,check,export," in fails(capsys, [])
    assert "model.model" in fails(capsys, ["fit"])


def test_a_run_that_fails_later_keeps_what_it_has(tmp_path, capsys, monkeypatch):
    """As on a full disk, after the first checkpoint."""

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(lit_dpo.cli.app.RunSummary, "on_fit_end", full)
    assert "No space left" in fails(capsys, command("fit", tmp_path, "dpo"))
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").exists()
    assert metrics(tmp_path / "version_0")["train/loss"]


def test_an_error_of_our_own_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args):
        raise KeyError("a bug")

    monkeypatch.setattr(lit_dpo.cli.app.PreferenceCLI, "_run_subcommand", bug)
    with pytest.raises(KeyError, match="a bug"):
        main(command("fit", tmp_path))


def test_a_traceback_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must be at least 1"):
        main(command("fit", tmp_path, "dpo", "--data.batch_size", 0))


def test_the_package_is_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-dpo", "export", "none.ckpt", "out"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("lit_dpo", run_name="__main__")
    assert capsys.readouterr().err.startswith("lit-dpo: error: No checkpoint `none.ckpt`")
