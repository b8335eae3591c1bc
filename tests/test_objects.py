"""A model and a tokenizer that are loaded already go in as they are; nothing that is written holds them."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_dpo import CachedReference, EasyToHard, LoRA, PreferenceDataModule, PreferenceModule, SFTLoss
from lit_dpo.callbacks import BestCheckpoint, ExportModel
from lit_dpo.export import export_checkpoint
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.tokenizers import train_tokenizer
from tests import runs

pytestmark = runs.QUIET

TOKENIZER = train_tokenizer((row["prompt"] + row["chosen"] for row in runs.rows(20)), 300)


def loaded(seed=3):
    """A model of transformers' own, made without this package."""
    sizes = {name: value for name, value in runs.LLAMA.items() if name != "model_type"}
    config = LlamaConfig(**sizes, vocab_size=len(TOKENIZER), pad_token_id=TOKENIZER.pad_token_id)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def module(model, tokenizer=TOKENIZER, kind=torch.optim.SGD, **options):
    optimizer = lambda parameters: kind(parameters, lr=1e-2)  # noqa: E731
    return PreferenceModule(model, tokenizer=tokenizer, optimizer=optimizer, lr_scheduler=None, **options)


def data(count=12, **options):
    return PreferenceDataModule(Dataset.from_list(runs.rows(count)), batch_size=4, max_length=128, **options)


def trained(model, folder, *callbacks, steps=3, ckpt_path=None, **options):
    """A module and its Trainer after a few steps."""
    made = module(model, **options)
    run = runs.trainer(folder, max_steps=steps, callbacks=list(callbacks))
    run.fit(made, data(), ckpt_path=ckpt_path)
    return made, run


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter": LoRA(rank=2)}, {"reference": CachedReference, "adapter": LoRA(rank=2)}],
    ids=["frozen copy", "adapters", "cached"],
)
def test_it_trains_as_the_same_weights_in_a_folder(options, tmp_path):
    def chosen(name):
        return {k: v(str(tmp_path / name)) if v is CachedReference else v for k, v in options.items()}

    model = loaded()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    expected, _ = trained(str(tmp_path / "model"), tmp_path, tokenizer=None, **chosen("a"))
    start = runs.weights(model)
    made, run = trained(model, tmp_path, **chosen("b"))
    assert runs.same(runs.weights(made.policy), runs.weights(expected.policy))
    assert made.model is model
    assert (made.policy is model) != ("adapter" in options)
    assert not runs.same(runs.weights(made.policy), start)
    run.save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("policy.") for name in kept["state_dict"])
    assert kept["hyper_parameters"]["model"] == {"given_as_object": "LlamaForCausalLM"}


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_a_checkpoint_asks_for_it_again(adapter, tmp_path):
    expected, _ = trained(loaded(), tmp_path, adapter=adapter)
    model = loaded()
    _, run = trained(model, tmp_path, steps=1, adapter=adapter)
    path = str(tmp_path / "run.ckpt")
    run.save_checkpoint(path)
    again, _ = trained(loaded(), tmp_path, ckpt_path=path, adapter=adapter)
    assert runs.same(runs.weights(again.policy), runs.weights(expected.policy))
    for given in ({}, {"model": loaded()}, {"tokenizer": TOKENIZER}):
        name = "tokenizer" if "model" in given else "model"
        with pytest.raises(ValueError, match=f"checkpoint's `{name}` was given as an object, a .*: give it again"):
            PreferenceModule.load_from_checkpoint(path, **given)
        with pytest.raises(ValueError, match=f"checkpoint's `{name}` was given as an object, a .*: give it again"):
            export_checkpoint(path, str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()
    objects = {"model": model, "tokenizer": TOKENIZER}  # whatever has become of the object's own weights meanwhile
    before = runs.weights(model)
    export_checkpoint(path, str(tmp_path / "out"), **objects)
    assert runs.same(runs.weights(model), before)
    back = PreferenceModule.load_from_checkpoint(path, **{**objects, "model": loaded(seed=4)})
    back.configure_model()
    back.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    ids = torch.arange(20)[None]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(written, back.policy.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == TOKENIZER.get_vocab()


def test_the_best_policy_of_a_run_is_exported(tmp_path):
    made = module(loaded(), adapter=LoRA(rank=2))
    best = BestCheckpoint("val/loss", mode="min")
    run = runs.trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[best, ExportModel("out")])
    run.fit(made, data(validation=runs.rows(4, start=30)))
    assert Path(best.best_model_path).exists()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not runs.same(runs.weights(written), runs.weights(loaded()))


@pytest.mark.slow
def test_stepwise_starts_from_it(tmp_path):
    def stepwise(model, folder, **options):
        made = module(model, adapter=LoRA(rank=2), kind=torch.optim.AdamW, **options)
        make_trainer = lambda root: runs.trainer(root, max_epochs=1)  # noqa: E731
        fit_stepwise(made, data(partition=EasyToHard(2)), make_trainer, tmp_path / folder)
        return runs.weights(made.policy)

    model = loaded()
    model.save_pretrained(tmp_path / "model")
    assert runs.same(stepwise(model, "object"), stepwise(str(tmp_path / "model"), "name"))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` has float32 weights and `dtype` is bfloat16: set `dtype`"):
        module(loaded(), dtype="bfloat16")
    with pytest.raises(ValueError, match="this one has the type Linear: give the `PreTrainedModel`"):
        module(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this one has adapters of its own: give the `PreTrainedModel`"):
        module(LoRA(rank=2).attach(loaded()))
    with pytest.raises(ValueError, match="has no tokenizer of its own: set `tokenizer`"):
        module(loaded(), tokenizer=None)
    with pytest.raises(ValueError, match=r"cannot be sharded over processes.*give the folder"):
        runs.trainer(tmp_path, max_steps=1, strategy="fsdp2").fit(module(loaded()), data())
    torch.distributed.destroy_process_group()
    model, cache = loaded(), CachedReference(str(tmp_path / "cache"))
    trained(model, tmp_path, steps=1, loss=SFTLoss())
    quantized = copy.deepcopy(model)
    quantized.is_quantized = True
    with pytest.raises(ValueError, match="quantized model cannot be trained themselves: set `adapter`"):
        module(quantized)
    made, _ = trained(model, tmp_path, steps=1, reference=cache)
    cache.folder = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"starting weights are asked for again.*give a folder or a name"):
        runs.trainer(tmp_path, max_steps=3).fit(made, data())
