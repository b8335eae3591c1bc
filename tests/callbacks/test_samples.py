"""Completions before and after training."""

import torch

from lit_dpo import LoRA, WeightedLoss
from lit_dpo.callbacks import SampleCompletions
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
    callback = SampleCompletions(["Can you help me?", "Tell me [bold]more[/bold]."], max_new_tokens=5)
    runs.fit(module, runs.data(), max_steps=3, callbacks=[callback])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [lines[0], lines[1], lines[3]] == ["Before training", "Can you help me?", "Tell me [bold]more[/bold]."]
    assert [lines[5], lines[6], lines[8]] == ["After training", "Can you help me?", "Tell me [bold]more[/bold]."]
    assert all(lines[i].startswith("-> '") for i in (2, 4, 7, 9))
    assert lines[2] != lines[7]


def test_looking_changes_nothing(tmp_path):
    found = []
    for callbacks in ([], [SampleCompletions(["Hello"], max_new_tokens=3)]):
        module = runs.module(adapter=LoRA(rank=2), lr=0.1)
        runs.fit(module, runs.data(runs.pairs_file(tmp_path)), max_steps=3, callbacks=callbacks)
        found.append(runs.weights(module.policy))
    assert runs.same(*found)
