"""Rows to pairs: a row of any known layout becomes pairs that are fit to be trained on, or an error that names it.

Layouts only arrange; see `lit_dpo.data.layouts`. What makes a pair fit for training is checked here, once for all.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from lit_dpo.data.cells import Cells
from lit_dpo.data.layouts import COLUMNS, Answer, Answers, Layout, find_layout, refuse_unused
from lit_dpo.data.layouts.base import assistant, is_transcript, transcript, user
from lit_dpo.data.pair import Content, LayoutError, Message, NoPreferenceError, Pair, RowError, names

__all__ = [
    "Arranged",
    "Content",
    "LayoutError",
    "Message",
    "NoPreferenceError",
    "Pair",
    "PairPolicy",
    "Reading",
    "RowError",
    "RowMap",
    "arrange",
    "detect",
    "pairs_of",
    "parse_row",
]

PairPolicy = Literal["best_worst", "adjacent", "all"]
"""Which pairs are made of several ranked answers to a prompt."""
RowMap = Callable[[dict[str, Any]], dict[str, Any] | None]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        columns: Our column name -> the file's, for names we do not know: `{"prompt": "q", "chosen": "good"}`.
        text_as_turns: Render rows of plain text as turns of a conversation, through the chat template.
        pairs: Of several ranked answers: the best with the worst, each with the next one, or every two.
        max_pairs: Most pairs of one prompt, those with the largest difference first; `None` for all.
        ignored_columns: Columns that are no part of the prompt and no label, whatever their names say.
        rows: A function from a row to a row of a known layout, or to `None` for a row to be left out.

    Raises:
        ValueError: An option is out of its range.
    """

    columns: Mapping[str, str] | None = None
    text_as_turns: bool = False
    pairs: PairPolicy = "best_worst"
    max_pairs: int | None = None
    ignored_columns: Sequence[str] = ()
    rows: RowMap | None = None

    def __post_init__(self) -> None:
        if self.pairs not in get_args(PairPolicy):
            raise ValueError(f"`pairs` must be one of {', '.join(get_args(PairPolicy))}, got `{self.pairs}`.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"`max_pairs` must be at least 1, got {self.max_pairs}.")
        for ours in self.columns or ():
            if ours not in COLUMNS:
                raise ValueError(f"`columns` maps `{ours}`, which is no column of ours; map {names(COLUMNS)}.")

    def identity(self) -> dict[str, object] | None:
        """Everything that decides what becomes of a row, as plain values; None with a function, which may do anything.

        >>> Reading(pairs="all").identity()["pairs"], Reading(rows=dict).identity()
        ('all', None)
        """
        if self.rows is not None:
            return None
        found = {option.name: getattr(self, option.name) for option in fields(self)}
        return found | {"columns": dict(self.columns or {}), "ignored_columns": list(self.ignored_columns)}


@dataclass(frozen=True, slots=True)
class Arranged:
    """A row as its layout reads it, before pairs are made of it."""

    row: Mapping[str, object]
    layout: Layout
    answers: Answers
    cells: Cells
    tools: Sequence[Any]
    template_options: Mapping[str, Any]


def detect(row: Mapping[str, object], where: str = "row") -> str:
    """Name the layout of a row.

    Raises:
        LayoutError: No layout has these columns.
        RowError: A layout has them, but the row cannot be read its way.
    """
    return arrange(row, where, Reading()).layout.name


def parse_row(row: Mapping[str, object], source: str, where: str, columns: Mapping[str, str] | None = None) -> Pair:
    """Turn a row of any known layout into a pair that is fit to be trained on: its only one, or its first.

    Further columns are left aside, unless their names say that they belong to the prompt or are a label. An empty
    system message is legal: it is how data sets switch a template's default system prompt off. All other turns must
    hold text, or tool calls, and alternate, so that every chat template renders them alike.

    Args:
        row: Column name -> cell.
        source: Name of the data set.
        where: Location of the row, for messages.
        columns: See `Reading`.

    Raises:
        LayoutError: No layout has these columns.
        RowError: The row is malformed, or prefers nothing.
    """
    reading = Reading(columns)
    arranged = arrange(row, where, reading)
    if arranged.layout.grouped:
        raise NoPreferenceError(
            where, None, "one answer alone", "rows of one prompt make pairs together: load the file"
        )
    return pairs_of([arranged], source, reading)[0][0]


def arrange(row: Mapping[str, object], where: str, reading: Reading) -> Arranged:
    """Read a row by its layout; see `parse_row`."""
    if reading.rows is not None:
        row = _mapped(row, where, reading.rows)
    cells = Cells(_rename(row, reading.columns, where) if reading.columns else row, where)
    layout = find_layout(cells)
    answers = layout.read(cells)
    tools = _tools(cells, answers)
    options = cells.json("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise cells.error("chat_template_kwargs", "no object", "write names and values of the template's variables")
    refuse_unused(cells, layout, reading.ignored_columns)
    if isinstance(answers.prompt, str) and reading.text_as_turns:
        answers = _turns(answers, cells)
    if isinstance(answers.prompt, str):
        if tools or options:
            column = "tools" if tools else "chat_template_kwargs"
            remedy = "give the row as messages, or set `text_as_turns: true`"
            raise cells.error(column, "plain text is not rendered by a chat template", remedy)
        if not answers.prompt.strip():
            raise cells.error(answers.column, "the prompt is empty", "fill it in or set `on_bad_row: skip`")
    else:
        _check_turns(answers.prompt, cells, answers.column)
        last = answers.prompt[-1]
        if last["role"] == "assistant":
            remedy = "move that turn into the completions"
            raise cells.error(answers.column, "the prompt ends with an assistant turn", remedy)
    for answer in answers.answers:
        _check_completion(answer, answers.prompt, cells)
    return Arranged(row, layout, answers, cells, tools, options)


def pairs_of(rows: Sequence[Arranged], source: str, reading: Reading) -> list[tuple[Pair, Arranged, Arranged]]:
    """The pairs of one row, or of rows that hold answers to one prompt, by the policy.

    Each comes with the row of its chosen and the row of its rejected completion.

    Raises:
        RowError: There is none that can be trained on.
    """
    first = rows[0]
    answers = [(answer, row) for row in rows for answer in row.answers.answers]
    if len(answers) < 2:
        raise NoPreferenceError(
            first.cells.where, None, "no other answer to the prompt", "there is nothing to compare with"
        )
    found = []
    problem: RowError | None = None
    for (better, left), (worse, right) in _selected(answers, reading):
        where = left.cells.where if left is right else f"{left.cells.where} and {right.cells.where}"
        if better.content == worse.content:
            remedy = "remove the row, it holds no preference"
            column = worse.column
            problem = problem or RowError(where, column, "chosen and rejected are identical", remedy)
            continue
        pair = Pair(first.answers.prompt, better.content, worse.content, source, where)
        notes = (*dict.fromkeys([*left.cells.notes, *right.cells.notes, *_notes(pair, better, worse)]),)
        layout = first.layout.name + (", as turns" if first.layout.verbatim and reading.text_as_turns else "")
        options = first.template_options
        pair = replace(pair, tools=first.tools, template_options=options, layout=layout, notes=notes)
        found.append((pair, left, right))
    if not found:
        raise problem or NoPreferenceError(first.cells.where, None, "a tie", "no answer is better than another")
    return found


Scored = tuple[Answer, Arranged]


def _selected(answers: Sequence[Scored], reading: Reading) -> list[tuple[Scored, Scored]]:
    """Better and worse answers, by the policy; answers of one score make no pair."""
    order = sorted(answers, key=lambda item: -item[0].score)
    if reading.pairs == "best_worst":
        pairs = [(order[0], order[-1])]
    elif reading.pairs == "adjacent":
        pairs = list(pairwise(order))
    else:
        pairs = [(one, other) for i, one in enumerate(order) for other in order[i + 1 :]]
    pairs = [(one, other) for one, other in pairs if one[0].score > other[0].score]
    if reading.max_pairs is not None:
        pairs = sorted(pairs, key=lambda pair: pair[1][0].score - pair[0][0].score)[: reading.max_pairs]
    return pairs


def _mapped(row: Mapping[str, object], where: str, function: RowMap) -> Mapping[str, object]:
    try:
        found: object = function(dict(row))
    except Exception as error:
        reason = f"the function in `rows` raised {type(error).__name__}"
        remedy = f"it says {str(error)!r}: correct it, or return None for such rows"
        raise RowError(where, None, reason, remedy) from error
    if found is None:
        raise NoPreferenceError(where, None, "left out by the function in `rows`", "it returned None")
    if not isinstance(found, dict):
        remedy = f"return a dictionary or None, not {type(found).__name__}"
        raise RowError(where, None, "the function in `rows` gave no row", remedy)
    return found


def _rename(row: Mapping[str, object], columns: Mapping[str, str], where: str) -> dict[str, object]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        reason = f"`columns` names {names(missing)}, which is not there"
        raise LayoutError(where, None, reason, f"name some of {names(row)}")
    kept = {name: cell for name, cell in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _tools(cells: Cells, answers: Answers) -> Sequence[Any]:
    """The row's tools, from a list or its JSON text."""
    found = answers.tools if answers.tools is not None else cells.json("tools")
    if found in (None, "", [], {}):
        return ()
    if not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise cells.error("tools", "the tools are no list of objects", "write a list of function schemas")
    return found


def _turns(answers: Answers, cells: Cells) -> Answers:
    """Plain text as turns."""
    assert isinstance(answers.prompt, str)
    transcribed = is_transcript(answers.prompt)
    prompt = transcript(answers.prompt, cells, answers.column) if transcribed else [user(answers.prompt)]
    turns = []
    for answer in answers.answers:
        assert isinstance(answer.content, str)
        text = answer.content.removeprefix(" ") if transcribed else answer.content
        turns.append(replace(answer, content=[assistant(text)]))
    return replace(answers, prompt=prompt, answers=tuple(turns))


# -- what a pair must be ----------------------------------------------------------------------------------------------


def _check_turns(turns: Sequence[Message], cells: Cells, column: str, after: Message | None = None) -> None:
    """Refuse turns that do not alternate, or that hold nothing; `after` is the turn before them."""
    rest = turns[1:] if after is None and turns and turns[0]["role"] == "system" else turns
    if not rest:
        raise cells.error(column, "the prompt is empty", "give it at least one user turn")
    for i, turn in enumerate(rest):
        previous = rest[i - 1] if i else after
        expected = _may_follow(previous)
        if turn["role"] == "system":
            raise cells.error(column, "a system message is not the first", "move it to the front")
        if turn["role"] not in expected:
            twice, first = "the same role has two turns in a row", "the conversation starts with the assistant"
            reason = twice if previous else first
            if turn["role"] == "tool":
                reason = "a tool answers that was not called"
            remedy = f"merge or remove turns so that turn {i + 1} is the {' or '.join(expected)}'s"
            raise cells.error(column, reason, remedy)
        if not turn.get("tool_calls") and turn["role"] != "tool" and not turn.get("content", "").strip():
            raise cells.error(column, "a message is empty", f"fill in or remove the {turn['role']}'s turn")


def _may_follow(previous: Message | None) -> tuple[str, ...]:
    if previous is None:
        return ("user",)
    if previous["role"] == "tool":
        return ("assistant", "tool")
    if previous["role"] == "user":
        return ("assistant",)
    return ("tool",) if previous.get("tool_calls") else ("user", "tool")


def _check_completion(answer: Answer, prompt: Content, cells: Cells) -> None:
    content, column = answer.content, answer.column
    empty = cells.error(column, "the completion is empty", "fill it in or set `on_bad_row: skip`")
    if isinstance(content, str):
        if not content.strip():
            raise empty
        return
    if not content:
        raise empty
    if all(not turn.get("content", "").strip() and not turn.get("tool_calls") for turn in content):
        raise empty
    assert not isinstance(prompt, str)
    if content[0]["role"] != "assistant" or content[-1]["role"] != "assistant":
        remedy = f"its roles are {', '.join(turn['role'] for turn in content)}: let it begin and end with the assistant"
        raise cells.error(column, "the completion is not the assistant's", remedy)
    _check_turns(content, cells, column, prompt[-1])


def _notes(pair: Pair, better: Answer, worse: Answer) -> Iterator[tuple[str, str]]:
    """What is legal and worth counting."""
    question = _text(pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1:]).strip()
    if _CONTROL.search(_text(pair.prompt)):
        yield "control characters", "prompt"
    for answer in (better, worse):
        text = _text(answer.content)
        if _CONTROL.search(text):
            yield "control characters", answer.column
        if question and text.strip().startswith(question):
            yield "the prompt repeated in the completion", answer.column
        if not isinstance(answer.content, str) and len(answer.content) > 1:
            yield "completions of several messages", answer.column
    if _bare(pair.chosen) == _bare(pair.rejected):
        yield "completions that differ in white space around them alone", worse.column


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(turn.get("content", "") for turn in content)


def _bare(content: Content) -> object:
    """A completion without the white space around its texts."""
    if isinstance(content, str):
        return content.strip()
    return [{**turn, "content": turn.get("content", "").strip()} for turn in content]
