"""A preference pair, and what is said of a row that is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

from lit_dpo.plain_text import obeyed_by_none


class Message(TypedDict, total=False):
    """One turn of a conversation.

    `role` is `system`, `user`, `assistant` or `tool`. `content` may be missing beside `tool_calls`.
    """

    role: Required[str]
    content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str
    thinking: str


Content = str | list[Message]


@dataclass(frozen=True, slots=True)
class Pair:
    r"""A preference: of two completions of one prompt, `chosen` is the better one.

    Text completions continue the prompt verbatim. Completions in messages begin and end with the assistant. Turns of
    tools and users may stand between; they are context and are not scored.

    Args:
        prompt: What both completions answer; never empty, and as messages it ends with a turn of a user or a tool.
        chosen: The preferred completion; never blank.
        rejected: The other completion; never blank, never equal to `chosen`.
        source: Name of the data set, for partitions and per-source metrics.
        row: Where a person finds the row, such as `path/file.jsonl:17`.
        values: Numbers of the row that were asked for, by column name; all finite.
        tools: Schemas of the tools that the model may call, for the chat template.
        template_options: Further variables of the chat template, such as `enable_thinking`.
        layout: Name of the layout that the row was read by.
        notes: What is worth counting about the row, in words that are the same for every such row, with its column.

    Example:
        >>> from lit_dpo.data.rows import parse_row
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
    tools: Sequence[Any] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    notes: tuple[tuple[str, str], ...] = ()


class RowError(ValueError):
    """A row that must not be trained on.

    Args:
        where: Location of the row, such as `path/file.jsonl:17`.
        column: The column at fault; None if it is the row as a whole.
        reason: What is wrong, in words that are the same for every such row, so that rows can be counted by it.
        remedy: What to do about it, with this row's particulars.
        others: What is wrong with rows behind this one, in words; empty if nothing is.
    """

    def __init__(self, where: str, column: str | None, reason: str, remedy: str, others: str = "") -> None:
        super().__init__(where, column, reason, remedy, others)  # the arguments, so that pickle can rebuild the error
        self.where = where
        self.column = column
        self.reason = reason
        self.remedy = remedy
        self.others = others

    def __str__(self) -> str:
        column = f", column `{self.column}`" if self.column else ""
        text = f"{self.where}{column}: {self.reason}; {self.remedy}.{self.others and ' '}{self.others}"
        return obeyed_by_none(text)  # which names columns and values of the row

    def with_others(self, others: str) -> "RowError":
        """The same error, which also tells of the rows behind it."""
        return type(self)(self.where, self.column, self.reason, self.remedy, others)


class LayoutError(RowError):
    """The columns fit no known layout. Usually true of every row of a file, so skipping rows does not help."""


class NoPreferenceError(RowError):
    """A sound row that prefers nothing, such as a tie. It is left out and counted, and never stops a run."""


def names(columns: Sequence[str] | Mapping[str, object]) -> str:
    """Columns as a message names them."""
    return ", ".join(f"`{column}`" for column in columns) or "(none)"


def kind(value: object) -> str:
    """What sort of JSON value something is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true/false value"
    kinds = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a value")
