"""Getting a tokenizer from a name or a folder, or making one from texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_dpo.pretrained import read_tokenizer

if TYPE_CHECKING:
    TokenizerSource = str | PreTrainedTokenizerBase
else:  # what the command line reads: there are no objects on it
    TokenizerSource = str

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or local folder, or `quickstart`: a small one made from the embedded data.

    Args:
        source: The name or folder.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: There is no such tokenizer.
    """
    if source == "quickstart":
        return quickstart_tokenizer()
    return read_tokenizer(source, revision)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made from texts, with the ChatML chat template.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens at most, the 256 bytes and 3 special tokens included.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def quickstart_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the quickstart: 1,024 tokens learnt from the embedded preference data."""
    lines = Path(__file__).with_name("data").joinpath("quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return train_tokenizer((m["content"] for row in rows for side in row.values() for m in side), vocab_size=1024)
