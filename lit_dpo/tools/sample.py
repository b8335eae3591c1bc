"""`lit-dpo sample`: what models say to the same prompts, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lit_dpo.data.prompts import Prompt, prompt_ids, read_prompts
from lit_dpo.models import Dtype
from lit_dpo.plain_text import obeyed_by_none, plain
from lit_dpo.sampling import REPEATING, Completion, Sampler, repetition
from lit_dpo.tools import page
from lit_dpo.tools.opened import Opened, open_model, open_start

_COLUMN = 38  # characters; models stand beside each other where each has so many
_PROMPT = 400  # characters of a prompt on the terminal, its last ones


@dataclass(frozen=True)
class _Said:
    """The completions of one model, those of each prompt together."""

    name: str
    completions: list[list[Completion]]


def sample_models(
    models: list[str] = [],  # noqa: B006
    prompts: str = "",
    count: int = 8,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    base: bool = True,
    dtype: Dtype = "float32",
    jsonl: str | None = None,
    html: str | None = None,
    overwrite: bool = False,
) -> None:
    """Show what models say to the same prompts, side by side.

    Args:
        models: Folders or hub names that transformers loads; runs' folders, for the best checkpoint or else the last;
            `.ckpt` files; or `last` for the newest run.
        prompts: A data set of pairs or of rows with a `prompt`, or a `.txt` file with a prompt a line.
        count: Prompts to take at most, the first ones; 0 takes all.
        samples: Completions of each prompt and model.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a completion at most.
        seed: Of the random numbers: a completion depends on its prompt, the number of the sample and this alone.
        batch_size: Completions sampled at once; it does not change them.
        base: Show the model that the first run started from, before all others.
        dtype: Of the weights.
        jsonl: A file to write, one completion a line, token ids included.
        html: A page to write.
        overwrite: Replace these files.

    Raises:
        ValueError: No model or no prompts are given, or a model cannot be used.
        OSError: A file is missing, or in the way.
    """
    if not models or not prompts:
        raise ValueError("`lit-dpo sample MODEL... --prompts FILE` needs at least one model and a file of prompts.")
    if count < 0:
        raise ValueError(f"`count` must be at least 0, got {count}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if temperature == 0 and top_p != 1:
        raise ValueError(f"`top_p` {top_p} changes nothing at `temperature` 0: raise the temperature, or leave it out.")
    page.refuse_any_taken((jsonl, html), overwrite)
    sampler = Sampler(samples, temperature, top_p, max_new_tokens, seed, rows=batch_size)
    found = read_prompts(prompts)
    asked = list(found if count == 0 else islice(found, count))
    if not asked:
        raise ValueError(f"`{prompts}` holds no prompt: give a file with at least one.")
    said = [_ask(opened, asked, sampler) for opened in _opened(models, base, dtype)]
    _show(page.terminal(), asked, said)
    if jsonl is not None:
        print(f"Wrote {page.write(jsonl, _lines(asked, said), overwrite)}")
    if html is not None:
        print(f"Wrote {page.write(html, _page(asked, said), overwrite)}")


def _opened(models: Sequence[str], base: bool, dtype: Dtype) -> Iterator[Opened]:
    """The models one after the other, so that one at a time is in memory, with the start of the first run before it."""
    for given in models:
        opened = open_model(given, dtype)
        if base and opened.options:
            base = False
            if (start := open_start(opened, dtype)) is not None and start.name not in models:
                yield start
                del start
        yield opened
        del opened


def _ask(opened: Opened, asked: Sequence[Prompt], sampler: Sampler) -> _Said:
    """All completions of one model; a terminal shows how far it is."""
    ids = [prompt_ids(opened.tokenizer, prompt) for prompt in asked]
    for prompt, each in zip(asked, ids, strict=True):
        sampler.check(opened.model, [each], f"{prompt.row}: ")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(opened.name, total=len(asked))
        completions = []
        for found in sampler(opened.model, opened.tokenizer, ids):
            completions.append(found)
            bar.advance(task)
    return _Said(opened.name, completions)


def _shown(completion: Completion) -> str:
    """A completion's text, and what is wrong with it."""
    marks = [] if completion.text.strip() else ["no text"]
    marks += [] if completion.finished else ["no end"]
    marks += ["repeats"] if repetition(completion.ids) >= REPEATING else []
    return completion.text.strip() + (f" [{', '.join(marks)}]" if marks else "")


def _rows(said: Sequence[_Said]) -> list[list[object]]:
    """Of each model: its name, completions, tokens of one, and how many lack an end or repeat themselves."""
    rows: list[list[object]] = []
    for one in said:
        flat = [completion for found in one.completions for completion in found]
        tokens = sum(len(completion.ids) for completion in flat) / len(flat)
        unfinished = sum(not completion.finished for completion in flat)
        repeats = sum(repetition(completion.ids) >= REPEATING for completion in flat)
        rows.append([one.name, len(flat), tokens, unfinished, repeats])
    return rows


_HEAD = ("model", "completions", "tokens each", "without an end", "repeating")


def _show(console: Console, asked: Sequence[Prompt], said: Sequence[_Said]) -> None:
    beside = console.is_terminal and console.width // len(said) > _COLUMN
    for number, prompt in enumerate(asked):
        text, cut = obeyed_by_none(prompt.text), len(prompt.text) - _PROMPT
        text = f"... ({cut} more characters) ...{text[cut:]}" if cut > 0 else text
        console.print(Text(f"\n{plain(prompt.row)}", style="bold"))
        console.print(Text(text, style="dim"))
        if beside:
            grid = Table(box=None, padding=(0, 2, 0, 0), expand=True)
            for one in said:
                grid.add_column(Text(one.name), ratio=1, overflow="fold")
            for found in zip(*(one.completions[number] for one in said), strict=True):
                grid.add_row(*(Text(obeyed_by_none(_shown(completion))) for completion in found))
            console.print(grid)
        else:
            for one in said:
                for completion in one.completions[number]:
                    console.print(Text(f"{one.name}: ", style="bold") + obeyed_by_none(_shown(completion)))
    console.print()
    for row in _rows(said):
        name, completions, tokens, unfinished, repeats = row
        console.print(
            f"{name}: {completions} completion{'s' * (completions != 1)} of {tokens:.1f} tokens on average, "
            f"{unfinished} without an end, {repeats} repeating"
        )


def _lines(asked: Sequence[Prompt], said: Sequence[_Said]) -> str:
    lines = [
        {
            "row": prompt.row,
            "prompt": prompt.content,
            "model": one.name,
            "sample": sample,
            "completion": completion.text,
            "ids": completion.ids,
            "finished": completion.finished,
            "repetition": repetition(completion.ids),
        }
        for number, prompt in enumerate(asked)
        for one in said
        for sample, completion in enumerate(one.completions[number])
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _page(asked: Sequence[Prompt], said: Sequence[_Said]) -> str:
    parts = [page.table(_HEAD, _rows(said))]
    for number, prompt in enumerate(asked):
        parts += [page.heading(prompt.row), page.block(prompt.text, "prompt")]
        columns = (
            [page.block(_shown(completion), label=one.name) for completion in one.completions[number]] for one in said
        )
        parts.append(page.beside(columns))
    return page.page("Completions", parts)
