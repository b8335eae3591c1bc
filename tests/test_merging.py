"""Folding adapters into the weights keeps the policy, or is refused."""

import copy

import pytest
import torch

from lit_dpo.adapters import LoRA
from lit_dpo.export import export, export_checkpoint
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer, train_tokenizer
from tests import runs
from tests.models import tiny_model

pytest.importorskip("peft")
pytestmark = [
    *runs.QUIET,
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied)"),  # peft's own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
CALM = {"initializer_range": 0.1}
TIED = {**runs.LLAMA, "tie_word_embeddings": True}


def tokenizer():
    return train_tokenizer(["the cat sat on the mat"], vocab_size=280)


def adapted(targets, size=0.1, dtype="float32", **overrides):
    """A model with adapters that do something, attached without the package's own checks."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama", dtype, **CALM, **overrides), LoraConfig(r=2, target_modules=list(targets))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "embed_tokens"]])
def test_an_adapter_on_a_tied_embedding_is_refused(targets, tmp_path):
    module = runs.module(TIED, adapter=LoRA(rank=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"embed_tokens.* shares its weight with .*lm_head.*`target_modules`"):
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)


def test_an_adapter_on_an_embedding_of_its_own_is_no_mistake(tmp_path):
    adapter = LoRA(rank=2, target_modules=["q_proj", "embed_tokens"])
    module = runs.module({**TIED, "tie_word_embeddings": False}, adapter=adapter)
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=2)
    ids = torch.arange(3, 15)[None]
    before = module.policy.eval()(ids).logits
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(export(module.policy, module.tokenizer, tmp_path / "out"))
    assert (loaded(ids).logits - before).abs().max() < 1e-4


@pytest.mark.parametrize("size", [0.1, 1e-3])
def test_a_merge_that_changes_the_policy_is_refused(size, tmp_path):
    """Small adapters too: what they change is what a wrong merge must be measured by."""
    model = adapted(["embed_tokens"], size, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"Merging the adapters would change the policy, .*nats.*`merge: false`"):
        export(model, tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(model, tokenizer(), tmp_path / "out", merge=False)  # which the message advises


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [0.3, 1e-2, 0.0])
def test_a_right_merge_passes_in_every_dtype(dtype, size, tmp_path):
    model = adapted(["q_proj", "v_proj", "down_proj"], size, dtype)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.train().modules()]
    assert (export(model, tokenizer(), tmp_path / "out") / "model.safetensors").exists()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_a_checkpoint_of_an_older_release_with_a_tied_adapter_is_exported_unmerged_only(tmp_path, monkeypatch):
    base = tmp_path / "base"
    load_model(TIED, quickstart_tokenizer()).save_pretrained(base)
    with monkeypatch.context() as patch:
        patch.setattr("lit_dpo.assembly.refuse_tied_adapters", lambda model: None)
        adapter = LoRA(rank=2, target_modules=["embed_tokens"])
        module = runs.module(str(base), lr=1.0, adapter=adapter)
        run = runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=3)
        run.save_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="Merging the adapters would change the policy"):
        export_checkpoint(str(tmp_path / "old.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert (export_checkpoint(str(tmp_path / "old.ckpt"), str(tmp_path / "out"), merge=False)).is_dir()
