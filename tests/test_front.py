"""What the command line answers at once, before anything large is imported."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch.loggers.wandb
import pytest
from lightning_utilities.core.imports import RequirementCache

import lit_dpo
import lit_dpo.cli.app
from lit_dpo.cli import front, main, signatures
from lit_dpo.cli.tools import TOOLS, WHOLE
from tests import runs
from tests.test_cli import built, command, fails, quick  # noqa: F401 - fixtures

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lit_dpo.__file__).parent
DPO = ["fit", "--config", "configs/dpo.yaml"]

# -- at once ----------------------------------------------------------------------------------------------------------

AT_ONCE = {
    "help": (["--help"], 0, "export     write a checkpoint's policy"),
    "version": (["--version"], 0, f"lit-dpo {lit_dpo.__version__}\n"),
    "help of fit": (["fit", "--help"], 0, "--data.batch_size\n"),
    "help of export": (["export", "--help"], 0, "usage: lit-dpo export CHECKPOINT OUTPUT_DIR"),
    "help of audit": (["audit", "--help"], 0, "about half of the suspects are good rows"),
    "help of check": (["check", "--help"], 0, "\n  --memory\n"),
    "help of evaluate": (["evaluate", "--help"], 0, "usage: lit-dpo evaluate MODEL... --data DATA... [options]"),
    "command": (["train"], 2, "there is no command `train`: the commands are {fit,vali"),
    "option": ([*DPO, "--data.batchsize", "4"], 2, "`--data.batchsize`. Did you mean --data.batch_size"),
    "last name": ([*DPO, "--lr", "1e-5"], 2, "there is no option `--lr`. Did you mean --model.optimizer.lr?"),
    "place": ([*DPO, "--model.beta=0.3"], 2, "there is no option `--model.beta`. Did you mean --model.loss.beta?"),
    "usual name": ([*DPO, "--epochs", "3"], 2, "there is no option `--epochs`. Did you mean --trainer.max_epochs?"),
    "config": (["fit", "--config", "configs/dpo.yml"], 2, "file `configs/dpo.yml`. Did you mean configs/dpo.yaml"),
    "config by name": (["fit", "--config", "dpoo"], 2, "no configuration file `dpoo`. Did you mean dpo"),
    "option of a tool": (["push", "a", "b/c", "--dry-run"], 2, "no option `--dry-run`. Did you mean --dry_run?"),
    "configs": (["configs"], 0, "\ndpo            Direct Preference Optimization, https://arxiv.org/abs/2305.18290\n"),
    "data": ([*DPO, "--data.train", "missing.jsonl"], 2, "There is no `missing.jsonl` in `.`"),
    "one of several": ([*DPO, "--data.train=[quickstart, ./a/b.csv]"], 2, "There is no folder `a`, so no `b.csv`"),
    "validation": ([*DPO, "--data.train", "quickstart", "--data.validation", "no.jsonl"], 2, "There is no `no.jsonl`"),
    "data of a config": (["fit", "-c", "configs/quickstart.yaml", "-c", "{}"], 2, "There is no `gone.parquet` in `.`"),
}  # fmt: skip
ASK = """
import contextlib, io, json, sys, time
start = time.process_time()
from lit_dpo.cli import main
imported, answers = time.process_time() - start, []
for args in json.loads(sys.argv[1]):
    said, start, code = io.StringIO(), time.process_time(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(args)
        except SystemExit as stop:
            code = stop.code
    large = sorted({"torch", "lightning", "transformers", "jsonargparse", "datasets"} & set(sys.modules))
    answers.append((code, said.getvalue(), imported + time.process_time() - start, large))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """All asked of one process that has imported nothing else."""
    config = tmp_path_factory.mktemp("config") / "data.yaml"
    config.write_text("data:\n  train: gone.parquet\n")
    asked = json.dumps([[arg.replace("{}", str(config)) for arg in args] for args, *_ in AT_ONCE.values()])
    done = subprocess.run([sys.executable, "-c", ASK, asked], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return dict(zip(AT_ONCE, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", AT_ONCE)
def test_it_is_answered_within_a_second(answers, name):
    """Of processor time, which other processes of the machine do not lengthen; and nothing large is imported."""
    _, status, text = AT_ONCE[name]
    code, said, seconds, large = answers[name]
    assert (code, large) == (status, [])
    assert text in said
    assert seconds < 1
    if status:
        assert re.fullmatch(r"lit-dpo: error: .*\n", said)


def test_every_option_of_the_real_parser_is_known_and_no_other(monkeypatch, capsys):
    """So that nothing is refused at once which the parser would take, or the other way round."""
    found = []
    original = lit_dpo.cli.app.PreferenceCLI.setup_parser
    monkeypatch.setattr(
        lit_dpo.cli.app.PreferenceCLI, "setup_parser", lambda cli, *args: (original(cli, *args), found.append(cli))
    )
    names = sorted(set(front.COMMANDS) - {*TOOLS, "configs"})
    for name in names:
        with pytest.raises(SystemExit):
            main([name])
    parsed_as = {name: "fit" if name in WHOLE else name for name in names}
    assert [list(cli._subcommand_parsers) for cli in found] == [[parsed_as[name]] for name in names]
    for name, cli in zip(names, found, strict=True):
        parser = cli._subcommand_parsers[parsed_as[name]]
        real = {option.removesuffix("+") for action in parser._actions for option in action.option_strings}
        known = front.options(name)
        assert [option for option in real if not front._is_known(option, known)] == []
        assert set(known) - real <= set(signatures.flags())  # taken before the parser sees them
        assert {"--allow-changes", "--allow-import"} <= set(known)


def test_help_lists_every_option_and_says_what_it_is():
    text = front._help("fit")
    for group, parameters in front._groups().items():
        for parameter in parameters:
            assert f"\n  --{group}.{parameter.name}\n" in text
    assert "IPOLoss" in text.partition("--model.loss\n")[2].partition("--model.reference")[0]
    tools = [parameter for name in TOOLS for parameter in signatures.tool(name)]
    for parameter in (*signatures.module(), *signatures.data(), *tools):
        assert parameter.help, parameter.name
    assert "CPU threads of torch" in text


@pytest.mark.parametrize("name", [*TOOLS, *WHOLE])
def test_help_of_a_tool_is_for_people(name, monkeypatch):
    """Within 80 columns, its own options first, types and defaults in words, and nothing that it would refuse."""
    monkeypatch.setenv("COLUMNS", "80")
    text = front._help(name)
    assert max(map(len, text.splitlines())) <= 80
    if name in TOOLS:
        assert not re.search(r"\| None|\bstr\b|\bint\b|\bbool\b|Dtype|default: (\[|''|None|True|False)", text)
    else:
        assert not re.search(r"--(ckpt_path|predictions|allow-changes|first_reference)\b", text)
        assert text.index(f"\n  --{'html' if name == 'inspect' else 'memory'}\n") < text.index("\n  -h, --help\n")
    assert ("\n  --overwrite\n" in text) == (name not in ("export", "check"))


@pytest.mark.parametrize(
    "more", [["--data.train", "org/hub_name"], ["--data.train", "{folder}"], ["--data.train", "{folder}:test"]]
)
def test_data_that_may_exist_are_left_to_the_reader(more, tmp_path):
    front.answer([*DPO[:2], str(ROOT / DPO[2]), *(word.format(folder=tmp_path) for word in more)])


def test_a_configuration_may_be_yaml_itself():
    front.answer(["fit", "--config", "{trainer: {max_steps: 3}}", "--print_config"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc to see an import by")
def test_ctrl_c_while_importing_prints_one_line():
    """Sent as soon as the first library of torch is mapped, with seconds of imports to go."""
    started = [sys.executable, "-m", "lit_dpo", "fit", "--config", "configs/quickstart.yaml"]
    process = subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        limit = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < limit
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "\nlit-dpo: interrupted\n")


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_package_is_light_and_holds_every_name():
    code = """
import sys, lit_dpo
assert not {"torch", "lightning", "transformers"} & set(sys.modules)
assert lit_dpo.losses.DPOLoss is lit_dpo.DPOLoss
assert {"transformers", "lightning"}.isdisjoint(sys.modules)
from lit_dpo import *
for name in lit_dpo.__all__:
    assert name in globals() and name in dir(lit_dpo), name
assert not hasattr(lit_dpo, "DPOLos") and not hasattr(lit_dpo.data, "Partitions")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- sentences --------------------------------------------------------------------------------------------------------

NO_CLASS = "`{}`: there is no class `{}`; a class of your own needs its import path. Did you mean {}?"
SENTENCES = {
    "loss": (["--model.loss", "ipo"], NO_CLASS.format("model.loss", "ipo", "IPOLoss")),
    "loss dpo": (["--model.loss", "dpo"], NO_CLASS.format("model.loss", "dpo", "DPOLoss")),
    "nested loss": (
        ["--model.loss", "IntermediateLoss", "--model.loss.base", "ipo"], NO_CLASS.format("base", "ipo", "IPOLoss")
    ),
    "adapter": (["--model.adapter", "LORA"], NO_CLASS.format("model.adapter", "LORA", "LoRA")),
    "reference": (["--model.reference", "cached"], NO_CLASS.format("model.reference", "cached", "CachedReference")),
    "partition": (["--data.partition", "EasyToHrd"], NO_CLASS.format("data.partition", "EasyToHrd", "EasyToHard")),
    "optimizer": (["--model.optimizer", "AdamWW"], NO_CLASS.format("model.optimizer", "AdamWW", "AdamW or Adam")),
    "callback": (
        ["--trainer.callbacks", "EarlyStoping"],
        NO_CLASS.format("trainer.callbacks", "EarlyStoping", "EarlyStopping or RewardEarlyStopping"),
    ),
    "logger": (["--trainer.logger", "WandbLoger"], NO_CLASS.format("trainer.logger", "WandbLoger", "WandbLogger")),
    "columns": (
        ["--data.columns", "prompt=question"],
        "`data.columns` must be a mapping such as '{prompt: question, chosen: good, rejected: bad}', "
        "got 'prompt=question'.",
    ),
    "number": (["--model.optimizer.lr", "fast"], "`lr` must be a number, got 'fast'."),
    "whole number": (["--data.max_length", "1k"], "`data.max_length` must be a whole number, got '1k'."),
    "yes or no": (
        ["--model.gradient_checkpointing", "maybe"],
        "`model.gradient_checkpointing` must be true or false, got 'maybe'.",
    ),
    "choice": (
        ["--model.form", "flatt"], "`model.form` must be one of auto, flat, padded, got 'flatt'. Did you mean flat?"
    ),
    "strategy": (
        ["--trainer.strategy", "fsdp3"], "`trainer.strategy`: there is no strategy `fsdp3`. Did you mean fsdp or fsdp2?"
    ),
    "devices": (["--trainer.devices", "x"], "`devices` selected with `CPUAccelerator` should be an int > 0."),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SENTENCES)
def test_a_mistake_is_told_in_this_sentence(name, tmp_path, capsys):
    more, sentence = SENTENCES[name]
    assert fails(capsys, command("fit", tmp_path, "dpo", *more)) == f"lit-dpo: error: {sentence}"


@pytest.mark.usefixtures("quick")
def test_the_choices_of_the_precision_are_listed(tmp_path, capsys):
    line = fails(capsys, command("fit", tmp_path, "dpo", "--trainer.precision", "fp16"))
    assert re.fullmatch(
        r"lit-dpo: error: `trainer.precision` must be one of [\w, -]*\bbf16-mixed\b[\w, -]*, got 'fp16'\. "
        r"Did you mean 16-mixed\?", line,
    )  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_logger_whose_package_is_missing_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lightning.pytorch.loggers.wandb, "_WANDB_AVAILABLE", RequirementCache("no-such-package>=1"))
    line = fails(capsys, command("fit", tmp_path, "dpo", "--trainer.logger", "WandbLogger"))
    needs = "`WandbLogger` needs a package that is not installed: `pip install no-such-package` gets it."
    assert line == f"lit-dpo: error: {needs}"


@pytest.mark.usefixtures("quick")
def test_an_option_that_must_be_given(capsys):
    assert fails(capsys, ["fit"]) == "lit-dpo: error: required and not given: `model.model`"


# -- advice -----------------------------------------------------------------------------------------------------------


def texts():
    """Every piece of text in the package that is no docstring, with its file and line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
        first = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in first:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value


def test_no_advice_names_an_option_that_does_not_exist():
    known = {option for name in set(front.COMMANDS) - {*TOOLS} for option in front.options(name)}
    known |= {f"--{parameter.name}" for name in TOOLS for parameter in signatures.tool(name)} | {
        "--version",
        "--help",
        "--model.loss.help",
    }
    nested = {
        f"--{o}.{own}" for o, classes in signatures.pluggable().items() for names in classes.values() for own in names
    }
    known |= nested | {"--model.optimizer.lr", "--model.optimizer.weight_decay"}
    option = re.compile(r"(?<![\w(-])--[a-z][\w.-]*\w(?![\w.-]|: #)")  # neither a colour of CSS nor where it is used
    named = {(found, where) for where, text in texts() for found in option.findall(text)}
    assert len(named) > 20
    assert [found for found in sorted(named) if found[0] not in known] == []


# An option of torch's optimizers, parts of a model's description and of a quantization, an option of `lit-dpo export`.
OTHERS = {"fused", "model_type", "load_in_4bit", "load_in_8bit", "merge"}


def test_no_advice_sets_an_option_that_does_not_exist():
    """What a message says to set stands there as a name and a value, such as `precision: bf16-mixed`."""
    known = {option.rpartition(".")[2].lstrip("-") for name in front._SOURCES for option in front.options(name)}
    known |= {own for classes in signatures.pluggable().values() for names in classes.values() for own in names}
    named = {(name, where) for where, text in texts() for name in re.findall(r"`([a-z_]\w*): [^`]+`", text)}
    assert len(named) > 5
    assert [found for found in sorted(named) if found[0] not in known | OTHERS] == []
