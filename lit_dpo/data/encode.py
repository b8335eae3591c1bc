"""Pairs to token ids: where the prompt ends, which special tokens stand where, what is cut at the limit.

One rule holds everywhere: prompt + completion are the ids that the tokenizer gives for the whole text, so
the model sees in training what it sees in use. Where a token reaches over the boundary, the prompt keeps
only its own whole tokens and both completions begin one token earlier ("healed").
"""

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_dpo.data.pair import Pair, RowError
from lit_dpo.data.render import Prepared, Renderer, shared, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_start", "keep_end"]

_VERSION = 2  # of the rules below: raised by whoever changes what ids a pair gets


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a pair; `prompt + chosen` and `prompt + rejected` are the two sequences to score.

    Args:
        prompt: Ids of the prompt, at least one, with the BOS if there is one.
        chosen: Ids of the preferred completion, at least one, with the EOS unless it was cut off. A token that is not
            scored, because a tool or a user says it, stands as `~id`, which is negative.
        rejected: Ids of the other completion, likewise; never equal to `chosen`.
        truncated: Something was cut to fit the limit.
        healed: A token of the prompt's own ids reached over the boundary and went to the completions.
        control_text: The text spells a special token, which was encoded as ordinary characters.
        prompt_key: A hash of the prompt before anything was cut or healed: equal for equal prompts, 16 bytes.
        cut: What lost tokens to the limit: 1 for the prompt, 2 for chosen, 4 for rejected, added up.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False
    healed: bool = False
    control_text: bool = False
    prompt_key: bytes = b""
    cut: int = 0


class PairEncoder:
    """Encode pairs with one tokenizer and one length limit.

    Text is tokenized as it is: a BOS that the tokenizer adds stands at the start, the EOS at the end of
    each completion, and text that spells a special token stays ordinary text. Messages go through the chat
    template, which writes its own BOS and ends its turns itself; what it prints after the last turn's end
    is cut off. The prompt then ends where the template would let the model start to speak, or, if it does
    not print its generation prompt in front of a finished reply, where the reply's own content starts.

    Args:
        tokenizer: A transformers tokenizer; with a chat template if the data are messages.
        max_length: Most tokens in prompt + longest completion; at least 2.
        truncation: `keep_start` cuts the ends of completions and refuses prompts that fill the limit;
            `keep_end` cuts the start of the prompt first, then the ends of completions.
        append_eos: Whether completions end with the EOS; off if the model is to learn nothing about ending.
        chat_template: The template in the place of the tokenizer's own, as text.
        keep_template_end: Keep what the template prints behind the end of the last turn, mostly a newline, as TRL does.

    Raises:
        ValueError: A wrong argument, or the tokenizer lacks the EOS or chat template that the data need.
        RowError: A pair cannot be encoded faithfully.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        truncation: Truncation = "keep_start",
        append_eos: bool = True,
        chat_template: str | None = None,
        keep_template_end: bool = False,
    ) -> None:
        if max_length < 2:
            raise ValueError(
                f"`max_length` must be at least 2, one token each of prompt and completion, got {max_length}."
            )
        if truncation not in ("keep_start", "keep_end"):
            raise ValueError(f"`truncation` must be `keep_start` or `keep_end`, got `{truncation}`.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.append_eos = append_eos
        self.keep_template_end = keep_template_end
        self.chat_template = chat_template or tokenizer.chat_template
        self._start = _added_at_start(tokenizer)
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special |= {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = special
        self._special = tuple(sorted(special, key=len, reverse=True))
        self._find_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)").search
        # Whether this tokenizer can keep text that spells a special token ordinary; slow ones may not.
        ids = set(special.values())
        alone = self._ids(list(self._special), split=True)
        self._splits_special = not any(ids & set(token) for token in alone)

    def __call__(self, pair: Pair) -> Encoded:
        """Encode one pair; the result always has tokens to train on, and completions that differ."""
        (result,) = self.many([pair])
        if isinstance(result, RowError):
            raise result
        return result

    def many(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """Encode pairs, their texts together, so that the tokenizer may use all processors; refusals in their place."""
        prepared: list[Prepared | RowError] = []
        for pair in pairs:
            try:
                prepared.append(self._prepare(pair))
            except RowError as error:
                prepared.append(error)
        ids = {}
        for rendered in (False, True):
            items = [item for item in prepared if isinstance(item, Prepared) and item.rendered == rendered]
            flat = [text for item in items for text in item.texts]
            ids[rendered] = iter(self._ids(flat, split=not rendered))
        results: list[Encoded | RowError] = []
        for pair, item in zip(pairs, prepared, strict=True):
            try:
                if isinstance(item, Prepared):
                    results.append(self._encoded(pair, item, [next(ids[item.rendered]) for _ in item.texts]))
                else:
                    results.append(item)
            except RowError as error:
                results.append(error)
        return results

    def spelled(self, pair: Pair) -> tuple[Prepared, list[int], list[tuple[int, int]]]:
        """The chosen sequence before it is cut to the limit: its texts, its ids, and which characters each stands for.

        Ids that are put behind the text are left out; those before it stand for no characters.

        Raises:
            RowError: The pair cannot be encoded faithfully.
            ValueError: The tokenizer cannot tell which characters a token stands for.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"`{type(self.tokenizer).__name__}` cannot tell which characters a token stands for, so answers cannot "
                "be cut at a token: use a fast tokenizer (one with a `tokenizer.json`)."
            )
        whole = self._prepare(pair)
        found = self.tokenizer(
            whole.chosen,
            add_special_tokens=False,
            split_special_tokens=not whole.rendered,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids: list[int] = found.input_ids
        spans = [(int(start), int(end)) for start, end in found.offset_mapping]
        if whole.rendered:
            doubled = len(ids) - len(self._one_bos(ids))
            return whole, ids[doubled:], spans[doubled:]
        return whole, self._start + ids, [(0, 0)] * len(self._start) + spans

    def identity(self) -> dict[str, object] | None:
        """Everything that decides a pair's ids besides the pair, as plain values; None where it cannot be told."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        template = str(self.chat_template)
        if backend is None or "strftime_now" in template:  # the template writes the day into its prompts
            return None
        return {
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "class": type(self.tokenizer).__name__,
            "special": [self._special_ids, self._start, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id],
            "template": template,
            "versions": [_VERSION, version("tokenizers"), version("transformers")],
            "options": [self.max_length, self.truncation, self.append_eos, self.keep_template_end],
        }

    def _encoded(self, pair: Pair, whole: Prepared, ids: list[list[int]]) -> Encoded:
        """Find the boundary and cut to the limit."""
        ids = [self._one_bos(i) if whole.rendered else self._start + i for i in ids]
        prompt, chosen, rejected, *starts = ids
        key = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
        chosen, rejected = chosen + whole.ends[0], rejected + whole.ends[1]
        boundary = shared(prompt, chosen, rejected)
        if boundary == 0:
            remedy = "lengthen the prompt, or use a tokenizer with a BOS"
            raise RowError(pair.row, "prompt", "no token belongs to the prompt alone", remedy)
        healed = boundary < len(prompt)
        middle = len(whole.cuts[0])
        left = _masked(chosen, starts[:middle])[boundary:]
        right = _masked(rejected, starts[middle:])[boundary:]
        encoded = Encoded(chosen[:boundary], left, right, False, healed, whole.control_text, key)
        for column, completion in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
            if not any(i >= 0 for i in completion):
                raise RowError(pair.row, column, "the completion has no tokens", "remove the row")
        if chosen == rejected:
            remedy = "they differ only in what the tokenizer or template drops: remove the row"
            raise RowError(pair.row, "rejected", "chosen and rejected are identical", remedy)
        return self._fit(encoded, pair)

    def _ids(self, texts: list[str], split: bool) -> list[list[int]]:
        """Ids of texts alone; with `split`, spelled-out special tokens stay ordinary text."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        return ids

    def _end(self) -> list[int]:
        if not self.append_eos:
            return []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "The tokenizer has no EOS token to end completions with: name another `tokenizer`, or set the data's "
                "`append_eos: false`."
            )
        return [int(eos)]

    def _prepare(self, pair: Pair) -> Prepared:
        return self._prepare_text(pair) if isinstance(pair.prompt, str) else self._prepare_messages(pair)

    def _prepare_text(self, pair: Pair) -> Prepared:
        end, eos, texts = self._end(), self.tokenizer.eos_token, []
        for column, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert isinstance(text, str)
            if column != "prompt" and end and eos and text.endswith(eos):
                text = text.removesuffix(eos)  # it is appended as a token
                if not text.strip():
                    raise RowError(
                        pair.row, column, "the completion is empty", f"it is nothing but {eos!r}: fill it in"
                    )
            texts.append(text)
        control_text = any(self._find_special(text) for text in texts)
        if control_text and not self._splits_special:
            self._refuse_special(pair)
        prompt, chosen, rejected = texts
        return Prepared(prompt, prompt + chosen, prompt + rejected, False, (end, end), control_text)

    def _prepare_messages(self, pair: Pair) -> Prepared:
        if not self.chat_template:
            raise ValueError(
                "The tokenizer has no chat template for data in messages: use an instruct model's tokenizer, set the "
                "data's `chat_template`, or give the data as text."
            )
        self._refuse_special(pair)
        return Renderer(self.tokenizer, self.chat_template, self._special, self._end, self.keep_template_end)(pair)

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Ids of a rendered text, which brings its own BOS; exactly one, even if the template doubles it."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def _refuse_special(self, pair: Pair) -> None:
        more = [("tools", json.dumps(list(pair.tools), ensure_ascii=False))]
        more += [("chat_template_kwargs", json.dumps(dict(pair.template_options), ensure_ascii=False))]
        for column, content in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected), *more):
            for text in texts(content):
                if found := self._find_special(text):
                    remedy = f"it would act as a token: remove {found[0]!r}, or set `on_bad_row: skip`"
                    raise RowError(pair.row, column, "the text spells a special token", remedy)

    def _fit(self, encoded: Encoded, pair: Pair) -> Encoded:
        """Cut to `max_length`. A cut completion loses its EOS with its end, as it does not end there."""
        prompt, longest = encoded.prompt, max(len(encoded.chosen), len(encoded.rejected))
        excess = len(prompt) + longest - self.max_length
        if excess <= 0:
            return encoded
        if self.truncation == "keep_end":
            kept = int(prompt[0] == self.tokenizer.bos_token_id)
            prompt = prompt[:kept] + prompt[kept + min(excess, len(prompt) - 1) :]
        elif len(prompt) >= self.max_length:
            remedy = (
                f"it has {len(prompt)} tokens and `max_length` is {self.max_length}: raise it, or set "
                "`truncation: keep_end` or `on_bad_row: skip`"
            )
            raise RowError(pair.row, "prompt", "the prompt leaves no room for a completion", remedy)
        room = self.max_length - len(prompt)
        chosen, rejected = encoded.chosen[:room], encoded.rejected[:room]
        if chosen == rejected:
            remedy = f"they first differ after {room} tokens: raise `max_length` or set `on_bad_row: skip`"
            raise RowError(pair.row, "rejected", "chosen and rejected are identical after truncation", remedy)
        for column, completion in (("chosen", chosen), ("rejected", rejected)):
            if not any(i >= 0 for i in completion):
                remedy = "raise `max_length`, or set `on_bad_row: skip`"
                raise RowError(pair.row, column, "truncation leaves nothing of the assistant's", remedy)
        before, after = (encoded.prompt, encoded.chosen, encoded.rejected), (prompt, chosen, rejected)
        cut = sum((len(a) < len(b)) << bit for bit, (a, b) in enumerate(zip(after, before, strict=True)))
        return replace(encoded, prompt=prompt, chosen=chosen, rejected=rejected, truncated=True, cut=cut)


def read_template(given: str) -> str:
    """The text of a chat template, given as that text or as a path to its file.

    Raises:
        ValueError: It is neither.
    """
    if "{" in given:  # no template is without
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"`chat_template`: there is no file `{given}`. Give a .jinja file, or the template itself.")
    return path.read_text(encoding="utf-8")


def _masked(ids: list[int], starts: Sequence[list[int]]) -> list[int]:
    """Ids of a sequence, those that the assistant does not say as `~id`.

    Args:
        ids: The whole sequence.
        starts: Ids of the text up to where the assistant ends, up to where it begins again, and so on. A token that
            reaches over such a place belongs to what is behind it.
    """
    places = [shared(start, ids) for start in starts]
    masked = list(ids)
    for start, end in zip(places[::2], places[1::2], strict=True):
        masked[start:end] = [~i for i in ids[start:end]]
    return masked


def _added_at_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids, at most a BOS, that the tokenizer puts before a text of its own accord."""
    bare: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    full: list[int] = tokenizer("a").input_ids
    starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[: next(starts, 0)]
