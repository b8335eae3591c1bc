"""Layouts of two answers and a label, or two scores, that tells which is better."""

from collections.abc import Callable

from lit_dpo.data.cells import Cells
from lit_dpo.data.layouts.base import Answer, Answers, Layout, asked, assistant, fork, label, two, user

Preference = Callable[[Cells], float]
"""Above 0 the first answer is better, below 0 the second; 0 is a tie."""

_FIRST = {"1": 1.0, "true": 1.0, "0": -1.0, "false": -1.0, "0.5": 0.0}
_INDEX = {"0": 1.0, "1": -1.0, "-1": 0.0}
_TIES = ("tie", "tie (bothbad)", "both_bad", "tie (both bad)", "both", "neither", "draw")
_WINNER = {
    **dict.fromkeys(("model_a", "a", "response_a", "answer_a", "assistant_a"), 1.0),
    **dict.fromkeys(("model_b", "b", "response_b", "answer_b", "assistant_b"), -1.0),
    **dict.fromkeys(_TIES, 0.0),
}


def _labelled(
    name: str,
    question: str,
    answers: tuple[str, str],
    decided: Preference,
    labels: tuple[str, ...],
    better: str,
    users: str,
    aside: tuple[str, ...] = (),
) -> Layout:
    def read(cells: Cells) -> Answers:
        return two(asked(cells, question), cells, *answers, decided(cells), question)

    return Layout(name, (question, *answers, *labels), read, better, users, aside=aside)


def _by_label(column: str, meanings: dict[str, float], scores: tuple[str, str] | None = None) -> Preference:
    """What a label says; scores beside it must not say the opposite."""

    def decided(cells: Cells) -> float:
        preference = label(cells, column, meanings)
        if scores is not None and all(cells.filled(score) for score in scores):
            first, second = (cells.number(score) for score in scores)
            if (first - second) * preference < 0:
                raise cells.error(column, "label and scores disagree", f"correct it, or drop `{scores[0]}`")
        return preference

    return decided


def _by_scores(first: str, second: str) -> Preference:
    return lambda cells: cells.number(first) - cells.number(second)


def _webgpt(cells: Cells) -> Answers:
    question = cells.row["question"]
    prompt = asked(cells, "question") if isinstance(question, str) else None
    if prompt is None:
        found = cells.json("question")
        text = cells.as_text(found.get("full_text") if isinstance(found, dict) else None, "question")
        prompt = [user(text)]
    return two(prompt, cells, "answer_0", "answer_1", _by_scores("score_0", "score_1")(cells), "question")


def _summaries(cells: Cells) -> Answers:
    info, found = cells.json("info"), cells.json("summaries")
    post = (info.get("post") or info.get("article")) if isinstance(info, dict) else None
    texts = [one.get("text") if isinstance(one, dict) else one for one in found] if isinstance(found, list) else []
    if len(texts) != 2:
        raise cells.error("summaries", "there are not two summaries", "give two, each with its `text`")
    preference = label(cells, "choice", _INDEX)
    replies = [[assistant(cells.as_text(text, "summaries"))] for text in texts]
    answers = (Answer(replies[0], preference, "summaries"), Answer(replies[1], 0.0, "summaries"))
    return Answers([user(cells.as_text(post, "info"))], answers, "info")


def _arena(cells: Cells) -> Answers:
    preference = label(cells, "winner", _WINNER)
    prompt, first, second = fork(cells, "conversation_a", "conversation_b")
    return Answers(
        prompt,
        (Answer(first, preference, "conversation_a"), Answer(second, 0.0, "conversation_b")),
        "conversation_a",
    )


LABELLED = (
    _labelled(
        "output_A and output_B",
        "prompt",
        ("output_A", "output_B"),
        _by_label("label", _FIRST, ("reward_A", "reward_B")),
        ("label",),
        "`label` 1 means A",
        "HALOs",
    ),
    _labelled(
        "SHP",
        "history",
        ("human_ref_A", "human_ref_B"),
        _by_label("labels", _FIRST, ("score_A", "score_B")),
        ("labels",),
        "`labels` 1 means A",
        "stanfordnlp/SHP",
    ),
    _labelled(
        "PKU-SafeRLHF",
        "prompt",
        ("response_0", "response_1"),
        _by_label("better_response_id", _INDEX),
        ("better_response_id",),
        "`better_response_id` is the number of the better one, from 0",
        "PKU-SafeRLHF, HALOs",
        ("safer_response_id",),
    ),
    Layout(
        "WebGPT",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        _webgpt,
        "the higher of `score_0` and `score_1`",
        "openai/webgpt_comparisons",
    ),
    Layout(
        "summaries",
        ("info", "summaries", "choice"),
        _summaries,
        "`choice` is the number of the better one, from 0",
        "openai/summarize_from_feedback",
    ),
    _labelled(
        "HelpSteer2 preference",
        "prompt",
        ("response_1", "response_2"),
        lambda cells: -cells.number("preference_strength"),
        ("preference_strength",),
        "`preference_strength` below 0 means response_1",
        "nvidia/HelpSteer2",
    ),
    _labelled(
        "HelpSteer3 preference",
        "context",
        ("response1", "response2"),
        lambda cells: -cells.number("overall_preference"),
        ("overall_preference",),
        "`overall_preference` below 0 means response1",
        "nvidia/HelpSteer3, NeMo-RL",
    ),
    Layout(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        _arena,
        "`winner` names it",
        "lmsys/chatbot_arena_conversations",
    ),
    _labelled(
        "response_a and response_b",
        "prompt",
        ("response_a", "response_b"),
        _by_label("winner", _WINNER),
        ("winner",),
        "`winner` names it",
        "lmsys arena sets",
    ),
    _labelled(
        "StackExchange",
        "question",
        ("response_j", "response_k"),
        lambda cells: 1.0,
        (),
        "`response_j` is better",
        "lvwerra/stack-exchange-paired",
    ),
)
