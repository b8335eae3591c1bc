"""What all rounds share: prompts are sampled, completions judged, and all of it is written down so that it goes on."""

from __future__ import annotations

import time
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import naming, write_json
from lit_dpo.data.opening import Opening
from lit_dpo.data.partition import Partition, Pool, Prompt
from lit_dpo.data.streams import Each, those
from lit_dpo.files import read_json
from lit_dpo.processes import rank_zero_info, rank_zero_only, rank_zero_warn
from lit_dpo.rounds import measured
from lit_dpo.rounds.identity import begin
from lit_dpo.rounds.journal import Lines
from lit_dpo.rounds.judges import Judge, checked
from lit_dpo.rounds.progress import progress
from lit_dpo.rounds.rows import Row
from lit_dpo.sampling import Sampler

RECORD = "round.json"


class Rounds(Partition):
    """Steps whose pairs the policy has a part in: a subclass says how, in `make`.

    It has what a subclass needs: `begin` refuses a round that was begun with other options, `sample` and `judged` write
    down what they get, a line a prompt, and ask for none of it again, `seconds` notes the time of a stage. The record
    of a round goes into `round.json`.

    Attributes:
        remedy: What to do about too few pairs.

    Args:
        rounds: Steps, at least 1.
        sampler: How completions are drawn; its `round` is set to the step.
        judges: What scores them; they are closed at the end of a round, also after an error.
        min_pairs: A round that gives fewer pairs is an error, at least 1.
        greedy_prompts: Prompts whose likeliest completions the first judge scores at the start of each round and after
            the last one.
        trusted: Pairs whose label is trusted, which the first judge is compared with in each round.

    Raises:
        ValueError: An option is out of its range.
    """

    other_reference: ClassVar[bool] = True
    remedy: ClassVar[str] = "take easier or harder prompts, more samples or more `max_new_tokens`"

    def __init__(
        self,
        rounds: int,
        sampler: Sampler,
        judges: Sequence[Judge],
        min_pairs: int = 1,
        greedy_prompts: str | None = None,
        trusted: str | None = None,
    ) -> None:
        check(rounds=rounds, min_pairs=min_pairs)
        if not sampler.temperature > 0:
            raise ValueError(
                f"`temperature` of a round must be above 0, where completions differ, got {sampler.temperature}."
            )
        self.rounds, self.sampler, self.judges, self.min_pairs = rounds, sampler, tuple(judges), min_pairs
        self.greedy_prompts, self.trusted = greedy_prompts, trusted
        self._seconds: dict[str, float] = {}
        self._looking = False  # whether a round is only compared with what it was begun with

    def next(self, step: int, pool: Pool) -> Sequence[Row] | None:
        """The pairs of a round.

        Raises:
            ValueError: There are too few prompts or pairs, a judge fails, or the round was begun with other options.
            OSError: The disk is full.
        """
        self._seconds = {}
        if step >= self.rounds:
            if step and self.greedy_prompts is not None:
                self._after(step, pool)
            return None
        fixed = measured.Fixed.read(self.greedy_prompts, self.trusted)  # a mistake there must not show after hours
        with naming(pool.folder, "what was sampled and judged is kept"):
            try:
                self._prepare(step, pool)
                rows, record = self.make(step, pool)
                record |= self._measured(step, pool, fixed)
            finally:
                self._close()
            record = {"round": step, **record, "pairs": len(rows), "seconds": self._seconds}
            if is_first():
                write_json(pool.folder / RECORD, record)
        if len(rows) < self.min_pairs:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in record["without_pair"].items())
            raise ValueError(
                f"Round {step} gives {len(rows)} pairs of {record['prompts']} prompts, fewer than `min_pairs`, which "
                f"is {self.min_pairs} (prompts without a pair: {reasons or 'none'}; completions with an end: "
                f"{record['finished']:.0%}): {self.remedy}."
            )
        rank_zero_info(f"Round {step}: {len(rows)} pairs of {record['prompts']} prompts")
        return rows

    def resumed(self, step: int, pool: Pool) -> None:
        """Compare a round whose pairs are written with what this run would make.

        Raises:
            ValueError: It was made with other prompts, options, or another judge.
        """
        if step >= self.rounds:
            raise ValueError(
                f"`rounds` is {self.rounds}, and `{pool.folder}` holds a further round: raise it, or start in a new "
                "folder."
            )
        self._looking = True
        try:
            self._prepare(step, pool)
            self.make(step, pool)
        except _Unchanged:
            pass
        finally:
            self._looking = False
            self._close()

    def _measured(self, step: int, pool: Pool, fixed: measured.Fixed) -> dict[str, Any]:
        """What is to be recorded of a round besides its pairs."""
        found: dict[str, Any] = {}
        made, self._seconds = self._seconds, {}
        start = time.perf_counter()
        if fixed.prompts:
            found["greedy"] = measured.greedy(self, step, pool, fixed.prompts)
        if fixed.pairs:
            now = found["trusted"] = measured.agreement(self, pool, fixed.pairs)
            before = (
                read_json(path).get("trusted")
                if step and (path := pool.at(step - 1).folder / RECORD).exists()
                else None
            )
            if before and measured.got_worse(before, now):
                rank_zero_warn(
                    f"Round {step}: the judge agrees with {now['share']:.0%} of the trusted pairs, and did with "
                    f"{before['share']:.0%} in the round before: it got worse."
                )
        self._seconds = {**made, "measuring": time.perf_counter() - start} if found else made
        return found

    def _after(self, step: int, pool: Pool) -> None:
        """Measure what came of the last round, and add that to its record."""
        earlier = pool.at(step - 1)
        path = earlier.folder / RECORD
        record = read_json(path) if path.exists() else {}
        if "greedy_after" in record:
            return
        prompts = measured.Fixed.read(self.greedy_prompts, None).prompts
        with naming(earlier.folder, "the policy is trained and exported"):
            try:
                self._prepare(step, pool)
                record["greedy_after"] = measured.greedy(self, step, earlier, prompts)
            finally:
                self._close()
            if is_first():
                write_json(path, record)

    def _prepare(self, step: int, pool: Pool) -> None:
        for judge in self.judges:
            judge.prepare(step, pool)

    def _close(self) -> None:
        for judge in self.judges:
            judge.close()

    @abstractmethod
    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """The pairs of a round, as rows of a data file, and what is to be recorded of it.

        The record has at least `prompts` (their number), `finished` (share of completions with an end) and
        `without_pair` (why prompts gave no pair: reason -> number).
        """

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def begin(self, step: int, pool: Pool, **values: Any) -> None:
        """Note what decides a round when it begins, and compare with that when it goes on.

        It comes first in `make`: of a round whose pairs are written, nothing behind it is done.

        Args:
            step: Number of the round.
            pool: The pool; its folder holds the note.
            **values: Plain values besides the options of the sampler, such as the digest of the prompts.

        Raises:
            ValueError: The round was begun with others; a table of them is printed.
        """
        left_out = ("rows", "round", "engine")
        sampler = {name: value for name, value in vars(self.sampler).items() if name not in left_out}
        if self.sampler.engine is not None:
            sampler["engine"] = type(self.sampler.engine).__name__
        begin(pool.folder, {"round": step, **pool.policy, **sampler, **values}, pool.allow_changes)
        if self._looking:
            raise _Unchanged

    def sample(
        self,
        step: int,
        pool: Pool,
        prompts: Sequence[Prompt | Opening],
        sampler: Sampler | None = None,
        name: str = "completions",
    ) -> Sequence[list[dict[str, Any]]]:
        """The completions of each prompt, as they are kept: `ids`, `text` and `finished`.

        Args:
            step: Number of the round.
            pool: The pool, whose policy completes.
            prompts: All different.
            sampler: Another one than the round's.
            name: Of the files that keep them.
        """
        journal = Lines(pool.folder, name, own_rank())
        with self.seconds("sampling"):
            try:
                own = array("q", (n for n in pool.share(len(prompts)) if n not in journal))
                if own:
                    found = pool.complete(those(own, prompts), replace(sampler or self.sampler, round=step))
                    with progress("Sampling", len(own), pool.progress) as advance:
                        for number, completions in zip(own, found, strict=True):
                            plain = [{"ids": list(c.ids), "text": c.text, "finished": c.finished} for c in completions]
                            journal.append(number, plain)
                            advance(1, len(plain))
            finally:
                journal.close()
            _together(pool, journal, len(prompts))
        return Each(len(prompts), journal.__getitem__)

    def judged(
        self,
        pool: Pool,
        judge: Judge,
        prompts: Sequence[Prompt],
        texts: Sequence[Sequence[str]],
        name: str = "scores",
    ) -> Sequence[list[float | None]]:
        """What a judge says of the texts of each prompt.

        Args:
            pool: The pool.
            judge: Who is asked.
            prompts: The prompts.
            texts: For each of them what is judged.
            name: Of the files that keep the scores; each judge of a round has its own.

        Raises:
            JudgeError: The judge fails.
        """
        journal = Lines(pool.folder, name, own_rank())
        with self.seconds("judging"):
            try:
                own, size = array("q", (n for n in pool.share(len(prompts)) if n not in journal)), judge.prompts_at_once
                with progress("Judging", len(own), pool.progress) as advance:
                    for start in range(0, len(own), size):
                        some = {n: texts[n] for n in own[start : start + size]}
                        asked = [(prompts[n], text) for n, said in some.items() for text in said]
                        found = judge.score(*map(list, zip(*asked, strict=True))) if asked else []
                        waiting = iter(checked(found, len(asked)))
                        for n, said in some.items():
                            journal.append(n, [next(waiting) for _ in said])
                        advance(len(some), len(asked))
            finally:
                journal.close()
            _together(pool, journal, len(prompts))
        return Each(len(prompts), journal.__getitem__)

    @contextmanager
    def seconds(self, stage: str) -> Iterator[None]:
        """Add the time that this context takes to that of a stage in the record."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start


class _Unchanged(Exception):  # noqa: N818 - it ends a comparison, and is no error
    """A round is what it was begun as."""


def _together(pool: Pool, journal: Lines, count: int) -> None:
    """Have in a journal what all processes have written."""
    pool.gathered({})  # they wait for each other
    journal.refresh()
    if len(journal) < count:
        raise ValueError(
            f"`{journal.path.parent}` has {len(journal)} of {count} prompts when all processes are done: give them "
            "one folder that they share."
        )


def check(**values: int | None) -> None:
    """Refuse options that must be at least 1, unless they are `None`.

    Raises:
        ValueError: One is below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def own_rank() -> int:
    """Number of this process among those of the run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)
