"""The model that a run leaves behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo import LoRA
from lit_dpo.callbacks import BestCheckpoint, ExportModel
from lit_dpo.export import export, export_checkpoint
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


def test_without_a_ranked_checkpoint_it_is_the_last_policy(tmp_path):
    module = runs.module(lr=0.1)
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), tmp_path, max_steps=2, callbacks=[ExportModel("model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert runs.same(runs.weights(model), runs.weights(module.policy))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert tokenizer.chat_template == module.tokenizer.chat_template


def test_with_one_it_is_the_best(tmp_path):
    """A learning rate that wrecks the model after the first validation."""
    best = BestCheckpoint("val/loss", mode="min", dirpath=str(tmp_path / "kept"))
    module = runs.module(lr=30.0)
    options = {"max_epochs": 3, "callbacks": [best, ExportModel()], "enable_checkpointing": True}
    runs.fit(module, runs.data(runs.pairs_file(tmp_path), batch_size=32), tmp_path, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not runs.same(runs.weights(model), runs.weights(module.policy))
    export_checkpoint(best.best_model_path, str(tmp_path / "by_hand"))
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "by_hand")
    assert runs.same(runs.weights(model), runs.weights(by_hand))


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_are_merged_unless_told_otherwise(tmp_path, merge):
    tokenizer = quickstart_tokenizer()
    start = str(export(load_model(runs.LLAMA, tokenizer), tokenizer, tmp_path / "start"))
    module = runs.module(start, lr=0.1, adapter=LoRA(rank=2))
    callbacks = [ExportModel(merge=merge)]
    runs.fit(module, runs.data(runs.pairs_file(tmp_path)), tmp_path, max_steps=2, callbacks=callbacks)
    assert (tmp_path / "export" / "adapter_config.json").exists() == (not merge)
    if merge:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        ids = torch.arange(9)[None]
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, module.policy(ids).logits, rtol=0, atol=1e-5)


def test_adapters_alone_of_a_base_that_nobody_has_are_refused_before_training(tmp_path):
    module = runs.module(adapter=LoRA(rank=2))
    with pytest.raises(ValueError, match="random weights that are stored nowhere"):
        runs.fit(module, runs.data("quickstart"), tmp_path, max_steps=2, callbacks=[ExportModel(merge=False)])
    assert module.trainer.global_step == 0


def test_a_folder_in_the_way_is_found_before_training(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("mine")
    module = runs.module()
    with pytest.raises(FileExistsError, match=r"`.*export` exists already: name a new folder"):
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), tmp_path, max_steps=2, callbacks=[ExportModel()])
    assert module.trainer.global_step == 0
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["mine.txt"]
