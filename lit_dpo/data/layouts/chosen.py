"""Layouts that say which completion is the chosen one."""

from lit_dpo.data.cells import Cells
from lit_dpo.data.layouts.base import (
    SYSTEM,
    Answers,
    Layout,
    asked,
    assistant,
    chosen_first,
    fork,
    reply,
    split_transcript,
    system_turn,
    user,
)
from lit_dpo.data.pair import Message, NoPreferenceError

_BOTH = ("chosen", "rejected")
_TURNS = (*SYSTEM, "history")


def _explicit_messages(cells: Cells) -> Answers:
    return chosen_first(_with_system(cells.messages("prompt"), cells), [cells.messages(name) for name in _BOTH])


def _explicit_text(cells: Cells) -> Answers:
    return chosen_first(cells.text("prompt"), [cells.text(name) for name in _BOTH])


def _prompt_repeated(cells: Cells) -> Answers:
    """`prompt` is the first user turn of both conversations, or their only one."""
    text = cells.text("prompt")
    if cells.messages("chosen")[:1] and cells.messages("chosen")[0]["role"] == "assistant":
        return chosen_first([*system_turn(cells), user(text)], [cells.messages(name) for name in _BOTH])
    prompt, chosen, rejected = fork(cells, *_BOTH)
    opening = next((m.get("content", "") for m in prompt if m["role"] == "user"), "")
    if text.strip() != opening.strip():
        raise cells.error("prompt", "the prompt is not the first user turn", "correct it or drop the column")
    if cells.filled("messages") and cells.messages("messages")[: len(prompt)] != prompt:
        raise cells.error("messages", "the messages are not those of the prompt", "correct them or drop the column")
    return chosen_first(prompt, (chosen, rejected))


def _implicit_messages(cells: Cells) -> Answers:
    prompt, chosen, rejected = fork(cells, *_BOTH)
    return chosen_first(_with_system(prompt, cells), (chosen, rejected), ("chosen", *_BOTH))


def _with_system(prompt: list[Message], cells: Cells) -> list[Message]:
    system = system_turn(cells)
    if system and prompt[:1] and prompt[0]["role"] == "system":
        if system != prompt[:1]:
            raise cells.error(cells.first(*SYSTEM), "two system messages", "keep one of them")
        return prompt
    return system + prompt


def _hh_text(cells: Cells) -> Answers:
    (prompt, chosen), (other, rejected) = (split_transcript(cells, column) for column in _BOTH)
    if prompt != other:
        raise cells.error("rejected", "the prompts differ", "let both have all but the last reply in common")
    return chosen_first(prompt, (chosen, rejected), ("chosen", *_BOTH))


def _question(cells: Cells) -> Answers:
    if cells.row.get("status") == "tie":  # of Argilla's distilabel sets
        raise NoPreferenceError(cells.where, "status", "a tie", "the label prefers neither answer")
    column = cells.first("instruction", "question", "query", "problem", "prompt", "input")
    return chosen_first(asked(cells, column), [reply(cells, name) for name in _BOTH], (column or "prompt", *_BOTH))


def _responses(cells: Cells) -> Answers:
    chosen = "chosen_response" if cells.has("chosen_response") else "response"
    column = cells.first("instruction", "question", "query", "problem", "prompt", "input")
    columns = (column or "prompt", chosen, "rejected_response")
    return chosen_first(asked(cells, column), (reply(cells, chosen), reply(cells, columns[2])), columns)


def _conversation(column: str) -> Layout:
    """`messages` or `conversations`, and each reply as text, as a message or as messages."""

    def read(cells: Cells) -> Answers:
        prompt = _with_system(cells.messages(column), cells)
        replies = [reply(cells, name) for name in _BOTH]
        whole = [turns[: len(prompt)] == prompt and turns[len(prompt) :] for turns in replies]
        if all(whole):  # the replies stand in whole conversations
            replies = [turns[len(prompt) :] for turns in replies]
        return chosen_first(prompt, replies, (column, *_BOTH))

    users = "LLaMA-Factory sharegpt, MedicalGPT" if column == "conversations" else "axolotl chat_template.default"
    return Layout(f"{column} and replies", (column, *_BOTH), read, _NAMED, users)


def _whole(chosen: str, rejected: str, users: str) -> Layout:
    """Two whole conversations under other names."""

    def read(cells: Cells) -> Answers:
        prompt, left, right = fork(cells, chosen, rejected)
        return chosen_first(_with_system(prompt, cells), (left, right), (chosen, chosen, rejected))

    return Layout(f"{chosen} and {rejected}", (chosen, rejected), read, _NAMED, users)


def _last_is_chosen(cells: Cells) -> Answers:
    """`messages` ends with the chosen reply (ms-swift)."""
    rejected = "rejected_messages" if cells.filled("rejected_messages") else "rejected_response"
    turns = cells.messages("messages")
    start = len(turns)
    while start and turns[start - 1]["role"] == "assistant":
        start -= 1
    prompt, chosen = turns[:start], turns[start:]
    if rejected == "rejected_messages":
        prompt, chosen, other = fork(cells, "messages", rejected)
    else:
        other = [assistant(cells.text(rejected))]
    cells.used.update(("rejected_messages", "rejected_response"))
    return chosen_first(_with_system(prompt, cells), (chosen, other), ("messages", "messages", rejected))


def _openai(cells: Cells) -> Answers:
    given = cells.json("input")
    if not isinstance(given, dict) or "messages" not in given:
        raise cells.error("input", "the input has no messages", "write {messages: [...]}")
    prompt = cells.as_messages(given["messages"], "input")
    columns = ("preferred_output", "non_preferred_output")
    found = chosen_first(prompt, [cells.messages(name) for name in columns], ("input", *columns))
    return Answers(found.prompt, found.answers, "input", given.get("tools"))


def _texts(cells: Cells) -> bool:
    return not (cells.lists("chosen") or cells.lists("rejected"))


def _turns(cells: Cells) -> bool:
    """Whether a prompt of text has company that makes it a turn."""
    return any(column in cells.row for column in (*_TURNS, "input"))


_NAMED = "`chosen` is better"
_ALONE = ("question", "query", "instruction", "problem", "input")  # columns that mean what a user asks

EXPLICIT = (
    Layout(
        "messages",
        ("prompt", *_BOTH),
        _explicit_messages,
        _NAMED,
        "TRL, trl-lib, MedicalGPT",
        lambda cells: cells.lists("prompt"),
    ),
    Layout(
        "prompt repeated",
        ("prompt", *_BOTH),
        _prompt_repeated,
        _NAMED,
        "HuggingFaceH4/ultrafeedback_binarized, argilla/*-cleaned, alignment-handbook, HALOs",
        lambda cells: not _texts(cells),
        aside=("messages",),
    ),
    _conversation("conversations"),
    _conversation("messages"),
)
NAMED = (
    Layout(
        "prompt and system",
        ("prompt", *_BOTH),
        _question,
        _NAMED,
        "axolotl, argilla",
        _turns,
    ),
    Layout(
        "text",
        ("prompt", *_BOTH),
        _explicit_text,
        _NAMED,
        "TRL, axolotl, OpenRLHF, torchtune",
        verbatim=True,
    ),
    *(
        Layout(
            f"{column}, chosen, rejected",
            (column, *_BOTH),
            _question,
            _NAMED,
            "Intel/orca_dpo_pairs, LLaMA-Factory alpaca, argilla/distilabel-*",
        )
        for column in _ALONE
    ),
    Layout(
        "messages, prompt contained",
        _BOTH,
        _implicit_messages,
        _NAMED,
        "trl-lib/ultrafeedback_binarized, OpenRLHF, open-instruct, torchtune, argilla/dpo-mix-7k",
        lambda cells: not _texts(cells),
    ),
    Layout("HH", _BOTH, _hh_text, _NAMED, "Anthropic/hh-rlhf", verbatim=True),
    *(
        Layout(
            f"{question}, {chosen}, rejected_response",
            (question, chosen, "rejected_response"),
            _responses,
            f"`{chosen}` is better",
            "axolotl argilla, NeMo-RL, ms-swift",
        )
        for question in ("instruction", "question", "query", "problem", "prompt", "input")
        for chosen in ("chosen_response", "response")
    ),
    *(
        Layout(
            f"messages and {rejected}",
            ("messages", rejected),
            _last_is_chosen,
            "the last of `messages` is better",
            "ms-swift, simplismart",
        )
        for rejected in ("rejected_messages", "rejected_response")
    ),
    _whole("chosen_messages", "rejected_messages", "LLaMA-Factory v1"),
    _whole("chosen_conversations", "rejected_conversations", "torchtune"),
    Layout(
        "preferred_output",
        ("input", "preferred_output", "non_preferred_output"),
        _openai,
        "`preferred_output` is better",
        "OpenAI, Azure, Together",
    ),
)
