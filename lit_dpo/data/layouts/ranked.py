"""Layouts of several ranked or scored answers to a prompt, in one row or in several."""

from typing import Any

from lit_dpo.data.cells import Cells
from lit_dpo.data.layouts.base import Answer, Answers, Layout, asked, assistant, reply, system_turn
from lit_dpo.data.pair import Message

RATINGS = ("helpfulness", "rating", "score")


def _list(cells: Cells, column: str) -> list[Any]:
    found = cells.json(column)
    if not isinstance(found, list) or not found:
        raise cells.error(column, "there is no list of answers", "give a list of two answers or more")
    return found


def _scored(cells: Cells, column: str) -> list[Answer]:
    """Answers with a `rank`, of which the lowest is the best, or with a `score`, of which the highest is."""
    answers = []
    for one in _list(cells, column):
        if not isinstance(one, dict):
            raise cells.error(column, "an answer is not an object", "write {answer, rank} for each")
        content = next((one[key] for key in ("answer", "completion", "text", "content") if key in one), None)
        if "rank" in one:
            score = -cells.as_number(one["rank"], column)
        elif "score" in one:
            score = cells.as_number(one["score"], column)
        else:
            remedy = "give each a `rank`, the best the lowest, or a `score`"
            raise cells.error(column, "an answer has neither rank nor score", remedy)
        if isinstance(content, str):
            turns: list[Message] = [assistant(cells.as_text(content, column))]
        else:
            turns = cells.as_messages(content, column)
        answers.append(Answer(turns, score, column))
    return answers


def _ranked(cells: Cells) -> Answers:
    question = "messages" if cells.has("messages") else "prompt"
    prompt = system_turn(cells) + cells.messages("messages") if question == "messages" else asked(cells, "prompt")
    return Answers(prompt, tuple(_scored(cells, "answers")), question)


def _gemini(cells: Cells) -> Answers:
    prompt = system_turn(cells) + cells.as_messages(cells.json("contents"), "contents")
    return Answers(prompt, tuple(_scored(cells, "completions")), "contents")


def _context(cells: Cells) -> Answers:
    return Answers(asked(cells, "context"), tuple(_scored(cells, "completions")), "context")


def _last_turn(cells: Cells) -> Answers:
    """A conversation whose last turn is the answer."""
    turns = cells.messages("messages")
    answer = Answer(turns[-1:], cells.number("label"), "messages")
    return Answers(system_turn(cells) + turns[:-1], (answer,), "messages")


def _tagged(cells: Cells) -> Answers:
    answer = Answer(reply(cells, "output"), cells.number("kto_tag"), "output")
    return Answers(asked(cells, "instruction"), (answer,), "instruction")


def _best_first(cells: Cells) -> Answers:
    """A list of texts from the best to the worst."""
    texts = _list(cells, "output")
    answers = [
        Answer([assistant(cells.as_text(text, "output"))], float(-place), "output") for place, text in enumerate(texts)
    ]
    return Answers(asked(cells, "instruction"), tuple(answers), "instruction")


def _rated(cells: Cells) -> Answers:
    rating = next(name for name in RATINGS if cells.has(name))
    return Answers(asked(cells, "prompt"), (Answer(reply(cells, "response"), cells.number(rating), "response"),))


def _unpaired(cells: Cells) -> Answers:
    score = cells.number("label")
    if cells.lists("prompt"):
        return Answers(cells.messages("prompt"), (Answer(cells.messages("completion"), score, "completion"),))
    return Answers(cells.text("prompt"), (Answer(cells.text("completion"), score, "completion"),))


def _chat(cells: Cells) -> bool:
    return cells.lists("prompt")


def _text(cells: Cells) -> bool:
    return not cells.lists("prompt")


_UNPAIRED = ("prompt", "completion", "label")
_LOWEST = "the lowest `rank`"
_TRUE = "`label` true among rows of one prompt"
RANKED = (
    Layout("ranked answers", ("prompt", "answers"), _ranked, _LOWEST, "berkeley-nest/Nectar"),
    Layout("ranked answers to messages", ("messages", "answers"), _ranked, _LOWEST, "Open Assistant"),
    Layout("ranked completions", ("context", "completions"), _context, _LOWEST, "NeMo-RL"),
    Layout("Gemini", ("contents", "completions"), _gemini, "the highest `score`", "Vertex AI"),
    Layout(
        "outputs, best first",
        ("instruction", "output"),
        _best_first,
        "the first of `output`",
        "LLaMA-Factory before 0.8",
        lambda cells: isinstance(cells.row["output"], list),
    ),
    *(
        Layout(
            f"rated responses ({rating})",
            ("prompt", "response", rating),
            _rated,
            f"the highest `{rating}` among rows of one prompt",
            "nvidia/HelpSteer2, open-instruct",
            grouped=True,
        )
        for rating in RATINGS
    ),
    Layout("unpaired conversations", ("messages", "label"), _last_turn, _TRUE, "LLaMA-Factory, ms-swift", grouped=True),
    Layout(
        "unpaired replies",
        ("instruction", "output", "kto_tag"),
        _tagged,
        "`kto_tag` true among rows of one prompt",
        "LLaMA-Factory kto_tag",
        grouped=True,
    ),
    Layout(
        "unpaired messages",
        _UNPAIRED,
        _unpaired,
        _TRUE,
        "TRL KTO, LLaMA-Factory kto_tag",
        _chat,
        grouped=True,
    ),
    Layout(
        "unpaired text",
        _UNPAIRED,
        _unpaired,
        _TRUE,
        "TRL KTO",
        _text,
        verbatim=True,
        grouped=True,
    ),
)
