"""Completions before and after training, to see with one's own eyes what was learned."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.text import Text

from lit_dpo.callbacks.progress import finish_progress
from lit_dpo.module import PreferenceModule
from lit_dpo.pretrained import trusts_remote_code
from lit_dpo.scoring.score import own_attention


class SampleCompletions(Callback):
    """Print the policy's greedy completions of some prompts when training starts and ends.

    Args:
        prompts: User messages; a tokenizer without a chat template gets them as plain text.
        max_new_tokens: Tokens of a completion at most.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 40) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the policy says before training."""
        self._show("Before training", pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what it says after."""
        finish_progress(trainer)
        self._show("After training", pl_module)

    def _show(self, title: str, module: LightningModule) -> None:
        assert isinstance(module, PreferenceModule)
        completions = [complete(module, prompt, self.max_new_tokens) for prompt in self.prompts]
        _print(title, list(zip(self.prompts, completions, strict=True)))


@torch.no_grad()
def complete(module: PreferenceModule, prompt: str, max_new_tokens: int) -> str:
    """The policy's greedy completion of a user message, as text."""
    policy: Any = module.policy
    tokenizer: Any = module.tokenizer
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None).input_ids
    own_attention(policy)
    training = policy.training
    policy.eval()
    try:
        out = policy.generate(
            input_ids=ids.to(module.device),
            attention_mask=torch.ones_like(ids, device=module.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            trust_remote_code=trusts_remote_code(),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    finally:
        policy.train(training)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


@rank_zero_only
def _print(title: str, rows: list[tuple[str, str]]) -> None:
    console = Console()
    console.print(Text(title, style="bold"))
    for prompt, completion in rows:
        console.print(Text(f"  {prompt}", style="dim"))
        console.print(Text(f"  -> {completion!r}"))
