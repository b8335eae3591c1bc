"""Row layouts: any known arrangement of columns becomes one `Pair`, anything else an error that names the row.

A layout is one function in `LAYOUTS`. It returns the three parts of a pair, or None if the row is not
arranged its way; the first that answers wins. Layouts only arrange: what makes a pair fit for training is
checked once, for all of them, in `parse_row`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Content = str | list[Message]
Parts = tuple[Content, Content, Content]
"""Prompt, chosen and rejected: all three text, or all three lists of messages."""


@dataclass(frozen=True, slots=True)
class Pair:
    r"""A preference: of two completions of one prompt, `chosen` is the better one.

    Text completions continue the prompt verbatim. Message completions are exactly one assistant message.

    Args:
        prompt: What both completions answer; never empty, and as messages it ends with a user turn.
        chosen: The preferred completion; never blank.
        rejected: The other completion; never blank, never equal to `chosen`.
        source: Name of the data set, for partitions and per-source metrics.
        row: Where a person finds the row, such as `path/file.jsonl:17`.
        values: Numbers of the row that were asked for, by column name; all finite.

    Example:
        >>> pair = parse_row({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "sums", "sums.jsonl:1")
        >>> pair.prompt, pair.chosen, pair.rejected
        ('2+2=', '4', '5')
    """

    prompt: Content
    chosen: Content
    rejected: Content
    source: str
    row: str
    values: Mapping[str, float] = field(default_factory=dict)


class RowError(ValueError):
    """A row that must not be trained on.

    Args:
        where: Location of the row, such as `path/file.jsonl:17`.
        column: The column at fault; None if it is the row as a whole.
        reason: What is wrong, in words that are the same for every such row, so that rows can be counted by it.
        remedy: What to do about it, with this row's particulars.
    """

    def __init__(self, where: str, column: str | None, reason: str, remedy: str) -> None:
        super().__init__(where, column, reason, remedy)  # the arguments, so that pickle can rebuild the error
        self.where = where
        self.column = column
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        column = f", column `{self.column}`" if self.column else ""
        return f"{self.where}{column}: {self.reason}; {self.remedy}."


class LayoutError(RowError):
    """The columns fit no known layout. Usually true of every row of a file, so skipping rows does not help."""


@dataclass(frozen=True, slots=True)
class Cells:
    """One row's cells, read as what a layout expects of them; every complaint knows the row."""

    row: Mapping[str, object]
    where: str

    def has(self, *columns: str) -> bool:
        """Whether the row has all these columns, whatever is in them."""
        return all(column in self.row for column in columns)

    def lists(self, column: str) -> bool:
        """Whether the cell holds messages (a list, or a single message) rather than text."""
        return isinstance(self.row.get(column), list | dict)

    def error(self, column: str | None, reason: str, remedy: str) -> RowError:
        """The error to raise about a column of this row."""
        return RowError(self.where, column, reason, remedy)

    def text(self, column: str) -> str:
        """The cell as text; blank text is left for `parse_row` to judge."""
        text = self._string(self.row[column], column)
        if _spells_messages(text):
            raise self.error(column, "messages are written as one string", "decode it into a list of messages")
        return text

    def messages(self, column: str) -> list[Message]:
        """The cell as messages with our own role names. A single message counts as a list of one."""
        cell = self.row[column]
        if isinstance(cell, dict):
            cell = [cell]
        if not isinstance(cell, list):
            reason = f"{_kind(cell)} where messages are expected"
            raise self.error(column, reason, "give all columns as messages or all as text")
        return [self._message(message, column) for message in cell]

    def _message(self, message: object, column: str) -> Message:
        if not isinstance(message, dict):
            raise self.error(column, "a message is not an object", f"write role and content, not {_kind(message)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if message.get("tool_calls") or role in _TOOL_ROLES:
            raise self.error(column, "tool calls are not supported yet", "remove such rows or set `on_bad_row: skip`")
        if not isinstance(role, str) or role not in _ROLES:
            raise self.error(column, "unknown role", f"use system, user or assistant instead of {role!r}")
        if isinstance(content, list):
            raise self.error(column, "message content in parts is not supported", "join its text parts into one string")
        return {"role": _ROLES[role], "content": self._string(content, column)}

    def _string(self, value: object, column: str) -> str:
        if not isinstance(value, str):
            raise self.error(column, f"{_kind(value)} where text is expected", "write the text, as a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(column, "text is not valid Unicode", "remove its lone surrogates") from None
        return value


Layout = Callable[[Cells], Parts | None]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_ADD_PROMPT = "add a `prompt` column, or name the column that holds it by `columns: {prompt: ...}`"
_TOOL_ROLES = ("tool", "function", "function_call", "observation")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_MESSAGE_START = re.compile(r"""\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
_PARTNER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}


def explicit_messages(cells: Cells) -> Parts | None:
    """`prompt` is a list of messages; `chosen` and `rejected` are the assistant's message, alone or in a list."""
    if not (cells.has("prompt", "chosen", "rejected") and cells.lists("prompt")):
        return None
    return cells.messages("prompt"), cells.messages("chosen"), cells.messages("rejected")


def prompt_repeated(cells: Cells) -> Parts | None:
    """`prompt` is text, `chosen` and `rejected` are whole conversations that open with it (UltraFeedback)."""
    if not (cells.has("prompt") and (cells.lists("chosen") or cells.lists("rejected"))):
        return None
    parts = implicit_messages(cells)
    if parts is None:
        return None
    opening = next((m["content"] for m in parts[0] if isinstance(m, dict) and m["role"] == "user"), "")
    if cells.text("prompt").strip() != opening.strip():
        raise cells.error("prompt", "the prompt is not the first user turn", "correct it or drop the column")
    return parts


def explicit_text(cells: Cells) -> Parts | None:
    """`prompt`, `chosen` and `rejected` are text; the completions continue the prompt verbatim."""
    if not cells.has("prompt", "chosen", "rejected"):
        return None
    return cells.text("prompt"), cells.text("chosen"), cells.text("rejected")


def implicit_messages(cells: Cells) -> Parts | None:
    """`chosen` and `rejected` are whole conversations; they share all turns up to the assistant's last.

    The prompt ends at the last shared turn that is not the assistant's, so replies that begin with the
    same words, or even the same message, are never taken into the prompt.
    """
    if not (cells.has("chosen", "rejected") and (cells.lists("chosen") or cells.lists("rejected"))):
        return None
    chosen, rejected = cells.messages("chosen"), cells.messages("rejected")
    for column, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation:
            raise cells.error(column, "the conversation is empty", "fill it in or remove the row")
    shared = 0
    for i, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left != right:
            break
        if left["role"] != "assistant":
            shared = i + 1
    if not shared:
        raise cells.error("rejected", "the conversations share no prompt", _ADD_PROMPT)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def hh_text(cells: Cells) -> Parts | None:
    r"""`chosen` and `rejected` are transcripts with `\n\nHuman:` and `\n\nAssistant:` turns (HH-RLHF).

    The prompt runs through the last `\n\nAssistant:`; the space behind it belongs to the completion.
    """
    if not cells.has("chosen", "rejected"):
        return None
    (prompt, chosen), (other, rejected) = (_split_hh(cells, column) for column in ("chosen", "rejected"))
    if prompt != other:
        raise cells.error("rejected", "the prompts differ", "let both have all but the last reply in common")
    return prompt, chosen, rejected


LAYOUTS: tuple[Layout, ...] = (explicit_messages, prompt_repeated, explicit_text, implicit_messages, hh_text)
KNOWN_COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""What `LayoutError` compares a file's columns with; the first is the one to recommend."""


def detect(row: Mapping[str, object], where: str = "row") -> str:
    """Name the layout of a row.

    Raises:
        LayoutError: No layout has these columns.
        RowError: A layout has them, but the row cannot be read its way.
    """
    return _arrange(Cells(row, where))[0].__name__


def parse_row(row: Mapping[str, object], source: str, where: str, columns: Mapping[str, str] | None = None) -> Pair:
    """Turn a row of any known layout into a pair that is fit to be trained on.

    Extra columns are ignored, except a filled `tools`, which would change the prompt. An empty system
    message is legal: it is how data sets switch a template's default system prompt off. All other turns
    must hold text and alternate, user first, so that every chat template renders them alike.

    Args:
        row: Column name -> cell.
        source: Name of the data set.
        where: Location of the row, for messages.
        columns: Our column name -> the file's, for names we do not know: `{"prompt": "q", "chosen": "good"}`.

    Raises:
        LayoutError: No layout has these columns.
        RowError: The row is malformed.
    """
    cells = Cells(_rename(row, columns, where) if columns else row, where)
    prompt, chosen, rejected = _arrange(cells)[1]
    if cells.row.get("tools"):
        raise cells.error("tools", "tools are not supported yet", "remove such rows or set `on_bad_row: skip`")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise cells.error("prompt", "the prompt is empty", "fill it in or set `on_bad_row: skip`")
    else:
        _check_prompt(prompt, cells)
    for column, completion in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(completion, column, cells)
    if chosen == rejected:
        raise cells.error("rejected", "chosen and rejected are identical", "remove the row, it holds no preference")
    return Pair(prompt, chosen, rejected, source, where)


def _arrange(cells: Cells) -> tuple[Layout, Parts]:
    for layout in LAYOUTS:
        parts = layout(cells)
        if parts is not None:
            return layout, parts
    raise _layout_error(cells.row, cells.where)


def _split_hh(cells: Cells, column: str) -> tuple[str, str]:
    text = cells.text(column)
    turns = _HH_TURN.findall(text)
    if not text.strip() or "Assistant" not in turns:
        raise cells.error(column, "the text has no prompt in it", _ADD_PROMPT)
    if turns != ["Human", "Assistant"] * (len(turns) // 2):
        raise cells.error(column, "Human and Assistant turns do not alternate", "correct or remove the row")
    prompt, mark, reply = text.rpartition("\n\nAssistant:")
    return prompt + mark, reply


def _check_prompt(prompt: list[Message], cells: Cells) -> None:
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    column = "prompt" if cells.lists("prompt") else "chosen"
    if not turns:
        raise cells.error(column, "the prompt is empty", "give it at least one user turn")
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn["role"] == "system":
            raise cells.error(column, "a system message is not the first", "move it to the front")
        if turn["role"] != expected:
            twice = "the same role has two turns in a row" if i else "the conversation starts with the assistant"
            raise cells.error(column, twice, f"merge or remove turns so that turn {i + 1} is the {expected}'s")
        if not turn["content"].strip():
            raise cells.error(column, "a message is empty", f"fill in or remove the {expected}'s turn")
    if turns[-1]["role"] != "user":
        raise cells.error(column, "the prompt ends with an assistant turn", "move that turn into the completions")


def _check_completion(completion: Content, column: str, cells: Cells) -> None:
    text = completion
    if not isinstance(completion, str):
        roles = [message["role"] for message in completion]
        if roles and roles != ["assistant"]:
            remedy = f"its roles are {', '.join(roles)}: cut it to the reply"
            raise cells.error(column, "the completion is not one assistant message", remedy)
        text = completion[0]["content"] if completion else ""
    if not (isinstance(text, str) and text.strip()):
        raise cells.error(column, "the completion is empty", "fill it in or set `on_bad_row: skip`")


def _rename(row: Mapping[str, object], columns: Mapping[str, str], where: str) -> dict[str, object]:
    for ours in columns:
        if ours not in KNOWN_COLUMNS[0]:
            raise ValueError(f"`columns` maps `{ours}`, which is no column of ours; map {_names(KNOWN_COLUMNS[0])}.")
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        reason = f"`columns` names {_names(missing)}, which is not there"
        raise LayoutError(where, None, reason, f"name some of {_names(row)}")
    kept = {name: cell for name, cell in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _layout_error(row: Mapping[str, object], where: str) -> LayoutError:
    nearest = max(KNOWN_COLUMNS, key=lambda names: sum(name in row for name in names))
    missing = [name for name in nearest if name not in row]
    mapping = ", ".join(f"{name}: {next((c for c in row if name in c), '...')}" for name in missing)
    remedy = f"the nearest has {_names(nearest)}: add {_names(missing)}, or set `columns: {{{mapping}}}`"
    return LayoutError(where, None, f"the columns {_names(row)} fit no known layout", remedy)


def _spells_messages(text: str) -> bool:
    """Whether a text is the JSON, or Python's repr, of a message or of a list of messages."""
    text = text.strip()
    start = _MESSAGE_START.match(text)
    partner = _PARTNER_KEY[start[1]] if start else ""
    return bool(partner) and text.endswith(("}", "]")) and (f'"{partner}"' in text or f"'{partner}'" in text)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns) or "(none)"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true/false value"
    kinds = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a value")
