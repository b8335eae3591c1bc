"""What became of the rows of a load, in numbers: every row is trained on or counted with its reason."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lit_dpo.data.encode import Encoded
from lit_dpo.data.layouts import LAYOUTS
from lit_dpo.data.pair import NoPreferenceError, Pair, RowError
from lit_dpo.plain_text import obeyed_by_none

_EXAMPLES = 3
_COUNTED = ("truncated", "healed", "with special tokens", "duplicates", "contradictions")
_NAMED = 20  # bad rows that a warning names
VERBATIM = {layout.name for layout in LAYOUTS if layout.verbatim}
_SHOWN = 160  # characters of each side of the boundary


@dataclass(slots=True)
class Lengths:
    """Token counts of the pairs of a source, in their order."""

    prompt: array[int] = field(default_factory=lambda: array("l"))
    chosen: array[int] = field(default_factory=lambda: array("l"))
    rejected: array[int] = field(default_factory=lambda: array("l"))

    def add(self, encoded: Encoded) -> None:
        """Count a pair."""
        self.prompt.append(len(encoded.prompt))
        self.chosen.append(len(encoded.chosen))
        self.rejected.append(len(encoded.rejected))

    def __str__(self) -> str:
        parts = []
        for name in ("prompt", "chosen", "rejected"):
            counts = sorted(getattr(self, name))
            places = (int(q * (len(counts) - 1)) for q in (0.5, 0.9, 0.99, 1))
            parts.append(f"{name} " + "/".join(str(counts[place]) for place in places))
        return "tokens at 50/90/99/100 %: " + ", ".join(parts)

    @property
    def longer(self) -> float | None:
        """Share of pairs whose chosen completion is the longer one, among those whose lengths differ."""
        signs = [
            chosen > rejected for chosen, rejected in zip(self.chosen, self.rejected, strict=True) if chosen != rejected
        ]
        return sum(signs) / len(signs) if signs else None


@dataclass(slots=True)
class LoadReport:
    """What became of the rows of one load: `read == kept + skipped.total()`. Where it does not say pairs, it is rows.

    Args:
        read: Rows found.
        kept: Rows that are in a pair returned.
        pairs: Pairs returned; fewer or more than rows where layouts join rows or rank several answers.
        skipped: Reason -> rows not used because of it.
        bad: Reason -> those of them that are malformed; the others prefer nothing, such as ties.
        examples: Reason, of rows not used and of notes -> locations of the first few.
        bad_rows: The first malformed rows, each with what is wrong.
        lost: Reason -> pairs refused of rows that are kept for another pair.
        truncated: Kept pairs that were cut to the length limit.
        cut: Side -> kept pairs that lost some of it.
        healed: Kept pairs whose prompt gave its last token to the completions.
        control_text: Kept pairs of text that spells a special token, encoded as ordinary characters.
        duplicates: Kept pairs with the same tokens as an earlier one. Legal: they weigh double.
        contradictory: Kept pairs with the tokens of an earlier one, but chosen and rejected swapped.
        notes: What else is worth knowing -> kept pairs.
        layouts: Source -> layout -> kept pairs.
        lengths: Source -> token counts.
        first: The first kept pair, to be shown.
    """

    read: int = 0
    kept: int = 0
    pairs: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    healed: int = 0
    control_text: int = 0
    duplicates: int = 0
    contradictory: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    layouts: dict[str, Counter[str]] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    first: tuple[str, Encoded] | None = None

    def __str__(self) -> str:
        sides = ", ".join(f"{side} {count}" for side, count in self.cut.items())
        notable = {
            f"truncated ({sides})" if sides else "truncated": self.truncated,
            "healed at the prompt's end": self.healed,
            "with special tokens spelled out as text": self.control_text,
            "exact duplicates": self.duplicates,
            "contradicting an earlier row": self.contradictory,
        }
        counts = [f"{self.read} rows read", f"{self.kept} kept", f"{self.skipped.total()} skipped"]
        if self.pairs != self.kept:
            counts.append(f"{self.pairs} pairs")
        lines = [", ".join(counts + [f"{n} {what}" for what, n in notable.items() if n])]
        for title, counted in (("skipped", self.skipped), ("pairs left out", self.lost), ("noted", self.notes)):
            if counted:
                lines.append(f"{title}: " + "; ".join(self._counted(counted)))
        places = [f"{what} {', '.join(self.examples[what])}" for what in _COUNTED if what in self.examples]
        if places:
            lines.append("of these: " + "; ".join(places))
        mixed = [source for source, found in self.layouts.items() if len(found) > 1]
        for source in mixed:
            found = ", ".join(f"`{name}` {count}" for name, count in self.layouts[source].most_common())
            lines.append(f"{source} mixes layouts: {found}")
        return obeyed_by_none("\n".join(lines))  # names columns and values of the rows

    def overview(self, decode: Callable[[list[int]], str], has_template: bool = False) -> str:
        """The layout and lengths of each source, and one pair as it is trained on, with its boundary.

        Args:
            decode: From token ids to text.
            has_template: Whether there is a chat template, which text does not go through unless it is asked to.
        """
        lines = []
        for source, found in self.layouts.items():
            lengths, (name, _) = self.lengths[source], *found.most_common(1)
            lines.append(f"{source}: layout `{name}`; {lengths}")
            if has_template and name in VERBATIM:
                how = "trained on as it stands; `text_as_turns: true` renders it by the chat template"
                lines.append(f"{source}: its text is {how}")
            if lengths.longer is not None:
                lines.append(f"{source}: always picking the longer answer scores {lengths.longer:.2f}")
        if self.first is not None:
            where, pair = self.first
            prompt, chosen, rejected = (decode([i if i >= 0 else ~i for i in ids]) for ids in _sides(pair))
            lines.append(f"{where}, as it is trained on; the prompt ends where the completions begin:")
            lines.append(f"  prompt   {_end(prompt)}")
            lines += [f"  {name:8} {_start(text)}" for name, text in (("chosen", chosen), ("rejected", rejected))]
        return obeyed_by_none("\n".join(lines))

    def skip(self, error: RowError, where: str | None = None) -> None:
        """Count a row that is not used."""
        self.skipped[error.reason] += 1
        self._example(error.reason, where or error.where)
        if not isinstance(error, NoPreferenceError):
            self.bad[error.reason] += 1
            if len(self.bad_rows) < _NAMED:
                self.bad_rows.append(str(error))

    def keep(self, pair: Pair, encoded: Encoded) -> None:
        """Count a pair that is trained on."""
        self.pairs += 1
        for what, found in (
            ("truncated", encoded.truncated),
            ("healed", encoded.healed),
            ("with special tokens", encoded.control_text),
        ):
            if found:
                self._example(what, pair.row)
        self.truncated += encoded.truncated
        for bit, side in enumerate(("prompt", "chosen", "rejected")):
            if encoded.cut >> bit & 1:
                self.cut[side] += 1
        self.healed += encoded.healed
        self.control_text += encoded.control_text
        self.notes.update({note for note, _ in pair.notes})
        for note, column in pair.notes:
            self._example(note, f"{pair.row}, column `{column}`")
        self.layouts.setdefault(pair.source, Counter())[pair.layout] += 1
        self.lengths.setdefault(pair.source, Lengths()).add(encoded)
        self.first = self.first or (pair.row, encoded)

    def repeat(self, row: str, swapped: bool) -> None:
        """Count a kept pair with the tokens of an earlier one, or with its completions swapped."""
        self.contradictory += swapped
        self.duplicates += not swapped
        self._example("contradictions" if swapped else "duplicates", row)

    def others(self, first: RowError) -> str:
        """What is wrong with malformed rows besides one, in words."""
        rest = self.bad - Counter([first.reason])
        kinds = ", ".join(f"{count}x {reason}" for reason, count in rest.most_common())
        rows = "1 more row" if rest.total() == 1 else f"{rest.total()} more rows"
        return f"{rows} cannot be trained on: {kinds}." if rest else ""

    def _example(self, reason: str, where: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(where)

    def _counted(self, counted: Counter[str]) -> list[str]:
        return [f"{n}x {reason} ({', '.join(self.examples.get(reason, []))})" for reason, n in counted.most_common()]


def _sides(pair: Encoded) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt, pair.chosen, pair.rejected


def _start(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _end(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else "..." + text[-_SHOWN:])
