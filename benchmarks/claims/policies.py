"""What a trained policy does: the completions it writes, and how far it has drifted from where it started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_dpo import PairBatch, score
from lit_dpo.sampling import Completion, Sampler


def completions(folder: Path, prompts: Sequence[str], sampler: Sampler) -> list[list[Completion]]:
    """What an exported policy says to prompts of plain text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return list(sampler(_model(folder), tokenizer, (tokenizer(prompt).input_ids for prompt in prompts)))


def _model(folder: Path) -> PreTrainedModel:
    """An exported policy, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).to(device).eval()


def greedy(folder: Path, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
    """The likeliest completion of each prompt, token by token."""
    said = completions(folder, prompts, Sampler(temperature=0.0, max_new_tokens=max_new_tokens))
    return [one.text for (one,) in said]


@torch.no_grad()
def drift(folder: Path, base: Path, prompts: Sequence[str], seed: int, max_new_tokens: int = 64) -> float:
    """Estimated Kullback-Leibler divergence of a policy from its base, in nats a token of the policy's own completions.

    One completion a prompt is drawn at temperature 1; the estimate is the sum over all tokens of the log-ratio,
    divided by their number.
    """
    said = completions(folder, prompts, Sampler(max_new_tokens=max_new_tokens, seed=seed))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    models = [_model(path) for path in (folder, base)]
    end, total, count = [tokenizer.eos_token_id], 0.0, 0
    for start in range(0, len(prompts), 32):
        some = zip(prompts[start : start + 32], said[start : start + 32], strict=True)
        batch = PairBatch.from_lists([(tokenizer(prompt).input_ids, list(one.ids), end) for prompt, (one,) in some])
        policy, reference = (score(model, batch.to(model.device)) for model in models)
        total += float((policy.chosen - reference.chosen).sum())
        count += int(policy.chosen_tokens.sum())
    return total / count
