"""`lit-dpo inspect`: what a fit would train, read back from the tensors that it trains on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lit_dpo.data import PreferenceDataModule
from lit_dpo.module import PreferenceModule
from lit_dpo.pairs import PairBatch
from lit_dpo.plain_text import obeyed_by_none, plain
from lit_dpo.starting import training_margins
from lit_dpo.tools import page
from lit_dpo.tools.before import set_up, special_ids, without_news

SIDES = ("prompt", "chosen", "rejected")
_COLOURS = {"prompt": "bright_black", "chosen": "green", "rejected": "red"}
_SHOWN = 800  # characters of a text on the terminal
_BINS, _BAR = 8, 10  # of a histogram: bins, and columns of the longest bar
_MARKS = (
    "How to read the pairs: ┃ is the fork, where the prompt ends and both completions begin; «...» is one special "
    "token; ⟦...⟧ is seen by the model and not trained on."
)


_ABOUT_SOURCES = (
    "Tokens are those of the median and of the longest; longer: pairs whose chosen completion is the longer one; cut: "
    "pairs as long as `max_length`."
)
_ABOUT_SCORES = (
    " Accuracy: pairs whose chosen completion is the likelier one under the model that training starts from; margin: "
    "the mean of chosen minus rejected log-probs, in nats."
)


@dataclass(frozen=True)
class Piece:
    """Tokens of one kind in a row, as text.

    Args:
        text: Decoded.
        special: They are special tokens, and not text that spells one.
        scored: The loss looks at them, if they are of a completion.
    """

    text: str
    special: bool
    scored: bool

    @property
    def kind(self) -> str:
        """How a page marks it."""
        return " ".join(["special"] * self.special + ["masked"] * (not self.scored))


@dataclass(frozen=True)
class ShownPair:
    """A pair as it stands in a batch.

    Args:
        where: The row it comes from.
        tokens: Of prompt, chosen and rejected.
        sides: The pieces of each.
    """

    where: str
    tokens: tuple[int, int, int]
    sides: tuple[list[Piece], list[Piece], list[Piece]]

    @property
    def title(self) -> str:
        """Where it comes from and how long it is."""
        prompt, chosen, rejected = self.tokens
        return f"{self.where}: prompt {prompt} tokens, fork, chosen {chosen}, rejected {rejected}"


def inspect(
    module: PreferenceModule,
    data: PreferenceDataModule,
    trainer: Trainer,
    pairs: int = 4,
    score: bool = False,
    html: str | None = None,
    overwrite: bool = False,
) -> None:
    """Print what a fit of this module on these data would train, and write it as a page if asked to.

    Args:
        module: Gives the tokenizer, and the model if pairs are scored.
        data: Not set up yet.
        trainer: Of the fit; it decides what is in a batch.
        pairs: How many pairs to show, those of the first batches.
        score: Score all training pairs with the model that training starts from.
        html: File to write.
        overwrite: Replace that file.

    Raises:
        ValueError: `pairs` is negative, or the data cannot be trained on.
        FileExistsError: The file is there already.
    """
    if pairs < 0:
        raise ValueError(f"`--pairs` must be at least 0, got {pairs}.")
    if html is not None:
        page.refuse_taken(html, overwrite)
    with without_news():
        set_up(module, data, trainer)
    training = data.training
    said = [f"train: {_account(training.train.report)}", *training.said]
    if training.validation is not None:
        said.append(f"validation: {_account(training.validation.report)}")
    if data.stepwise:
        said.append("train: the pairs of all steps together, since the partition divides them only as training goes on")
    found = list(first_pairs(module.tokenizer, data, pairs))
    rows = data.training_rows()
    lengths = training.dataset.lengths[rows]  # (rows, 3)
    sources = [training.dataset.sources[row] for row in rows.tolist()]
    margins = None
    if score:
        with without_news():
            margins = training_margins(module, data, trainer)[rows]
    head, table = by_source(sources, lengths, data.max_length, margins)
    console = page.terminal()
    for line in said:
        console.print(line, soft_wrap=not console.is_terminal)
    console.print()
    console.print(_table(head, table, "By source", _COLOURS))
    console.print(f"\n{_ABOUT_SOURCES}{_ABOUT_SCORES if score else ''}\n")
    console.print(_table(["tokens", *SIDES], _bars(lengths), "Lengths", _COLOURS))
    if found:
        console.print(f"\n{_MARKS}")
    for pair in found:
        _print(console, pair)
    if html is not None:
        parts = [page.block("\n".join(said))]
        parts += [page.heading("By source"), page.table(head, table)]
        parts += [page.paragraph(_ABOUT_SOURCES + (_ABOUT_SCORES if score else "")), page.heading("Lengths")]
        parts += [page.table(("tokens", *SIDES), _bars(lengths))]
        parts += [page.heading("Pairs"), page.paragraph(_MARKS)]
        for pair in found:
            blocks = [
                page.marked(_with_fork(name, [(text, piece.kind) for text, piece in marked(side)]), name, name)
                for name, side in zip(SIDES, pair.sides, strict=True)
            ]
            parts.append(page.details(pair.title, blocks, opened=True))
        page.write(html, page.page("What is trained", parts), overwrite)
        console.print(f"\nWrote {html}", soft_wrap=True)


def _account(report: str) -> str:
    """What a load says of its rows, without the first pair, as pairs are shown here anyway."""
    return re.split(r"\n[^\n]*, as it is trained on;", report)[0]


# -- pairs ------------------------------------------------------------------------------------------------------------


def first_pairs(tokenizer: Any, data: PreferenceDataModule, count: int) -> Iterator[ShownPair]:
    """The first pairs that training will see, in its order; pairs that only fill a batch up are left out."""
    if not count:
        return
    for batch in data.train_dataloader():
        weights = [1.0] * len(batch) if batch.weights is None else batch.weights.tolist()
        where = data.origin(batch.row_ids.tolist(), training=True)
        for pair, name, weight in zip(shown(batch, tokenizer, where), where, weights, strict=True):
            assert pair.where == name
            if weight:
                yield pair
                count -= 1
            if not count:
                return


def shown(batch: PairBatch, tokenizer: Any, where: Sequence[str]) -> list[ShownPair]:
    """The pairs of a batch, read from its tensors.

    Args:
        batch: B pairs.
        tokenizer: Gives the text, and knows which ids are special.
        where: A name for each pair.
    """
    special = special_ids(tokenizer)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    scored = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.scored is None else batch.scored
    sizes = [size for pair in batch.shape for size in pair]
    ids = [part.tolist() for part in batch.input_ids.split(sizes)]
    counts = [part.tolist() for part in scored.split(sizes)]
    found = []
    for number, name in enumerate(where):
        prompt, chosen, rejected = ids[3 * number : 3 * number + 3]
        sides = (
            _pieces(decode, [], prompt, [True] * len(prompt), special),
            _pieces(decode, prompt, chosen, counts[3 * number + 1], special),
            _pieces(decode, prompt, rejected, counts[3 * number + 2], special),
        )
        found.append(ShownPair(name, batch.shape[number], sides))
    return found


def _pieces(
    decode: Callable[[list[int]], str], before: list[int], ids: list[int], scored: list[bool], special: set[int]
) -> list[Piece]:
    """Neighbours of one kind together, each special token alone; spaces are those that stand there in the whole."""
    kinds = [
        (token in special and place + 1, counts) for place, (token, counts) in enumerate(zip(ids, scored, strict=True))
    ]
    found, start = [], 0
    for (place, counts), group in groupby(kinds):
        end = start + len(list(group))
        until, upto = decode(before + ids[:start]), decode(before + ids[:end])
        text = upto.removeprefix(until) if upto.startswith(until) else decode(ids[start:end])
        found.append(Piece(text, bool(place), counts))
        start = end
    return found


def marked(pieces: Sequence[Piece]) -> Iterator[tuple[str, Piece]]:
    """Pieces with the signs that tell them apart where there are no colours.

    >>> "".join(text for text, _ in marked([Piece("Yes", False, True), Piece("</s>", True, False)]))
    'Yes⟦«</s>»⟧'
    """
    ends = [True, *(piece.scored for piece in pieces), True]
    for number, piece in enumerate(pieces):
        text = f"«{piece.text}»" if piece.special else piece.text
        opened = "⟦" if ends[number] and not piece.scored else ""
        yield f"{opened}{text}{'⟧' if ends[number + 2] and not piece.scored else ''}", piece


def _with_fork(name: str, pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [*pieces, ("┃", "")] if name == "prompt" else [("┃", ""), *pieces]


def _print(console: Console, pair: ShownPair) -> None:
    console.print(f"\n{plain(pair.title)}", style="bold", soft_wrap=True)
    for name, pieces in zip(SIDES, pair.sides, strict=True):
        text = Text()
        for shown_as, piece in marked(pieces):
            how = f"{' reverse' if piece.special else ''}{'' if piece.scored else ' dim'}"
            text.append(obeyed_by_none(shown_as), style=f"{_COLOURS[name]}{how}")
        fork, left = Text("┃", style="bold"), len(text) - _SHOWN
        if left > 0:
            more = Text(f"... ({left} more characters) ...", style="italic")
            text = Text.assemble(more, text[-_SHOWN:]) if name == "prompt" else Text.assemble(text[:_SHOWN], more)
        console.print(
            Text.assemble(f"{name:9}", text, fork) if name == "prompt" else Text.assemble(f"{name:9}", fork, text)
        )


# -- numbers ----------------------------------------------------------------------------------------------------------


def by_source(
    sources: Sequence[str], lengths: Tensor, most: int, margins: Tensor | None = None
) -> tuple[list[str], list[list[Any]]]:
    """A table of sources, and of all if there are several: its head and its rows.

    Args:
        sources: The source of each row.
        lengths: Tokens of prompt, chosen and rejected, shape `(rows, 3)`.
        most: `max_length`.
        margins: Log-probs of chosen minus rejected, nats, shape `(rows,)`.
    """
    head = ["source", "pairs", *SIDES, "longer", "cut"]
    head += [] if margins is None else ["accuracy", "margin"]
    names = list(dict.fromkeys(sources))
    rows = []
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        mine = torch.tensor([name not in names or name == source for source in sources])
        of = lengths[mine]
        longest = of[:, 0] + of[:, 1:].amax(1)
        row: list[Any] = [name, len(of)]
        row += [f"{int(side.median())}/{int(side.max())}" for side in of.unbind(1)]
        row += [_share(of[:, 1] > of[:, 2]), _share(longest >= most)]
        if margins is not None:
            row += [_share(margins[mine] > 0), f"{float(margins[mine].mean()):.2f}"]
        rows.append(row)
    return head, rows


def _share(of: Tensor) -> str:
    """In percent; what is neither none nor all never looks like it.

    >>> _share(torch.arange(300) < 1), _share(torch.arange(300) < 299), _share(torch.arange(300) < 150)
    ('<1%', '>99%', '50%')
    """
    share, among = f"{float(of.double().mean()):.0%}", bool(of.any()) and not bool(of.all())
    return {"0%": "<1%", "100%": ">99%"}.get(share, share) if among else share


def histogram(lengths: Tensor) -> list[tuple[str, list[int]]]:
    """Rows by their tokens of prompt, chosen and rejected: the range of a bin, and the count of each side.

    >>> histogram(torch.tensor([[1, 9, 2], [16, 3, 3]]))[0]
    ('1-2', [1, 0, 1])
    """
    width = -(-int(lengths.max()) // _BINS)
    counts = torch.stack([torch.bincount((side - 1) // width, minlength=_BINS) for side in lengths.unbind(1)], 1)
    return [
        (f"{n * width + 1}-{(n + 1) * width}", counts[n].tolist())
        for n in range(_BINS)
        if (n * width) < int(lengths.max())
    ]


def _bars(lengths: Tensor) -> list[list[str]]:
    """The rows of a histogram, with bars of text."""
    found = histogram(lengths)
    most = max(count for _, counts in found for count in counts)
    return [[name, *(f"{'█' * round(_BAR * n / most)} {n}".strip() for n in counts)] for name, counts in found]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], title: str, styles: Any = {}) -> Table:  # noqa: B006
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, style=styles.get(name), overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else plain(str(value)) for value in row))
    return table
