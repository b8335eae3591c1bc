"""From a checkpoint to a folder that transformers loads."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo import LoRA, PreferenceModule, WeightedLoss
from lit_dpo.export import export, export_checkpoint
from lit_dpo.losses import DPOLoss, SFTLoss
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


def trained(tmp_path, **options):
    """A trained module, and its checkpoint."""
    module = runs.module(lr=0.1, **options)
    run = runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=3)
    run.save_checkpoint(tmp_path / "a.ckpt")
    return module, str(tmp_path / "a.ckpt")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize(
    "description", [runs.LLAMA, {**runs.LLAMA, "tie_word_embeddings": True}, runs.NEOX], ids=["llama", "tied", "neox"]
)
def test_it_is_the_trained_policy_bit_for_bit(tmp_path, description):
    module, checkpoint = trained(tmp_path, model=description)
    folder = export_checkpoint(checkpoint, str(tmp_path / "out" / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert runs.same(runs.weights(model), runs.weights(module.policy))
    assert json.loads((folder / "config.json").read_text())["model_type"] == description["model_type"]
    assert model.config._attn_implementation != "lit_dpo_pairs"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hello"}]
    for add in (True, False):
        options = {"tokenize": False, "add_generation_prompt": add}
        ours = module.tokenizer.apply_chat_template(turn, **options)
        assert tokenizer.apply_chat_template(turn, **options) == ours
    assert tokenizer("Hello there").input_ids == module.tokenizer("Hello there").input_ids


def test_the_model_card_says_where_it_comes_from(tmp_path):
    file = runs.pairs_file(tmp_path)
    module = runs.module(lr=0.1, loss=WeightedLoss((DPOLoss(beta=0.25), SFTLoss())), adapter=LoRA(rank=2))
    run = runs.fit(module, runs.data(file), max_epochs=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    card = (export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "out")) / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "base_model" not in head  # it was random
    dpo = "DPOLoss(beta=0.25, label_smoothing=0.0, length_normalize=False)"
    loss = f"WeightedLoss(losses=[{dpo}, SFTLoss(length_normalize=True)], weights=[1.0, 1.0])"
    accuracy = float(run.callback_metrics["val/rewards/accuracies"])
    rows = {"loss": loss, "data, train": file, "optimizer steps": "6", "pairs an optimizer step": "8"}
    for name, value in {**rows, "val/rewards/accuracies": f"{accuracy:.4g}"}.items():
        assert f"| {name} | `{value}` |" in card
    assert f"torch {torch.__version__}" in card

    again = runs.module(model=str(tmp_path / "out"))
    run = runs.fit(again, runs.data(file), max_steps=1)
    run.save_checkpoint(tmp_path / "b.ckpt")
    card = (export_checkpoint(str(tmp_path / "b.ckpt"), str(tmp_path / "out2")) / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder is no name that the hub may know
    assert f"| starting model | `{tmp_path / 'out'}` |" in card


def test_generation_config_and_added_tokens_are_kept(tmp_path):
    tokenizer = quickstart_tokenizer()
    tokenizer.add_tokens(["<think>"])
    model = load_model(runs.LLAMA, tokenizer)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    export(model, tokenizer, tmp_path / "start")
    module = runs.module(model=str(tmp_path / "start"), tokenizer=None, lr=0.1)
    run = runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    folder = export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert (found.generation_config.temperature, found.generation_config.do_sample) == (0.3, True)
    assert AutoTokenizer.from_pretrained(folder)("<think>").input_ids == [len(tokenizer) - 1]


def test_dtype_and_loss_do_not_matter(tmp_path):
    loss = WeightedLoss((DPOLoss(), SFTLoss()))
    module, checkpoint = trained(tmp_path, dtype="bfloat16", loss=loss)
    model = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, str(tmp_path / "out")))
    assert model.dtype == torch.bfloat16
    assert runs.same(runs.weights(model), runs.weights(module.policy))


def test_adapters_are_folded_in(tmp_path):
    module, checkpoint = trained(tmp_path, adapter=LoRA(rank=2, alpha=64))
    model = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, str(tmp_path / "out")))
    torch.testing.assert_close(logits(model), logits(module.policy), rtol=0, atol=1e-5)
    with module.policy.disable_adapter():
        assert (logits(model) - logits(module.policy)).abs().max() > 1e-2


def test_adapters_are_written_alone(tmp_path):
    from peft import PeftModel

    start = str(export(load_model(runs.LLAMA, quickstart_tokenizer()), quickstart_tokenizer(), tmp_path / "start"))
    module, checkpoint = trained(tmp_path, model=start, adapter=LoRA(rank=2, alpha=64))
    folder = export_checkpoint(checkpoint, str(tmp_path / "out"), merge=False)
    assert not (folder / "model.safetensors").exists()
    base = module.policy.get_base_model()
    model = PeftModel.from_pretrained(load_model(start), folder)
    assert torch.equal(logits(model), logits(module.policy))
    assert type(model.get_base_model()) is type(base)
    found = AutoModelForCausalLM.from_pretrained(folder)  # the base is named in it
    assert torch.equal(logits(found), logits(module.policy))


def test_adapters_alone_of_a_base_that_nobody_has_are_refused(tmp_path):
    _, checkpoint = trained(tmp_path, adapter=LoRA(rank=2))
    with pytest.raises(ValueError, match="random weights that are stored nowhere: leave `merge` true"):
        export_checkpoint(checkpoint, str(tmp_path / "out"), merge=False)
    assert not (tmp_path / "out").exists()


def test_the_next_run_starts_from_it(tmp_path):
    module, checkpoint = trained(tmp_path)
    folder = export_checkpoint(checkpoint, str(tmp_path / "out"))
    again = PreferenceModule(str(folder))
    again.configure_model()
    assert runs.same(runs.weights(again.policy), runs.weights(module.policy))


# -- what it refuses, leaving nothing behind --------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    def refused(error, match, checkpoint):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=match):
            export_checkpoint(str(checkpoint), str(tmp_path / "out"))
        assert sorted(tmp_path.rglob("*")) == before

    return refused


def test_a_missing_checkpoint(refused, tmp_path):
    refused(FileNotFoundError, r"No checkpoint `.*b\.ckpt`: give a \.ckpt file", tmp_path / "b.ckpt")
    (tmp_path / "step=7.ckpt").touch()
    refused(FileNotFoundError, r"No checkpoint `.*b\.ckpt`: there are step=7\.ckpt", tmp_path / "b.ckpt")
    refused(FileNotFoundError, "No checkpoint", tmp_path / "no" / "folder.ckpt")


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    for name, content in (("text", b"not a checkpoint"), ("empty", b""), ("zip", b"PK\x03\x04 and no more")):
        (tmp_path / name).write_bytes(content)
        refused(ValueError, f"`.*{name}` does not load as a checkpoint", tmp_path / name)


def test_a_checkpoint_of_something_else(refused, tmp_path):
    for name, content in (("tensor", torch.zeros(2)), ("state", {"state_dict": {}}), ("list", [1])):
        torch.save(content, tmp_path / name)
        refused(ValueError, f"`.*{name}` is no checkpoint of a `PreferenceModule`", tmp_path / name)
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, tmp_path / "other.ckpt")
    refused(ValueError, "is no checkpoint of a `PreferenceModule`", tmp_path / "other.ckpt")


def test_a_cut_off_checkpoint(refused, tmp_path):
    _, checkpoint = trained(tmp_path)
    with open(checkpoint, "rb+") as file:
        file.truncate(20_000)
    refused(ValueError, "does not load as a checkpoint", checkpoint)


def test_a_checkpoint_that_would_run_code(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": {}, "hyper_parameters": {"model": Evil()}}, tmp_path / "evil.ckpt")
    refused(ValueError, "does not load as a checkpoint", tmp_path / "evil.ckpt")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"`.*out` exists already: name a new folder, or remove that one first"):
        export_checkpoint("never looked at", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    _, checkpoint = trained(tmp_path)
    (tmp_path / "out").mkdir()
    assert (export_checkpoint(checkpoint, str(tmp_path / "out")) / "model.safetensors").exists()


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    module, checkpoint = trained(tmp_path)

    def full(self, folder, **options):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(module.tokenizer), "save_pretrained", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before
