import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo.adapters import LoRA
from lit_dpo.export import export
from lit_dpo.models import empty_model, load_model
from lit_dpo.scoring.audit import choose_form
from lit_dpo.tokenizers import load_tokenizer, quickstart_tokenizer, train_tokenizer
from tests.models import DESCRIPTIONS, VOCABULARY, tiny_model

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 5
IDS = torch.arange(3, 15).view(2, 6)
CALM = {"initializer_range": 0.1}  # logits of about 1
adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


def describe(model_type, **more):
    return {"model_type": model_type, **DESCRIPTIONS[model_type], **more}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Loading


def test_a_description_and_a_seed_make_one_model_and_leave_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = load_model(describe("llama"), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(load_model(describe("llama"), seed=3), model)
    assert not same_weights(load_model(describe("llama"), seed=4), model)


def test_a_description_is_not_changed():
    description = describe("llama")
    load_model(description)
    assert description == describe("llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_that_of_the_weights_and_of_nothing_else(dtype, tmp_path):
    model = load_model(describe("llama"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert torch.get_default_dtype() == torch.float32
    load_model(describe("llama")).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype=dtype).dtype == getattr(torch, dtype)


def test_the_tokenizer_fills_in_what_a_description_leaves_out(tokenizer):
    description = {k: v for k, v in describe("llama").items() if k != "vocab_size" and not k.endswith("token_id")}
    config = load_model(description, tokenizer).config
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    kept = load_model({**description, "vocab_size": 300, "pad_token_id": 7}, tokenizer).config
    assert (kept.vocab_size, kept.pad_token_id) == (300, 7)


def test_a_folder_gives_back_what_was_saved(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), seed=9)
    assert same_weights(loaded, model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("model_type", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    ],
)
def test_dropout_is_off_even_in_training_mode(model_type, rates, saved, tmp_path):
    model = load_model(describe(model_type, **rates))
    if saved:
        model.save_pretrained(tmp_path)
        model = load_model(str(tmp_path))
    assert torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits)
    assert all(getattr(model.config, name) == rate for name, rate in rates.items())  # for whoever loads it next


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`model` 'nobody/nothing': no such folder, and not to be had from the hub"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match=r"`model` '.*': that folder exists but does not load .*`save_pretrained`"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"`tokenizer` 'nobody/nothing': no such folder"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_named(damage, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / damage).write_bytes(b"{broken")
    with pytest.raises(ValueError, match="that folder exists but does not load"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("description", [{"model_type": "lama", "hidden_size": 8}, {"hidden_size": 8}, {}])
def test_a_description_without_a_known_type_is_refused(description):
    named = repr(description.get("model_type"))
    with pytest.raises(ValueError, match=f"`model` names no usable `model_type`: {named}.*model_type: llama"):
        load_model(description)


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "wide"), ("num_attention_heads", 5)])
def test_a_description_that_fits_no_model_is_refused(name, value):
    with pytest.raises(ValueError, match=r"^`model` describes no model: .*(hidden_size|hidden size)"):
        load_model(describe("llama", **{name: value}))


# Tokenizers


def test_a_trained_tokenizer_keeps_text_and_its_special_tokens(tokenizer):
    assert len(tokenizer) <= 280
    for text in (*TEXTS, "unseen: Üñí\n\t✓ 漢字", " spaces  kept "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")}) == 3
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")  # it did learn merges


def test_a_trained_tokenizer_renders_chats(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(prompt)["input_ids"].count(tokenizer.eos_token_id) == 1


def test_training_a_tokenizer_twice_gives_the_same(tokenizer):
    again = train_tokenizer(TEXTS, vocab_size=280)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_quickstart_tokenizer_is_known_by_name():
    by_name = load_tokenizer("quickstart")
    assert len(by_name) == 1024
    assert by_name.get_vocab() == quickstart_tokenizer().get_vocab()


def test_a_tokenizer_is_loaded_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template


def test_a_cap_on_attention_scores_is_kept(tokenizer):
    """transformers 5.17 would take `sdpa` for Gemma 2, which has no cap."""
    capped, free = (tiny_model("gemma2", attn_logit_softcapping=cap) for cap in (0.1, 1e6))
    assert (capped(IDS).logits - free(IDS).logits).abs().max() > 0.01
    assert empty_model({"model_type": "gemma2", "vocab_size": 9}).config._attn_implementation == "eager"


# Export


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])  # gpt2 ties its head to the embedding
def test_export_loads_bit_for_bit(model_type, tokenizer, tmp_path):
    model = tiny_model(model_type)
    model.generation_config.max_new_tokens = 7
    before = model(IDS).logits
    choose_form(model)  # training has switched the attention
    folder = export(model, tokenizer, tmp_path / "deep" / "out")
    assert folder == tmp_path / "deep" / "out"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.set_attn_implementation(
        "eager" if model_type == "gemma2" else "sdpa"
    )  # transformers 5.17 takes sdpa for both
    assert torch.equal(loaded(IDS).logits, before)
    assert same_weights(loaded, model)
    assert loaded.generation_config.max_new_tokens == 7
    assert "lit_dpo" not in (folder / "config.json").read_text()
    words = AutoTokenizer.from_pretrained(folder)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert words.chat_template == tokenizer.chat_template
    assert words.eos_token_id == tokenizer.eos_token_id
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert folder.stat().st_mode & 0o777 == 0o755


def adapted(seed=0):
    pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LoRA(rank=2, alpha=4).attach(tiny_model("llama", **CALM))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@adapters
def test_lora_starts_as_no_change_with_only_adapters_to_train():
    pytest.importorskip("peft")
    model = LoRA(rank=4, alpha=8).attach(tiny_model("llama"))
    assert torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    rank = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert rank == {4}
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout) == (8, 0.0)


@adapters
def test_adapters_are_a_function_of_the_seed_and_leave_the_random_state_alone():
    pytest.importorskip("peft")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = LoRA(rank=2).attach(tiny_model("llama"), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(LoRA(rank=2).attach(tiny_model("llama"), seed=3), first)
    assert not same_weights(LoRA(rank=2).attach(tiny_model("llama"), seed=4), first)


@adapters
def test_export_merges_adapters_and_leaves_the_model_as_it_is(tokenizer, tmp_path):
    model = adapted()
    before = model(IDS).logits
    assert (before - tiny_model("llama", **CALM)(IDS).logits).abs().max() > 0.01
    state = {k: v.clone() for k, v in model.state_dict().items()}
    folder = export(model, tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded(IDS).logits - before).abs().max() <= 1e-5
    assert not (folder / "adapter_config.json").exists()
    assert torch.equal(model(IDS).logits, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@adapters
def test_export_without_merging_writes_the_adapters_alone(tokenizer, tmp_path):
    from peft import PeftModel

    model = adapted()
    folder = export(model, tokenizer, tmp_path / "out", merge=False)
    assert (folder / "adapter_config.json").exists()
    assert not (folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model("llama", **CALM), folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_failed_export_leaves_nothing_behind(failing, tokenizer, tmp_path, monkeypatch):
    model = tiny_model("llama")
    victim = model if failing == "model" else tokenizer

    def fail(folder, *args, **kwargs):
        (folder / "half.bin").write_bytes(b"x")
        raise OSError("No space left on device")

    monkeypatch.setattr(victim, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        export(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_place_that_holds_something(tokenizer, tmp_path):
    model = tiny_model("llama")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "precious.txt").write_text("1")
    file.write_text("1")
    for place in (full, file):
        with pytest.raises(FileExistsError, match=r"exists already: name a new folder, or remove that one first"):
            export(model, tokenizer, place)
    assert [p.name for p in full.iterdir()] == ["precious.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    empty.mkdir()
    export(model, tokenizer, str(empty))
    assert json.loads((empty / "config.json").read_text())["vocab_size"] == VOCABULARY
