"""Completions before and after training."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy

from lit_dpo import LoRA, WeightedLoss
from lit_dpo.callbacks import SampleCompletions, SamplePrompts
from lit_dpo.callbacks.samples import complete
from lit_dpo.losses import DPOLoss, SFTLoss
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = runs.QUIET


def greedy(model, tokenizer, prompt, tokens):
    """The oracle: one forward pass a token, without a cache."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + tokens and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_completions_are_the_policys_greedy_ones():
    module = runs.module(runs.NEOX)
    module.configure_model()
    model, tokenizer = load_model(runs.NEOX, quickstart_tokenizer()).eval(), quickstart_tokenizer()
    prompt = "<|im_start|>user\nCan you help me?<|im_end|>\n<|im_start|>assistant\n"
    assert complete(module, "Can you help me?", 12) == greedy(model, tokenizer, prompt, 12) != ""
    assert module.policy.training


def test_without_a_chat_template_the_prompt_is_plain_text():
    module = runs.module(runs.NEOX)
    module.configure_model()
    module.tokenizer.chat_template = None
    model = load_model(runs.NEOX, quickstart_tokenizer()).eval()
    assert complete(module, "Once upon", 6) == greedy(model, module.tokenizer, "Once upon", 6)


def test_both_ends_of_training_are_shown(capsys):
    loss = WeightedLoss((DPOLoss(), SFTLoss()))
    module = runs.module(lr=1e-2, optimizer=torch.optim.AdamW, loss=loss)
    callback = SampleCompletions(["Can you help me?", "Tell me [bold]more[/bold].\x1b[2J"], max_new_tokens=5)
    runs.fit(module, runs.data(), max_steps=3, callbacks=[callback])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [lines[0], lines[1], lines[3]] == ["Before training", "Can you help me?", "Tell me [bold]more[/bold].?[2J"]
    assert [lines[5], lines[6], lines[8]] == ["After training", "Can you help me?", "Tell me [bold]more[/bold].?[2J"]
    assert all(lines[i].startswith("-> '") for i in (2, 4, 7, 9))
    assert lines[2] != lines[7]


def test_looking_changes_nothing(tmp_path):
    found = []
    prompts = ["Hello", "Can you help me?"]
    for callbacks in (
        [],
        [SampleCompletions(prompts, max_new_tokens=3)],
        [SamplePrompts(prompts, max_new_tokens=5, temperature=1.0)],
    ):
        torch.manual_seed(0)
        module = runs.module(adapter=LoRA(rank=2, dropout=0.3), lr=0.1, gradient_checkpointing=True)
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=3, val_check_interval=1, callbacks=callbacks)
        found.append({**runs.weights(module.policy), "random": torch.get_rng_state()})
    assert runs.same(found[0], found[1])
    assert runs.same(found[0], found[2])


def validated(folder, *callbacks, steps=2, **options):
    """A run that validates after every step and logs to a csv file."""
    module = runs.module(runs.NEOX, lr=0.1)
    logger = CSVLogger(folder, name=None, version=0)
    data = runs.data(runs.pairs_file(folder), validation_fraction=0.25)
    options = {"val_check_interval": 1, "callbacks": list(callbacks), "logger": logger, **options}
    return module, runs.fit(module, data, folder, max_steps=steps, **options)


def test_each_validation_shows_samples_and_counts_what_went_wrong(tmp_path, capsys):
    prompts = ["Can you help me?", "Tell me [bold]more[/bold].?[2J"]
    module, run = validated(tmp_path, SamplePrompts(prompts, max_new_tokens=7))
    path = tmp_path / "version_0" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, prompt) for step in (1, 2) for prompt in prompts]
    for row in rows[2:]:  # of the weights at the end
        chat = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert row["completion"].strip() == greedy(module.policy.eval(), module.tokenizer, chat, 7)
    unfinished = sum(module.tokenizer.eos_token_id not in row["ids"] for row in rows[2:]) / 2
    repeating = sum(len({*zip(*(row["ids"][k:] for k in range(4)), strict=False)}) <= 2 for row in rows[2:]) / 2
    assert float(run.callback_metrics["val/samples/unfinished"]) == unfinished
    assert float(run.callback_metrics["val/samples/repeating"]) == repeating
    shown = capsys.readouterr().out
    assert "Samples at step 1: " in shown
    assert shown.count("Tell me [bold]more[/bold].") == 2


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_samples_are_written_once_for_each_step(tmp_path):
    folder = tmp_path / "version_0"
    folder.mkdir()
    path = folder / "samples.jsonl"
    path.write_text('{"step": 1, "prompt": "mine"}\n{"step": 2, "pro')  # as a kill leaves it
    validated(tmp_path, SamplePrompts(["Hello"], max_new_tokens=2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert json.loads(path.read_text().splitlines()[0])["prompt"] == "mine"
    path.write_text("my diary\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl` holds something else than samples: move it away"):
        validated(tmp_path, SamplePrompts(["Hello"], max_new_tokens=2))
    assert path.read_text() == "my diary\n"


@pytest.mark.slow
def test_two_processes_sample_as_one(tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        options = {
            "devices": processes, "strategy": "ddp", "accelerator": "cpu", "max_steps": 2, "val_check_interval": 1.0,
            "default_root_dir": folder, "num_sanity_val_steps": 0,
        }  # fmt: skip
        given = [f"--trainer.{name}={value}" for name, value in options.items()]
        given += ["--trainer.callbacks+=SamplePrompts", "--trainer.callbacks.max_new_tokens", "5"]
        given += ["--trainer.callbacks.prompts", '["Hello", "Can you help me?"]']
        batch = str(4 // processes)
        conf = str(Path(runs.__file__).with_name("conf") / "tiny.yaml")
        data = ["--data.train", runs.pairs_file(tmp_path, 8), "--data.batch_size", batch]
        runs.launch(["lit_dpo", "fit", "--config", "dpo", "--config", conf, *data, *given], processes)
        rows = [json.loads(line) for line in (folder / "version_0" / "samples.jsonl").read_text().splitlines()]
        found.append([(row["step"], row["prompt"], row["ids"]) for row in rows])
    assert found[0] == found[1] != []


def test_it_is_off_where_weights_are_sharded_and_says_so(capsys, caplog):
    callback, module = SamplePrompts(["Hello"]), runs.module()
    run = runs.trainer()
    run.strategy.__class__ = FSDPStrategy
    with caplog.at_level("INFO"):
        callback.on_fit_start(run, module)
    assert "SamplePrompts is off: FSDPStrategy may shard the weights" in caplog.text + capsys.readouterr().err
    callback.on_validation_epoch_end(run, module)  # would need a policy


def test_prompts_are_needed():
    with pytest.raises(ValueError, match="`prompts` must name at least one"):
        SamplePrompts([])
    with pytest.raises(ValueError, match="`temperature` must be at least 0"):
        SamplePrompts(["Hello"], temperature=-1)
