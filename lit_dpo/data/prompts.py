"""Prompts alone, for sampling: from pairs, rows that have only a prompt, or lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import Content, RowError, parse_row
from lit_dpo.files import refuse_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        content: Text, which the completion continues as it is, or messages, which the chat template renders.
        row: Where a person finds it, such as `path/file.jsonl:17`.
        line: It is a line that a person wrote: a user's message wherever the tokenizer has a chat template.
    """

    content: Content
    row: str
    line: bool = False

    @property
    def text(self) -> str:
        """What to show of it: the text, or the messages with their roles."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.content)


def read_prompts(source: str) -> Iterator[Prompt]:
    """Yield the prompts of a data set.

    Args:
        source: What `read_rows` reads, with rows that are pairs or have a `prompt` (text or messages); or a `.txt`
            file, each of whose lines is a prompt.

    Raises:
        FileNotFoundError: There is no such file.
        RowError: A row has no prompt.
    """
    if source.endswith(".txt"):
        if not Path(source).exists():
            raise FileNotFoundError(f"`{source}`: there is no such file of prompts; name another.")
        refuse_special(source)
        with open(source, encoding="utf-8-sig") as file:
            try:
                for number, line in enumerate(file, 1):
                    if text := line.strip():
                        yield Prompt(text, f"{source}:{number}", line=True)
            except UnicodeDecodeError as error:
                raise ValueError(f"`{source}` is not UTF-8 ({error.reason}): save it in that encoding.") from error
        return
    for where, row in read_rows(source):
        yield Prompt(_prompt_of(row, where), where)


def _prompt_of(row: Mapping[str, object], where: str) -> Content:
    prompt = row.get("prompt")
    try:
        return parse_row(row, "prompts", where).prompt
    except RowError as error:
        if prompt is None and "chosen" not in row:
            reason, remedy = "the row has no prompt", "add the column, as text or messages"
            raise RowError(where, "prompt", reason, remedy) from error
        if prompt is None:
            raise
    # No pair, and none is needed: two completions that are no matter, so that the prompt is checked as in training.
    sides: dict[str, object] = {"chosen": "a", "rejected": "b"}
    if not isinstance(prompt, str):
        sides = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    kept = {"prompt": prompt, "tools": row.get("tools")}
    return parse_row({**kept, **sides}, "prompts", where).prompt


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as a model sees it before it speaks: what training sees, one BOS at most.

    Raises:
        ValueError: It is of messages, and the tokenizer has no chat template.
    """
    ids: Any
    content = prompt.content
    if isinstance(content, str) and prompt.line and tokenizer.chat_template is not None:
        content = [{"role": "user", "content": content}]
    if isinstance(content, str):
        ids = tokenizer(content, split_special_tokens=True).input_ids
        return [*ids[:-1]] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else [*ids]
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template for prompts in messages: use an instruct model, or give them as text."
        )
    turns: Any = content
    text: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    while ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return [*ids]
