"""Models and tokenizers of somebody else's: their code never runs unasked, and what is wrong with them is said."""

import io
import json
import os
import re
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_dpo import Discriminator, PreferenceModule, RewardModel, trusting_remote_code
from lit_dpo import pretrained as sources
from lit_dpo.cli import main
from lit_dpo.export import export
from lit_dpo.models import empty_model, load_model
from lit_dpo.tokenizers import load_tokenizer, quickstart_tokenizer
from tests import runs
from tests.test_cli import ROOT, built, quick  # noqa: F401 - fixtures

pytestmark = [
    *runs.QUIET,
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
]

CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own_kind"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

def generate(*args, **kwargs):
    pathlib.Path({canary!r}).touch()
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a model and its tokenizer, nothing wrong with it."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    tokenizer = quickstart_tokenizer()
    return export(load_model(runs.LLAMA, tokenizer), tokenizer, folder)


@pytest.fixture
def copied(sound, tmp_path):
    """A copy of that folder, to be spoilt."""
    return copy(sound, tmp_path / "model")


def copy(sound, folder):
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def foreign_model(sound, tmp_path, canary):
    """A model of a kind that transformers does not know, with the code that it needs."""
    folder = copy(sound, tmp_path / "foreign_model")
    (folder / "own_code.py").write_text(CODE.format(canary=str(canary)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(canary=str(canary)))
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    edit(folder / "config.json", model_type="own_kind", auto_map=auto)
    return folder


@pytest.fixture
def foreign_tokenizer(sound, tmp_path, canary):
    folder = copy(sound, tmp_path / "foreign_tokenizer")
    (folder / "own_code.py").write_text(CODE.format(canary=str(canary)))
    (folder / "config.json").unlink()
    own = "own_code.OwnTokenizer"
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, own]})
    return folder


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Somebody who says yes to every question, and the questions."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield questions
    assert questions == []


def refused(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    sentence = text[text.index("lit-dpo: error: ") :]
    assert len(sentence.strip().splitlines()) == 2, text  # the sentence, and where to find more
    return sentence


def small(stage, folder, *more):
    """A command with as little on the command line as it takes; the model is named by ``more``."""
    return [
        stage, "--data.max_length", "128", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.max_steps" if stage == "fit" else "--trainer.limit_test_batches", "1",
        "--trainer.default_root_dir", str(folder), *map(str, more),
    ]  # fmt: skip


# -- no foreign code, no question -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["model", "tokenizer", "reference"])
def test_no_code_of_a_folder_runs_and_nothing_is_asked(
    what, capsys, tmp_path, canary, sound, foreign_model, foreign_tokenizer
):
    options = {
        "model": ["--model.model", foreign_model],
        "tokenizer": ["--model.model", sound, "--model.tokenizer", foreign_tokenizer],
        "reference": ["--model.model", sound, "--model.reference", "FrozenReference", "--model.reference.model",
                      foreign_model],
    }[what]  # fmt: skip
    text = refused(capsys, small("fit", tmp_path / "run", *options))
    bad = foreign_tokenizer if what == "tokenizer" else foreign_model
    assert f"{str(bad)!r} needs Python code of its own, which is not run" in text
    assert "add `--trust-remote-code` to the command line" in text
    assert not canary.exists()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
@pytest.mark.parametrize("stage", ["export", "validate"])
def test_no_code_that_a_checkpoint_names_runs(
    what, stage, capsys, tmp_path, canary, checkpoint, foreign_model, foreign_tokenizer
):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"][what] = str(foreign_model if what == "model" else foreign_tokenizer)
    content["hyper_parameters"]["trust_remote_code"] = True
    torch.save(content, tmp_path / "bad.ckpt")
    if stage == "export":
        text = refused(capsys, ["export", tmp_path / "bad.ckpt", tmp_path / "out"])
        assert "needs Python code of its own" in text
        assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="Python code of its own"):
            PreferenceModule.load_from_checkpoint(tmp_path / "bad.ckpt").configure_model()
    else:
        main(small(stage, tmp_path / "run", "--ckpt_path", tmp_path / "bad.ckpt", *described()))
    assert not canary.exists()


def described():
    return ["--model.model", json.dumps(runs.LLAMA), "--model.tokenizer", "quickstart"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = runs.fit(runs.module(), runs.data(runs.pairs_file(folder)), max_steps=1)
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.mark.parametrize("load", [load_model, empty_model, load_tokenizer])
def test_no_way_to_load_asks(load, canary, foreign_model, foreign_tokenizer):
    with pytest.raises(ValueError, match="Python code of its own"):
        load(str(foreign_tokenizer if load is load_tokenizer else foreign_model))
    assert not canary.exists()


@pytest.mark.parametrize("place", ["file", "environment"])
def test_neither_a_file_nor_the_environment_can_trust(place, capsys, tmp_path, monkeypatch, canary, foreign_model):
    args = small("fit", tmp_path / "run", "--model.model", foreign_model)
    for name in ("TRUST_REMOTE_CODE", "PL_FIT__TRUST_REMOTE_CODE", "LIT_DPO_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "true")
    if place == "file":
        for text in ("trust_remote_code: true", "model: {trust_remote_code: true}", "'--trust-remote-code': true"):
            (tmp_path / "a.yaml").write_text(text)
            assert "trust" in refused_config(capsys, [*args, "--config", tmp_path / "a.yaml"])
    refused(capsys, args)
    assert not canary.exists()


def refused_config(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_whoever_trusts_on_the_command_line_trains_and_exports_and_finds_it_on_record(
    capsys, tmp_path, canary, foreign_model, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    args = small("fit", tmp_path / "run", "--model.model", foreign_model, "--trainer.enable_progress_bar", "false")
    main([*args, "--trainer.num_sanity_val_steps", "0", "--trust-remote-code"])
    assert canary.exists()
    canary.unlink()
    run = tmp_path / "run" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["hyper_parameters"]["trust_remote_code"] is True
    assert yaml.safe_load((run / "hparams.yaml").read_text())["trust_remote_code"] is True
    forget_own_kind()
    refused(capsys, ["export", last, tmp_path / "out"])
    assert not sources.trusts_remote_code()
    main(["export", str(last), str(tmp_path / "out"), "--trust-remote-code"])
    assert (
        "| code of the model's own | `ran while training (--trust-remote-code)` |"
        in (tmp_path / "out" / "README.md").read_text()
    )


def forget_own_kind():
    """What this process has learnt of the folder's code: a process of its own would not know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for mapping in (AutoConfig._model_mapping if hasattr(AutoConfig, "_model_mapping") else None,
                    AutoModelForCausalLM._model_mapping):  # fmt: skip
        if mapping is not None:
            for kind in [k for k in mapping._extra_content if k.__name__ == "OwnConfig"]:
                del mapping._extra_content[kind]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("own_kind", None)


def test_in_python_trust_is_a_context_and_ends_with_it(canary, foreign_model):
    with trusting_remote_code():
        model = load_model(str(foreign_model))
    assert type(model).__name__ == "OwnModel"
    assert canary.exists()
    forget_own_kind()
    with pytest.raises(ValueError, match=r"in Python: `with lit_dpo\.trusting_remote_code"):
        load_model(str(foreign_model))


def test_every_call_of_transformers_says_whether_code_may_run():
    """All that load by themselves, in the package and in the benchmarks."""
    loaders = re.compile(r"Auto\w+\.from_(?:pretrained|config)\b(.*(?:\n.*){0,2})")
    calls = [
        (path, call)
        for folder in ("lit_dpo", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for call in loaders.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(calls) >= 5
    assert all("trust_remote_code=" in call for _, call in calls), calls


# -- judges -----------------------------------------------------------------------------------------------------------

ASKED = [("Tea?", " yes", " no"), ("Rain?", " soon", " no")]


def with_code(folder, canary, name):
    """A classifier whose configuration says that its class is in a file of the folder; transformers may know one."""
    (folder / "own_code.py").write_text(CODE.format(canary=str(canary)))
    edit(folder / "config.json", auto_map={name: "own_code.OwnModel"})
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward model with nothing wrong with it."""
    judge = Discriminator(epochs=1, folds=2)
    tokenizer = quickstart_tokenizer()
    judge.fit(ASKED, (load_model(runs.LLAMA, tokenizer), tokenizer))
    folder = tmp_path_factory.mktemp("judge") / "reward"
    judge.save(folder, {})
    return folder


@pytest.mark.parametrize("what", ["kind", "tokenizer", "kernel", "pickle"])
def test_no_code_that_comes_with_a_judge_runs(what, tmp_path, canary, reward, foreign_tokenizer):
    folder = copy(reward, tmp_path / "reward")
    with_code(folder, canary, "AutoModelForSequenceClassification")
    assert None not in RewardModel(str(folder)).score(["Tea?"], [" yes"])  # by the class of transformers
    if what == "kind":
        edit(folder / "config.json", model_type="own_kind", auto_map={"AutoConfig": "own_code.OwnConfig"})
    elif what == "tokenizer":
        (folder / "tokenizer_config.json").write_bytes((foreign_tokenizer / "tokenizer_config.json").read_bytes())
        edit(folder / "config.json", model_type="llama", auto_map={"AutoTokenizer": [None, "own_code.OwnTokenizer"]})
    elif what == "kernel":
        edit(folder / "config.json", attn_implementation="somebody/kernel")
    else:
        pickled(folder, {NORM: Bomb(f"touch {canary}")})
    for use in (lambda: RewardModel(str(folder)).score(["Tea?"], [" yes"]), lambda: Discriminator().load(folder)):
        with pytest.raises(ValueError, match=r"needs Python code of its own, which is not run|as a pickle") as error:
            use()
        assert "\n" not in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize(("what", "trusted"), [("base", True), ("start", False)], ids=["base", "start"])
def test_no_code_that_comes_with_a_language_model_makes_a_discriminator_of_it(what, trusted, tmp_path, canary):
    """Of Cohere's transformers knows no classifier; of a Llama it does, and takes that."""
    tokenizer, start = quickstart_tokenizer(), None
    for kind in ("llama", "cohere"):
        folder = tmp_path / kind
        export(load_model({**runs.LLAMA, "model_type": kind}, tokenizer), tokenizer, folder)
        with_code(folder, canary, "AutoModelForSequenceClassification")
        judge = Discriminator(str(folder) if what == "base" else None, epochs=1, folds=2)
        with trusting_remote_code(trusted):
            if what == "start":
                start = load_model(str(folder)), load_tokenizer(str(folder))
            if kind == "llama":
                judge.fit(ASKED, start)
            else:
                with pytest.raises(ValueError, match=r"A cohere .*Python code of its own would, which is not run"):
                    judge.fit(ASKED, start)
    assert not canary.exists()


def test_a_kernel_from_the_hub_is_code_too(copied):
    edit(copied / "config.json", attn_implementation="somebody/kernel")
    for load in (load_model, empty_model):
        with pytest.raises(ValueError, match="needs Python code of its own"):
            load(str(copied))
    with pytest.raises(ValueError, match="needs Python code of its own"):
        load_model({**runs.LLAMA, "vocab_size": 10, "attn_implementation": "somebody/kernel"})


# -- what is wrong with a folder, in one sentence ---------------------------------------------------------------------


def without(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoilt(folder, name, value):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


class Bomb:
    def __init__(self, command="touch canary"):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def piped(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def nested(folder):
    (folder / "config.json").write_text("[" * 200_000)


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "missing weights": (lambda f: without(f, NORM), f"lacks weights that its configuration asks for \\({NORM}\\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "exists but does not load"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "exists but does not load"),
    "another shape": (lambda f: edit(f / "config.json", intermediate_size=64), "weights of other shapes than its conf"),
    "NaN": (lambda f: spoilt(f, NORM, float("nan")), f"holds weights that are not finite, `{NORM}` first"),
    "infinity": (lambda f: spoilt(f, NORM, float("-inf")), f"holds weights that are not finite, `{NORM}` first"),
    "pickle": (lambda f: pickled(f, {NORM: Bomb()}), r"weights as a pickle \(pytorch_model.bin\).* to safetensors"),
    "deep config": (nested, "exists but does not load"),
    "list for a config": (lambda f: (f / "config.json").write_text("[1]"), "exists but does not load"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "exists but does not load"),
    "no heads": (lambda f: edit(f / "config.json", num_attention_heads=0), "exists but does not load"),
    "huge": (lambda f: edit(f / "config.json", vocab_size=1 << 50), "weights of other shapes than its conf"),
    "pipe for weights": (lambda f: piped(f, "model.safetensors"), "is a pipe, and only regular files are read"),
    "pipe for a config": (lambda f: piped(f, "config.json"), "is a pipe, and only regular files are read"),
    "pipe for a tokenizer": (lambda f: piped(f, "tokenizer.json"), "is a pipe, and only regular files are read"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "holds adapters, which"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_model_folder_is_said_in_one_sentence(name, capsys, tmp_path, monkeypatch, copied):
    monkeypatch.chdir(tmp_path)
    spoil, sentence = BROKEN[name]
    spoil(copied)
    text = refused(capsys, small("fit", tmp_path / "run", "--model.model", copied))
    assert re.search(sentence, text), text
    assert str(copied) in text
    assert "ckpt_path" not in text
    assert not (tmp_path / "canary").exists()


def test_pickled_weights_that_are_tensors_alone_are_read(copied):
    weights = load_file(copied / "model.safetensors")
    pickled(copied, weights)
    assert torch.equal(load_model(str(copied)).state_dict()[NORM], weights[NORM])


def test_a_tied_head_is_not_missing(tmp_path):
    model = load_model({**runs.LLAMA, "tie_word_embeddings": True}, quickstart_tokenizer())
    folder = export(model, quickstart_tokenizer(), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert runs.same(runs.weights(load_model(str(folder))), runs.weights(model))
