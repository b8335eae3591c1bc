"""A preference set with known truth: replies of a shop's support, made of four parts that are good or bad.

A prompt tells of an article and what is wrong with it. A reply has a tone, names the article, says what to do, and
closes. Each of the four is good or bad, so the true score of a reply is 0 to 4, and a tiny model can learn all of it.
`KINDS` says how the two replies of a pair differ.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Row = dict[str, str]

SLOTS = ("tone", "item", "fix", "closing")
KINDS = {
    "fix": "only what to do differs, all other words are the same",
    "tone": "only the tone differs",
    "item": "only the article that is named differs",
    "gap1": "the true scores differ by 1; both replies are drawn independently",
    "gap2": "the true scores differ by 2",
    "gap3": "the true scores differ by 3",
    "mixed": "the true scores differ by 1, 2, 3 or 4",
}

_GREETINGS = ("Hello,", "Good day,", "Hi there,", "Hi,", "Dear team,", "Please help,")
_COLOURS = ("red", "blue", "green", "black", "white", "small", "large", "old")
_ITEMS = ("kettle", "lamp", "radio", "toaster", "heater", "mixer", "fan", "clock", "printer", "camera", "drill", "iron")
_ITEMS += ("fridge", "oven", "mower", "shaver", "scale", "phone", "speaker", "router")
_PROBLEMS = {
    "leaks": "tighten the ring below",
    "will not start": "charge it over night",
    "smells burnt": "unplug it and send it in",
    "is too loud": "oil the two bearings",
    "gets too hot": "clean the air holes",
    "shows an error": "hold the button for ten seconds",
    "lost its lid": "order a spare part from us",
    "came broken": "ask for a new one",
    "is much too slow": "install the update",
    "has no manual": "read it on our page",
    "shakes a lot": "put it on level ground",
    "stops at once": "change the fuse",
}
_FIXES = tuple(_PROBLEMS.values())
_TONES = {
    True: ("Thank you for writing to us.", "I am sorry to hear that.", "I am glad to help."),
    False: ("Not this again.", "What is it now?", "You should know this."),
}
_CLOSINGS = {
    True: ("Have a lovely day!", "Write to us at any time.", "All the best to you!"),
    False: ("Do not write again.", "That is all.", "We are closed now."),
}
_WORDS = (_GREETINGS, _COLOURS, _ITEMS, tuple(_PROBLEMS))


@dataclass(frozen=True)
class Case:
    """What a prompt is about.

    Args:
        greeting: How it begins.
        colour: Of the article.
        item: The article.
        problem: What is wrong with it.
    """

    greeting: str
    colour: str
    item: str
    problem: str

    @property
    def prompt(self) -> str:
        """The text that a reply goes on from."""
        return f"{self.greeting} my {self.colour} {self.item} {self.problem}.\nReply:"

    def part(self, slot: str, good: bool, draw: random.Random) -> str:
        """A phrase for one part of the reply."""
        if slot == "tone":
            return draw.choice(_TONES[good])
        if slot == "closing":
            return draw.choice(_CLOSINGS[good])
        if slot == "item":
            item = self.item if good else draw.choice([other for other in _ITEMS if other != self.item])
            return f"With the {item},"
        right = _FIXES.index(_PROBLEMS[self.problem])
        return f"{_FIXES[right if good else (right + draw.randint(1, 3)) % len(_FIXES)]}."

    def reply(self, good: dict[str, bool], draw: random.Random) -> str:
        """A reply whose parts are good or bad as told."""
        return " " + " ".join(self.part(slot, good[slot], draw) for slot in SLOTS)


def cases(draw: random.Random, held_out: bool = False) -> Iterator[Case]:
    """Cases without end, none again before all others have come; those held out never stand among the others."""
    seen: set[Case] = set()
    while True:
        case = Case(*(draw.choice(words) for words in _WORDS))
        if case not in seen and _is_held_out(case) == held_out:
            seen.add(case)
            yield case
        if len(seen) == available(held_out):
            seen.clear()


def _is_held_out(case: Case) -> bool:
    return zlib.crc32(case.prompt.encode()) % 4 == 0


@functools.cache
def available(held_out: bool = False) -> int:
    """How many different prompts there are."""
    return sum(_is_held_out(Case(*words)) == held_out for words in itertools.product(*_WORDS))


def slots(prompt: str, reply: str) -> dict[str, bool]:
    r"""Which parts of a reply are good, told from its text; a part that is missing or said both ways is bad.

    >>> slots("Hi, my red kettle leaks.\nReply:", " That is all. With the kettle, change the fuse. That is all.")
    {'tone': False, 'item': True, 'fix': False, 'closing': False}
    """
    problem = next(name for name in _PROBLEMS if prompt.removesuffix(".\nReply:").endswith(name))
    item = next(name for name in _ITEMS if f" {name} {problem}" in prompt)
    wanted = {"item": {f"With the {item},"}, "fix": {f"{_PROBLEMS[problem]}."}}
    wanted |= {"tone": set(_TONES[True]), "closing": set(_CLOSINGS[True])}
    known = {"item": {f"With the {other}," for other in _ITEMS}, "fix": {f"{fix}." for fix in _FIXES}}
    known |= {"tone": {*_TONES[True], *_TONES[False]}, "closing": {*_CLOSINGS[True], *_CLOSINGS[False]}}
    found = {slot: {phrase for phrase in known[slot] if phrase in reply} for slot in SLOTS}
    return {slot: len(found[slot]) == 1 and found[slot] <= wanted[slot] for slot in SLOTS}


def score(prompt: str, reply: str) -> int:
    """How many of the four parts are good."""
    return sum(slots(prompt, reply).values())


def flips(count: int, share: float, seed: int) -> set[int]:
    """Which of so many rows `pairs` flips."""
    return set(random.Random(f"flips {seed}").sample(range(count), round(share * count)))


def pairs(kind: str, count: int, seed: int, flipped: float = 0.0, held_out: bool = False) -> list[Row]:
    """Pairs of one of the `KINDS`, the better reply chosen.

    Args:
        kind: How the two replies differ.
        count: How many.
        seed: Of prompts, replies and flips.
        flipped: Share of pairs whose label is wrong, exactly so many; `flips` tells which.
        held_out: Take prompts that no other pairs and no supervised rows have.
    """
    draw = random.Random(f"{kind} {seed} {held_out}")
    wrong, rows = flips(count, flipped, seed), []
    for number, case in zip(range(count), cases(draw, held_out), strict=False):
        if kind in SLOTS:
            good = {slot: draw.random() < 0.6 for slot in SLOTS}
            phrases = {slot: case.part(slot, good[slot], draw) for slot in SLOTS}
            texts = [" " + " ".join({**phrases, kind: case.part(kind, way, draw)}.values()) for way in (True, False)]
        else:
            gap = draw.randint(1, 4) if kind == "mixed" else int(kind.removeprefix("gap"))
            low = draw.randint(0, 4 - gap)
            texts = [case.reply(_with(points, draw), draw) for points in (low + gap, low)]
        chosen, rejected = reversed(texts) if number in wrong else texts
        rows.append({"prompt": case.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _with(points: int, draw: random.Random) -> dict[str, bool]:
    """So many good parts, drawn at random."""
    good = draw.sample(SLOTS, points)
    return {slot: slot in good for slot in SLOTS}


def supervised(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """Rows to learn to write from, each part good in 60 of 100; the rejected side is another such reply.

    Prompts come from a few thousand, so that with many rows some stand more than once.
    """
    draw = random.Random(f"supervised {seed} {held_out}")
    rows: list[Row] = []
    while len(rows) < count:
        for _, case in zip(range(min(count - len(rows), 2000)), cases(draw, held_out), strict=False):
            texts = [case.reply({slot: draw.random() < 0.6 for slot in SLOTS}, draw) for _ in range(2)]
            texts[1] += " Not this again." * (texts[0] == texts[1])
            rows.append({"prompt": case.prompt, "chosen": texts[0], "rejected": texts[1]})
    return rows


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE on texts, and save it as a folder that transformers loads."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": vocabulary, "special_tokens": ["<end>"], "initial_alphabet": sorted(alphabet)}
    core.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
