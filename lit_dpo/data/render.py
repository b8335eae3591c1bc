"""Conversations to text: what the chat template prints, and which of it the assistant says."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lit_dpo.data.pair import Content, Message, Pair, RowError, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE: Message = {"role": "assistant", "content": "\ufdd0"}  # a noncharacter: no template and no reply begins with it
_MUST_RENDER = ("tool_calls", "reasoning_content", "thinking")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to tokenize of a pair, each text from its start, and what to put around the ids.

    Args:
        prompt: The prompt alone.
        chosen: Prompt and chosen completion.
        rejected: Prompt and rejected completion.
        rendered: By the chat template, which brings its own special tokens; else they stay ordinary text.
        ends: Ids behind chosen and behind rejected.
        control_text: The text spells a special token, which is encoded as ordinary characters.
        cuts: Places in chosen and in rejected, in characters, where what the assistant says ends, begins, ends, ...;
            a completion of one message has none.
    """

    prompt: str
    chosen: str
    rejected: str
    rendered: bool
    ends: tuple[list[int], list[int]]
    control_text: bool = False
    cuts: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]

    @property
    def texts(self) -> list[str]:
        """All texts whose ids are needed: the three, then each completion up to each of its cuts."""
        sides = zip((self.chosen, self.rejected), self.cuts, strict=True)
        return [self.prompt, self.chosen, self.rejected, *(text[:cut] for text, cuts in sides for cut in cuts)]


class Renderer:
    """Render pairs of messages by a chat template.

    Args:
        tokenizer: Whose template engine it is.
        template: The chat template.
        special: Texts of all special tokens, long ones first.
        end: Gives the ids to end a completion with that the template does not end itself.
        keep_end: Keep what the template prints behind the last turn's end, as TRL does.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        special: tuple[str, ...],
        end: Callable[[], list[int]],
        keep_end: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.special, self.end, self.keep_end = (
            tokenizer,
            template,
            special,
            end,
            keep_end,
        )
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*parameters, "messages", "tools", "documents", "add_generation_prompt"}

    def __call__(self, pair: Pair) -> Prepared:
        """What to tokenize of a pair.

        Raises:
            RowError: The template refuses the conversation, or leaves some of it out.
        """
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        assert not isinstance(prompt, str)
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        self._check(pair)
        left, right = self._render(prompt + chosen, pair), self._render(prompt + rejected, pair)
        before = self._render(prompt, pair, generation_prompt=True)
        if not (left.startswith(before) and right.startswith(before)):
            before = left[: shared(self._render([*prompt, _PROBE], pair), left, right)]
        for column, turns, text in (("chosen", chosen, left), ("rejected", rejected, right)):
            self._check_tools(prompt + turns, text, column, pair)
        (left, left_end), (right, right_end) = self._finished(left), self._finished(right)
        cuts = self._cuts(prompt, chosen, left, "chosen", pair), self._cuts(prompt, rejected, right, "rejected", pair)
        return Prepared(before, left, right, True, (left_end, right_end), cuts=cuts)

    def _render(self, messages: Sequence[Message], pair: Pair, generation_prompt: bool = False) -> str:
        options: dict[str, Any] = dict(pair.template_options)
        if pair.tools:
            options["tools"] = list(pair.tools)
        try:
            turns: list[Any] = [dict(message) for message in messages]
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **options,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            remedy = f'it says "{error}": change the turns, or set `on_bad_row: skip`'
            raise RowError(pair.row, None, "the chat template refuses the conversation", remedy) from error
        return str(text)

    def _finished(self, text: str) -> tuple[str, list[int]]:
        """A rendered conversation and the ids behind it: ended by the template's own special token, or by the EOS."""
        stripped = text.rstrip()
        if not stripped.endswith(self.special):
            return text, self.end()
        return text if self.keep_end else stripped, []

    def _cuts(self, prompt: list[Message], turns: list[Message], text: str, column: str, pair: Pair) -> list[int]:
        """Places in a rendered conversation between what the assistant says behind the prompt and what it does not."""
        cuts: list[int] = []
        for i, turn in enumerate(turns[:-1]):
            if turn["role"] == "assistant":
                said = self._render([*prompt, *turns[: i + 1]], pair)
                cuts.append(len(said if not said.rstrip().endswith(self.special) else said.rstrip()))
                if not text.startswith(said[: cuts[-1]]):
                    remedy = "its tokens cannot be told apart: give completions of one message, or another template"
                    raise RowError(pair.row, column, "the chat template rewrites an earlier turn", remedy)
            if turns[i + 1]["role"] == "assistant":
                head = self._render([*prompt, *turns[: i + 1]], pair, generation_prompt=True)
                if not text.startswith(head):
                    head = text[: shared(self._render([*prompt, *turns[: i + 1], _PROBE], pair), text)]
                cuts.append(max(len(head), cuts[-1]))
        return cuts

    # -- nothing is left out silently ---------------------------------------------------------------------------------

    def _check(self, pair: Pair) -> None:
        """Refuse what the template has no words for."""
        if taken := [name for name in pair.template_options if name in self._reserved]:
            remedy = f"leave {names(taken)} out: a row may set variables of the template, not how it is applied"
            raise RowError(pair.row, "chat_template_kwargs", "a name that the template may not be given", remedy)
        if pair.tools and not re.search(r"\btools\b", self.template):
            remedy = "give a `chat_template` that does, or set `on_bad_row: skip`"
            raise RowError(pair.row, "tools", "the chat template does not render tools", remedy)
        for column, content in sides(pair):
            for message in content:
                for key in _MUST_RENDER:
                    if key in message and not re.search(rf"\b{key}\b", self.template):
                        remedy = "give a `chat_template` that does, or set `on_bad_row: skip`"
                        raise RowError(pair.row, column, f"the chat template does not render `{key}`", remedy)

    def _check_tools(self, turns: Sequence[Message], text: str, column: str, pair: Pair) -> None:
        """Refuse a conversation whose tool calls or tools' answers are not in its text."""
        for turn in turns:
            wanted = [str(call["function"]["name"]) for call in turn.get("tool_calls", ())]
            if turn["role"] == "tool":
                wanted.append(turn.get("content", "").strip())
            for words in wanted:
                if words not in text and json.dumps(words)[1:-1] not in text:
                    remedy = f"it leaves out {words!r:.60}: give another `chat_template`, or set `on_bad_row: skip`"
                    raise RowError(pair.row, column, "the chat template leaves out a tool's turn", remedy)


def sides(pair: Pair) -> Iterator[tuple[str, list[Message]]]:
    """The names and messages of prompt and completions."""
    for column, content in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        assert not isinstance(content, str)
        yield column, content


def texts(content: Content) -> list[str]:
    """Every text in a prompt or completion."""
    if isinstance(content, str):
        return [content]
    found = [str(value) for message in content for key, value in message.items() if key not in ("role", "tool_calls")]
    calls = [message["tool_calls"] for message in content if "tool_calls" in message]
    return found + [json.dumps(call, ensure_ascii=False) for call in calls]


def shared(first: Sequence[object], *others: Sequence[object]) -> int:
    """Length of the longest prefix that all the sequences share."""
    if all(other[: len(first)] == first for other in others):
        return len(first)
    differ = (i for i, items in enumerate(zip(first, *others, strict=False)) if len(set(items)) > 1)
    return next(differ, min(map(len, others)))
