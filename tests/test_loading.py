"""Revision, attention and quantization reach transformers as they are given, or are refused."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from transformers.models.llama import modeling_llama

from lit_dpo import LoRA, PreferenceModule
from lit_dpo.cli import main
from lit_dpo.export import export, export_checkpoint
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = quickstart_tokenizer()
    return str(export(load_model(runs.LLAMA, tokenizer), tokenizer, tmp_path_factory.mktemp("start") / "model"))


@pytest.fixture
def told(monkeypatch, folder):
    """What each ``from_pretrained`` is told; names of the hub are answered from a folder, as if they were there."""
    found = {}

    def record(kind):
        original = kind.from_pretrained

        def answer(source, **options):
            if source != folder:  # as transformers asks on its own way
                found.setdefault(kind.__name__, []).append({"source": source, **options})
            for name in ("quantization_config", "revision"):
                options.pop(name, None)
            return original(folder, **options)

        monkeypatch.setattr(kind, "from_pretrained", answer)

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        record(kind)
    monkeypatch.setattr("lit_dpo.pretrained.find_adapter_config_file", lambda source, **options: None)
    return found


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for bitsandbytes and torchao, as far as their configurations go."""
    LoRA(rank=2).attach(load_model(runs.LLAMA, quickstart_tokenizer()))  # now peft knows that they are not there

    class AOBaseConfig:
        pass

    @dataclass
    class Int8WeightOnlyConfig(AOBaseConfig):
        group_size: int | None = None

    names = ("bitsandbytes", "torchao", "torchao.quantization", "torchao.core", "torchao.core.config")
    modules = {name: ModuleType(name) for name in (*names, "torchao.quantization.quant_api")}
    modules["torchao.core.config"].AOBaseConfig = AOBaseConfig
    modules["torchao.quantization.quant_api"].AOBaseConfig = AOBaseConfig
    modules["torchao.quantization"].Int8WeightOnlyConfig = Int8WeightOnlyConfig
    modules["torchao.quantization"].quantize_ = print
    for name, module in modules.items():
        module.__spec__ = transformers.__spec__
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.utils.quantization_config.is_torchao_available", lambda: True)
    return Int8WeightOnlyConfig


def fit(folder, *options, train="quickstart"):
    main(
        ["fit", f"--data.train={train}", "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data.max_length=64",
         "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={folder}",
         "--trainer.enable_progress_bar=false", *options]
    )  # fmt: skip


def test_a_revision_reaches_model_configuration_and_tokenizer(told, tmp_path):
    fit(tmp_path, "--model.model=org/name", "--model.revision=v1.2")
    assert {name: {call.get("revision") for call in calls} for name, calls in told.items()} == {
        "AutoConfig": {"v1.2"},
        "AutoModelForCausalLM": {"v1.2"},
        "AutoTokenizer": {"v1.2"},
    }
    told.clear()
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert {call.get("revision") for calls in told.values() for call in calls} == {"v1.2"}
    told.clear()
    module = PreferenceModule("org/name", tokenizer="org/other", revision="v1.2")
    assert module.tokenizer is not None  # which is another one's, so the revision is not its
    assert told == {"AutoTokenizer": [{"source": "org/other", "trust_remote_code": False}]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, None),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, None),
        ({"quant_type": "Int8WeightOnlyConfig", "group_size": 32, "modules_to_not_convert": ["lm_head"]}, 32),
    ],
)
def test_quantization_reaches_transformers_by_its_own_class(options, expected, told, installed, tmp_path):
    yaml = ", ".join(f"{key}: {value}" for key, value in options.items()).replace("'", "")
    fit(tmp_path, "--model.model=org/name", f"--model.quantization={{{yaml}}}", "--model.adapter.rank=2")
    config = told["AutoModelForCausalLM"][0]["quantization_config"]
    if expected is None:
        assert isinstance(config, BitsAndBytesConfig)
        assert {**config.to_dict(), **options} == config.to_dict()
    else:
        assert isinstance(config, TorchAoConfig)
        assert (config.quant_type, config.modules_to_not_convert) == (installed(group_size=32), ["lm_head"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    told.clear()
    export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert type(told["AutoModelForCausalLM"][0]["quantization_config"]) is type(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "nf4": True}, "`quantization` has no option `nf4`: BitsAndBytesConfig takes bnb_4bit"),
        ({}, "must say one of `load_in_4bit: true` and `load_in_8bit: true`"),
        ({"load_in_4bit": 3}, "must say one of|must be a boolean"),
        ({"quant_type": "quantize_"}, "`quant_type` must be the name of a configuration in torchao"),
        ({"quant_type": "Int8WeightOnlyConfig", "bits": 2}, "no option `bits`: TorchAoConfig takes group_size"),
    ],
)
def test_a_wrong_option_of_quantization_is_refused(options, message, told, installed):
    with pytest.raises(ValueError, match=message):
        PreferenceModule("org/name", quantization=options, adapter=LoRA(rank=2)).configure_model()
    assert "AutoModelForCausalLM" not in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": {"load_in_8bit": True}}, "quantized model cannot be trained themselves: set `adapter`"),
        ({"model": "FOLDER", "revision": "main"}, "`revision` would change nothing, since `model` is a folder"),
        ({"model": runs.LLAMA, "revision": "main"}, "`revision` would change nothing, since `model` is a description"),
        ({"model": runs.LLAMA, "quantization": {}, "adapter": LoRA()}, "`quantization` would change nothing"),
        ({"attn_implementation": "eager", "form": "flat"}, "`form: flat` has an attention of its own"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message, folder):
    options = {"model": "org/name", "tokenizer": "quickstart", **options}
    if options["model"] == "FOLDER":
        options["model"] = folder
    with pytest.raises(ValueError, match=message):
        PreferenceModule(**options)


def test_without_the_library_the_extra_is_named(folder):
    module = PreferenceModule(folder, quantization={"load_in_4bit": True}, adapter=LoRA(rank=2))
    with pytest.raises(ImportError, match=r"needs the package bitsandbytes: pip install .lit-dpo\[quantization\]"):
        module.configure_model()


def test_attention_is_that_of_the_padded_form(folder, monkeypatch, caplog):
    used = set()
    original = modeling_llama.eager_attention_forward

    def noted(*args, **options):
        used.add("eager")
        return original(*args, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", noted)
    runs.fit(runs.module(folder, tokenizer=None), runs.data(max_length=64), max_steps=1)
    assert not used
    module = runs.module(folder, tokenizer=None, attn_implementation="eager")
    runs.fit(module, runs.data(max_length=64), max_steps=1)
    assert used
    assert module.scorer.form == "padded"
    assert "`attn_implementation: eager` is theirs, and the flat form has its own" in caplog.text
    capped = {**runs.LLAMA, "model_type": "gemma2", "attn_logit_softcapping": 5.0}
    module = runs.module(capped, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"`attn_implementation: sdpa` (would drop the cap|is not for a gemma2)"):
        module.configure_model()
