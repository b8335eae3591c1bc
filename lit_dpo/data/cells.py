"""The cells of a row, read as text, messages, numbers or JSON; every complaint names the row and the column."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_dpo.data.pair import Message, RowError, kind

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "ipython", "function"), "tool"),
    "system": "system",
}
_KEPT = ("tool_call_id", "name", "reasoning_content", "thinking")  # keys of a message that templates read
_MESSAGE_START = re.compile(r"""\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
_PARTNER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}


@dataclass(frozen=True, slots=True)
class Cells:
    """One row's cells, read as what a layout expects of them.

    Args:
        row: Column name -> cell.
        where: Location of the row, for messages.
        used: The columns read so far.
        notes: What is worth counting about the row, with its column.
    """

    row: Mapping[str, object]
    where: str
    used: set[str] = field(default_factory=set)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def has(self, *columns: str) -> bool:
        """Whether the row has all these columns, whatever is in them."""
        return all(column in self.row for column in columns)

    def filled(self, column: str) -> bool:
        """Whether there is anything in the cell."""
        return self.row.get(column) not in (None, "", [], {})

    def first(self, *columns: str) -> str | None:
        """The first of these columns that has anything in it, else the first that is there."""
        there = [column for column in columns if column in self.row]
        return next((column for column in there if self.filled(column)), there[0] if there else None)

    def lists(self, column: str) -> bool:
        """Whether the cell holds messages (a list, a single message, or the JSON text of such) rather than text."""
        cell = self.row.get(column)
        return isinstance(cell, list | dict) or (isinstance(cell, str) and _spelled(cell) is not None)

    def error(self, column: str | None, reason: str, remedy: str) -> RowError:
        """The error to raise about a column of this row."""
        return RowError(self.where, column, reason, remedy)

    def text(self, column: str) -> str:
        """The cell as text; blank text is left for `parse_row` to judge."""
        self.used.add(column)
        text = self.as_text(self.row.get(column), column)
        if _spells_messages(text):
            raise self.error(column, "messages are written as one string", "decode it into a list of messages")
        return text

    def number(self, column: str) -> float:
        """The cell as a finite number; text that spells one counts, since CSV knows nothing else."""
        self.used.add(column)
        return self.as_number(self.row.get(column), column)

    def as_number(self, value: object, column: str) -> float:
        """A value from inside a cell as a finite number."""
        text = {"true": "1", "false": "0"}.get(str(value).strip().lower(), str(value))
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(column, "not a finite number", f"write a number instead of {value!r:.40}")
        return number

    def json(self, column: str) -> Any:
        """The cell as a list or an object; text that spells one counts."""
        self.used.add(column)
        cell = self.row.get(column)
        if isinstance(cell, str) and cell.strip():
            try:
                cell = json.loads(cell)
            except (ValueError, RecursionError) as error:
                raise self.error(column, "the text is not valid JSON", f"correct it ({error})") from None
        if cell is not None and not isinstance(cell, list | dict | str):
            raise self.error(column, f"{kind(cell)} where a list or an object is expected", "correct the cell")
        return cell

    def messages(self, column: str) -> list[Message]:
        """The cell as messages with our own role names. A single message counts as a list of one."""
        self.used.add(column)
        cell = self.row.get(column)
        spelled = _spelled(cell) if isinstance(cell, str) else None
        if spelled is not None:
            self.notes.append(("messages read from JSON text", column))
        return self.as_messages(cell if spelled is None else spelled, column)

    def as_messages(self, value: object, column: str) -> list[Message]:
        """A value from inside a cell as messages."""
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            if isinstance(value, str) and _spells_messages(value):
                raise self.error(column, "messages are written as one string", "decode it into a list of messages")
            reason = f"{kind(value)} where messages are expected"
            raise self.error(column, reason, "give all columns as messages or all as text")
        return [self._message(message, column) for message in value]

    def as_text(self, value: object, column: str) -> str:
        """A value from inside a cell as text."""
        if not isinstance(value, str):
            raise self.error(column, f"{kind(value)} where text is expected", "write the text, as a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(column, "text is not valid Unicode", "remove its lone surrogates") from None
        return value

    def _message(self, message: object, column: str) -> Message:
        if not isinstance(message, dict):
            raise self.error(column, "a message is not an object", f"write role and content, not {kind(message)}")
        given = message.get("role", message.get("from"))
        content = message.get("content", message.get("value", message.get("parts")))
        name = given.lower() if isinstance(given, str) else ""
        if name == "function_call":
            return {"role": "assistant", "tool_calls": self._calls([self._spelled_call(content, column)], column)}
        if name not in _ROLES:
            raise self.error(column, "unknown role", f"use system, user, assistant or tool instead of {given!r}")
        if message.get("function_call"):
            raise self.error(column, "a message has a `function_call`", "write it as `tool_calls`")
        found: Message = {"role": _ROLES[name]}
        calls = message.get("tool_calls")
        if calls:
            found["tool_calls"] = self._calls(calls, column)
        if content is not None or not calls:
            found["content"] = self._content(content, column)
        for key in _KEPT:
            if message.get(key):
                found[key] = self.as_text(message[key], column)  # type: ignore[literal-required]
        return found

    def _content(self, content: object, column: str) -> str:
        """The text of a message, whose content may stand in one part."""
        if not isinstance(content, list):
            return self.as_text(content, column)
        texts = []
        for part in content:
            text = part.get("text", part.get("value")) if isinstance(part, dict) else part
            if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
                what = part.get("type") if isinstance(part, dict) else kind(part)
                raise self.error(column, "message content that is not text", f"only text can be trained on, not {what}")
            texts.append(text)
        if len(texts) > 1:
            remedy = "join them into one string, with the separator that they need"
            raise self.error(column, "message content in several parts", remedy)
        return self.as_text(texts[0] if texts else "", column)

    def _spelled_call(self, content: object, column: str) -> object:
        """A ShareGPT function call, whose value is the JSON text of name and arguments."""
        try:
            call = json.loads(content) if isinstance(content, str) else content
        except (ValueError, RecursionError):
            call = None
        if not isinstance(call, dict):
            raise self.error(column, "a function call is not JSON", "write an object with `name` and `arguments`")
        return call

    def _calls(self, calls: object, column: str) -> list[dict[str, Any]]:
        """Tool calls as templates read them: each with a `function` that has name and arguments."""
        if isinstance(calls, str):
            try:
                calls = json.loads(calls)
            except (ValueError, RecursionError):
                calls = None
        found = []
        for call in calls if isinstance(calls, list) else [None]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
                raise self.error(column, "a tool call has no function name", "write {function: {name, arguments}}")
            assert isinstance(call, dict)
            found.append(call if "function" in call else {"type": "function", "function": call})
        return found


def _spelled(text: str) -> list[Any] | None:
    """Messages that a text spells as JSON; None if it does not."""
    if not _spells_messages(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [found] if isinstance(found, dict) else found


def _spells_messages(text: str) -> bool:
    """Whether a text is the JSON, or Python's repr, of a message or of a list of messages."""
    text = text.strip()
    start = _MESSAGE_START.match(text)
    partner = _PARTNER_KEY[start[1]] if start else ""
    return bool(partner) and text.endswith(("}", "]")) and (f'"{partner}"' in text or f"'{partner}'" in text)
