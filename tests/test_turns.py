"""Completions of several messages: only what the assistant says is scored, in every form and with every reference."""

import pytest
import torch

from lit_dpo import CachedReference, DPOLoss, FrozenReference, PairBatch
from lit_dpo.references.table import content_keys
from lit_dpo.scoring.score import score
from tests import runs
from tests.models import tiny_model

pytestmark = runs.QUIET
CONTEXT = [([5, 6, 7], [8, ~9, ~10, 11, 12], [13, 14]), ([15], [16], [17, ~18, 19, ~20, 21])]


def separately(model, pairs):
    """Each sequence alone through the model, the log-probs of its scored tokens summed; shape (2B,)."""
    sums = []
    for prompt, *completions in pairs:
        for completion in completions:
            ids = torch.tensor([prompt + [i if i >= 0 else ~i for i in completion]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            scored = [n for n, i in enumerate(completion) if i >= 0]
            sums.append(sum(logps[len(prompt) + n - 1, completion[n]] for n in scored))
    return torch.stack(sums)


@pytest.mark.parametrize("max_tokens", [None, 9])
@pytest.mark.parametrize("form", ["flat", "padded"])
def test_context_behind_the_prompt_is_seen_and_not_scored(form, max_tokens):
    model = tiny_model("llama", dtype="float64")
    expected = separately(model, CONTEXT)
    weights = torch.tensor([0.3, -0.7, 1.1, 0.5], dtype=torch.float64)
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    own = expected.detach()
    model.zero_grad()
    got = score(model, PairBatch.from_lists(CONTEXT), form=form, max_tokens=max_tokens)
    sums = torch.stack([got.chosen, got.rejected], 1).flatten()
    assert (sums - own).abs().max() < 1e-10
    (sums * weights).sum().backward()
    assert max(float((p.grad - wanted[name]).abs().max()) for name, p in model.named_parameters()) < 1e-10
    assert (got.chosen_tokens.tolist(), got.rejected_tokens.tolist()) == ([3, 1], [2, 3])


def test_what_is_scored_is_part_of_a_row():
    """A cached reference finds values by content, so the same tokens scored otherwise are another row."""
    rows = [([1], [2, 3, 4], [5]), ([1], [2, ~3, 4], [5]), ([1], [~2, 3, 4], [5])]
    keys = {tuple(content_keys(PairBatch.from_lists([row]))[0].tolist()) for row in rows}
    assert len(keys) == 3


def message(role, content):
    return {"role": role, "content": content}


def talk(number, *answers):
    """What follows a question: the assistant looks something up, a tool answers, and the assistant speaks."""
    call, found, answer = answers
    turns = [message("assistant", call), message("tool", found), message("assistant", answer)]
    return {"prompt": [message("user", f"{number}?")], "chosen": turns, "rejected": [message("assistant", "no")]}


ROWS = [talk(number, "look", f"{number * 7}", "it is so") for number in range(8)]


@pytest.mark.parametrize("loss", [None, DPOLoss(length_normalize=True)])
def test_a_run_with_a_cached_reference_is_that_with_a_live_one(tmp_path, monkeypatch, loss):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path))
    options = {} if loss is None else {"loss": loss}
    found = []
    for reference in (FrozenReference(), CachedReference(), CachedReference()):
        module = runs.module(reference=reference, **options)
        runs.fit(module, runs.data(ROWS, batch_size=4), max_steps=3)
        found.append(runs.weights(module.policy))
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) < 1e-6
    assert runs.same(found[1], found[2])


def test_rows_in_memory_count_the_assistants_tokens_alone():
    module = runs.module()
    data = runs.data(ROWS, batch_size=4)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    batch = next(iter(data.pool_dataloader()))
    said = module.tokenizer("look<|im_end|>", add_special_tokens=False).input_ids
    said += module.tokenizer("it is so<|im_end|>", add_special_tokens=False).input_ids
    assert batch.targets[batch.sequences == 0].tolist() == said
    assert batch.completion_lengths[0::2].tolist() == [len(said)] * len(batch)


def test_the_token_cache_keeps_what_is_scored(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_dpo.data.token_cache.WORTH_KEEPING", 1)
    path, found = runs.write(tmp_path / "rows.jsonl", ROWS), []
    for _ in range(2):
        data = runs.data(path, batch_size=4, tokenizer=runs.module().tokenizer)
        with caplog.at_level("INFO"):
            data.setup("fit")
        batch = next(iter(data.pool_dataloader()))
        found.append((batch.input_ids.tolist(), batch.scored.tolist(), batch.targets.tolist()))
    assert "8 rows found in the token cache" in caplog.text
    assert found[0] == found[1]
