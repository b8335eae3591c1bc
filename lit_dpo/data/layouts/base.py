"""What a layout is: which columns it needs, how it reads them, and which answer it takes for the better one."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lit_dpo.data.cells import Cells
from lit_dpo.data.pair import Content, Message

SYSTEM = ("system", "system_prompt", "system_instruction")
QUESTION = ("instruction", "question", "query", "problem", "prompt", "input")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_MARK = "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a prompt.

    Args:
        content: Text, or messages.
        score: How good it is among the answers to its prompt; higher is better, whatever the file says.
        column: Where it stands in the row.
    """

    content: Content
    score: float
    column: str


@dataclass(frozen=True, slots=True)
class Answers:
    """A prompt and its answers, two or more, or one if other rows hold the others.

    Args:
        prompt: Text if the answers are text, which continue it; else messages.
        answers: In the order of the row.
        column: Where the prompt stands.
        tools: The tools that the row gives, if they stand elsewhere than in a column `tools`.
    """

    prompt: Content
    answers: tuple[Answer, ...]
    column: str = "prompt"
    tools: object = None


def _always(cells: Cells) -> bool:
    return True


@dataclass(frozen=True)
class Layout:
    """An arrangement of columns.

    Args:
        name: What reports call it.
        columns: Columns that the row must have.
        read: From the row's cells to its answers.
        better: How the better answer is told, in words.
        users: Data sets and programs that arrange rows so.
        fits: What else must hold.
        verbatim: Whether completions continue the prompt as they stand; else the columns mean turns of a conversation.
        grouped: Whether a row holds one answer, and rows of the same prompt make pairs.
        aside: Columns that say the same again, and that it may leave aside.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Cells], Answers]
    better: str
    users: str
    fits: Callable[[Cells], bool] = _always
    verbatim: bool = False
    grouped: bool = False
    aside: tuple[str, ...] = ()


def chosen_first(
    prompt: Content, replies: Iterable[Content], columns: Sequence[str] = ("prompt", "chosen", "rejected")
) -> Answers:
    """The answers of a row that says itself which is the better one: the first."""
    chosen, rejected = replies
    return Answers(prompt, (Answer(chosen, 1.0, columns[1]), Answer(rejected, 0.0, columns[2])), columns[0])


def two(prompt: list[Message], cells: Cells, first: str, second: str, preference: float, column: str) -> Answers:
    """The answers of a row with two replies and a label; above 0 the first is preferred."""
    replies = reply(cells, first), reply(cells, second)
    return Answers(prompt, (Answer(replies[0], preference, first), Answer(replies[1], 0.0, second)), column)


def user(text: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}


def reply(cells: Cells, column: str) -> list[Message]:
    """A cell with a reply, as text or as messages."""
    return cells.messages(column) if cells.lists(column) else [assistant(cells.text(column))]


def system_turn(cells: Cells) -> list[Message]:
    """The system message, if a column has one."""
    column = cells.first(*SYSTEM)
    if column is None:
        return []
    cells.used.add(column)
    if not cells.filled(column):
        return []
    cell = cells.row[column]
    if isinstance(cell, dict):  # {role, parts} of Gemini
        (message,) = cells.as_messages({"role": "system", **cell}, column)
        return [message]
    return [{"role": "system", "content": cells.text(column)}]


def asked(cells: Cells, column: str | None = None) -> list[Message]:
    """The prompt of a row whose columns mean turns: system, history, and what the user asks.

    An `input` beside an `instruction` is appended to it after a newline, as in LLaMA-Factory.
    """
    column = column or cells.first(*QUESTION)
    assert column is not None
    turns = system_turn(cells)
    if cells.filled("history") and column != "history":
        for turn in cells.json("history"):
            if isinstance(turn, dict):
                turns += cells.as_messages(turn, "history")
            elif isinstance(turn, list) and len(turn) == 2:
                question, answer = (cells.as_text(text, "history") for text in turn)
                turns += [user(question), assistant(answer)]
            else:
                raise cells.error("history", "a turn of the history is not a pair", "write [question, answer]")
    cells.used.add("history")
    if cells.lists(column):
        return turns + cells.messages(column)
    text = cells.text(column)
    if column in ("instruction", "prompt") and cells.has("input"):
        cells.used.add("input")
        if cells.filled("input"):
            text = f"{text}\n{cells.text('input')}"
    return turns + (transcript(text, cells, column) if is_transcript(text) else [user(text)])


def is_transcript(text: str) -> bool:
    r"""Whether a text is turns of `\n\nHuman:` and `\n\nAssistant:` (HH-RLHF)."""
    return text.startswith("\n\nHuman:")


def transcript(text: str, cells: Cells, column: str) -> list[Message]:
    """The turns of a transcript, which may end where the assistant is to speak."""
    marks = _HH_TURN.findall(text)
    if marks != (["Human", "Assistant"] * len(marks))[: len(marks)]:
        raise cells.error(column, "Human and Assistant turns do not alternate", "correct or remove the row")
    texts = [part.removeprefix(" ") for part in _HH_TURN.split(text)[2::2]]
    turns = [user(part) if mark == "Human" else assistant(part) for mark, part in zip(marks, texts, strict=True)]
    if turns and turns[-1]["role"] == "assistant" and not texts[-1].strip():
        turns.pop()
    return turns


def split_transcript(cells: Cells, column: str) -> tuple[str, str]:
    """Prompt and last reply of a transcript; the space behind the colon belongs to the reply."""
    text = cells.text(column)
    turns = _HH_TURN.findall(text)
    if not text.strip() or "Assistant" not in turns:
        remedy = "add a `prompt` column, or name the column that holds it by `columns: {prompt: ...}`"
        raise cells.error(column, "the text has no prompt in it", remedy)
    if turns != ["Human", "Assistant"] * (len(turns) // 2):
        raise cells.error(column, "Human and Assistant turns do not alternate", "correct or remove the row")
    prompt, mark, last = text.rpartition(_HH_MARK)
    return prompt + mark, last


def fork(cells: Cells, first: str, second: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and both completions of two whole conversations.

    The prompt ends at the last shared turn that is not the assistant's, so replies that begin with the same words, or
    even the same message, are never taken into the prompt. They may part only where the assistant speaks.
    """
    left, right = cells.messages(first), cells.messages(second)
    for column, conversation in ((first, left), (second, right)):
        if not conversation:
            raise cells.error(column, "the conversation is empty", "fill it in or remove the row")
    shared = 0
    for i, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            if one["role"] != "assistant" and other["role"] != "assistant" and shared:
                remedy = f"let both have all turns before the replies in common; turn {i + 1} differs"
                raise cells.error(second, "the prompts differ", remedy)
            break
        if one["role"] != "assistant":
            shared = i + 1
    if not shared:
        remedy = "add a `prompt` column, or name the column that holds it by `columns: {prompt: ...}`"
        raise cells.error(second, "the conversations share no prompt", remedy)
    return left[:shared], left[shared:], right[shared:]


def label(cells: Cells, column: str, meanings: Mapping[str, float]) -> float:
    """What a label means: above 0 the first answer is better, below 0 the second, 0 a tie."""
    cells.used.add(column)
    cell = cells.row[column]
    text = str(cell).strip().lower()
    text = text.removesuffix(".0") if isinstance(cell, float | str) else text
    if text not in meanings:
        remedy = f"write one of {', '.join(meanings)} instead of {cell!r:.40}"
        raise cells.error(column, "the label names no answer", remedy)
    return meanings[text]
