"""Which completions of a prompt become pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar


@dataclass(frozen=True)
class Candidate:
    """A completion that may become a side of a pair.

    Args:
        text: What the policy said.
        score: What the judge says of it; a larger one is better.
    """

    text: str
    score: float


class Picker(ABC):
    """Says which completions of a prompt become pairs.

    Attributes:
        needs_chosen: Whether it compares with the chosen answer of the data set, which is then judged too.
    """

    needs_chosen: ClassVar[bool] = False

    @abstractmethod
    def pick(
        self, candidates: Sequence[Candidate], chosen: Candidate | None = None
    ) -> list[tuple[Candidate, Candidate]] | str:
        """The pairs of a prompt.

        Args:
            candidates: Its completions: finished, not empty, all different, in the order of sampling.
            chosen: The chosen answer of the data set, for a picker that needs it.

        Returns:
            Pairs of a better and a worse completion, at least one; or the reason why there is none, in a few words.
        """


@dataclass(frozen=True)
class RightVsWrong(Picker):
    """Right completions against wrong ones, the first of both first: for a judge that knows which is which.

    >>> RightVsWrong().pick([Candidate("5", 0.0), Candidate("4", 1.0)])
    [(Candidate(text='4', score=1.0), Candidate(text='5', score=0.0))]

    Args:
        threshold: A score above it is right.
        most: Pairs of a prompt at most; no completion is in two of them.

    Raises:
        ValueError: An option is out of its range.
    """

    threshold: float = 0.5
    most: int = 1

    def __post_init__(self) -> None:
        _check(self.most)

    def pick(
        self, candidates: Sequence[Candidate], chosen: Candidate | None = None
    ) -> list[tuple[Candidate, Candidate]] | str:
        """The first right one against the first wrong one, and so on."""
        right = [one for one in candidates if one.score > self.threshold]
        wrong = [one for one in candidates if not one.score > self.threshold]
        if not right or not wrong:
            return "no completion" if not candidates else "all wrong" if not right else "all right"
        return list(zip(right, wrong, strict=False))[: self.most]


@dataclass(frozen=True)
class BestVsWorst(Picker):
    """The best completion against the worst one: for a judge whose scores are degrees.

    Args:
        gap: Their scores must differ by more than this, which is at least 0.
        floor: The best score must be at least this. A learned judge should have one: without it, prompts that the
            policy never answers well give pairs of two bad completions.

    Raises:
        ValueError: `gap` is negative.
    """

    gap: float = 0.0
    floor: float | None = None

    def __post_init__(self) -> None:
        _check(gap=self.gap)

    def pick(
        self, candidates: Sequence[Candidate], chosen: Candidate | None = None
    ) -> list[tuple[Candidate, Candidate]] | str:
        """One pair; of equal scores the one sampled first."""
        if len(candidates) < 2:
            return "fewer than two completions"
        best, worst = max(candidates, key=lambda one: one.score), min(candidates, key=lambda one: one.score)
        if self.floor is not None and best.score < self.floor:
            return "best below the floor"
        return [(best, worst)] if best.score - worst.score > self.gap else "gap too small"


@dataclass(frozen=True)
class ChosenVsSample(Picker):
    """The chosen answer of the data set against completions of the policy.

    A prompt whose chosen answer scores less than a completion is left out, as in filtered DPO
    (https://arxiv.org/abs/2404.13846).

    Args:
        gap: The scores must differ by more than this, which is at least 0.
        most: Pairs of a prompt at most, those of the completions sampled first.

    Raises:
        ValueError: An option is out of its range.
    """

    gap: float = 0.0
    most: int = 1
    needs_chosen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.most, self.gap)

    def pick(
        self, candidates: Sequence[Candidate], chosen: Candidate | None = None
    ) -> list[tuple[Candidate, Candidate]] | str:
        """Pairs whose first side is `chosen`."""
        others = [one for one in candidates if chosen is not None and one.text != chosen.text]
        if chosen is None or not others:
            return "no completion"
        if any(one.score > chosen.score for one in others):
            return "a sample beats the chosen answer"
        found = [(chosen, one) for one in others if chosen.score - one.score > self.gap]
        return found[: self.most] or "gap too small"


@dataclass(frozen=True)
class AllPairs(Picker):
    """Every two completions whose scores differ by enough, the largest difference first.

    Args:
        gap: The scores must differ by more than this, which is at least 0.
        most: Pairs of a prompt at most; `None` for all.

    Raises:
        ValueError: An option is out of its range.
    """

    gap: float = 0.0
    most: int | None = None

    def __post_init__(self) -> None:
        _check(self.most, self.gap)

    def pick(
        self, candidates: Sequence[Candidate], chosen: Candidate | None = None
    ) -> list[tuple[Candidate, Candidate]] | str:
        """The pairs; of equal differences those sampled first."""
        if len(candidates) < 2:
            return "fewer than two completions"
        ordered = (sorted(two, key=lambda one: -one.score) for two in combinations(candidates, 2))
        found = [(better, worse) for better, worse in ordered if better.score - worse.score > self.gap]
        found.sort(key=lambda pair: pair[1].score - pair[0].score)
        return found[: self.most] or "gap too small"


def _check(most: int | None = None, gap: float = 0.0) -> None:
    if most is not None and most < 1:
        raise ValueError(f"`most` must be at least 1, got {most}.")
    if not gap >= 0:
        raise ValueError(f"`gap` must be at least 0, got {gap}.")
