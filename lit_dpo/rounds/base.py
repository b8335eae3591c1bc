"""What all rounds share: prompts are sampled, completions judged, and all of it is written down so that it goes on."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import write_json
from lit_dpo.data.partition import Partition, Pool, Prompt
from lit_dpo.files import read_json
from lit_dpo.processes import rank_zero_info, rank_zero_only
from lit_dpo.rounds.journal import Lines
from lit_dpo.rounds.judges import Judge, checked
from lit_dpo.rounds.rows import Row
from lit_dpo.sampling import Sampler

RECORD = "round.json"
_IDENTITY = "round_options.json"


class Rounds(Partition):
    """Steps whose pairs the policy has a part in: a subclass says how, in `make`.

    It has what a subclass needs: `begin` refuses a round that was begun with other options, `sample` and `judged` write
    down what they get, a line a prompt, and ask for none of it again, `seconds` notes the time of a stage. The record
    of a round goes into `round.json`.

    Args:
        rounds: Steps, at least 1.
        sampler: How completions are drawn; its `round` is set to the step.
        judges: What scores them; they are closed at the end of a round, also after an error.
        min_pairs: A round that gives fewer pairs is an error, at least 1.

    Raises:
        ValueError: An option is out of its range.
    """

    other_reference: ClassVar[bool] = True

    def __init__(self, rounds: int, sampler: Sampler, judges: Sequence[Judge], min_pairs: int = 1) -> None:
        check(rounds=rounds, min_pairs=min_pairs)
        if not sampler.temperature > 0:
            raise ValueError(
                f"`temperature` of a round must be above 0, where completions differ, got {sampler.temperature}."
            )
        self.rounds, self.sampler, self.judges, self.min_pairs = rounds, sampler, tuple(judges), min_pairs
        self._seconds: dict[str, float] = {}

    def next(self, step: int, pool: Pool) -> list[Row] | None:
        """The pairs of a round.

        Raises:
            ValueError: There are too few prompts or pairs, a judge fails, or the round was begun with other options.
        """
        if step >= self.rounds:
            return None
        self._seconds = {}
        try:
            rows, record = self.make(step, pool)
        finally:
            for judge in self.judges:
                judge.close()
        record = {"round": step, **record, "pairs": len(rows), "seconds": self._seconds}
        if is_first():
            write_json(pool.folder / RECORD, record)
        if len(rows) < self.min_pairs:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in record["without_pair"].items())
            raise ValueError(
                f"Round {step} gives {len(rows)} pairs of {record['prompts']} prompts, fewer than `min_pairs`, which "
                f"is {self.min_pairs} (prompts without a pair: {reasons or 'none'}; completions with an end: "
                f"{record['finished']:.0%}): take easier or harder prompts, more samples or more `max_new_tokens`."
            )
        rank_zero_info(f"Round {step}: {len(rows)} pairs of {record['prompts']} prompts")
        return rows

    @abstractmethod
    def make(self, step: int, pool: Pool) -> tuple[list[Row], dict[str, Any]]:
        """The pairs of a round, as rows of a data file, and what is to be recorded of it.

        The record has at least `prompts` (their number), `finished` (share of completions with an end) and
        `without_pair` (why prompts gave no pair: reason -> number).
        """

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def begin(self, step: int, pool: Pool, **values: Any) -> None:
        """Note what decides a round besides its policy when it begins, and compare with that when it goes on.

        Args:
            step: Number of the round.
            pool: The pool; its folder holds the note.
            **values: Plain values besides the options of the sampler, such as the digest of the prompts.

        Raises:
            ValueError: The round was begun with others; a table of them is printed.
        """
        sampler = {name: value for name, value in vars(self.sampler).items() if name not in ("rows", "round")}
        identity = json.loads(json.dumps({"round": step, **sampler, **values}))
        _refuse_changes(pool.folder / _IDENTITY, identity)

    def sample(
        self,
        step: int,
        pool: Pool,
        prompts: Sequence[Prompt],
        sampler: Sampler | None = None,
        name: str = "completions",
    ) -> list[list[dict[str, Any]]]:
        """The completions of each prompt, as they are kept: `ids`, `text` and `finished`.

        Args:
            step: Number of the round.
            pool: The pool, whose policy completes.
            prompts: All different.
            sampler: Another one than the round's.
            name: Of the files that keep them.
        """
        journal = Lines(pool.folder, name, _rank())
        with self.seconds("sampling"):
            try:
                own = [n for n in pool.share(len(prompts)) if n not in journal.known]
                if own:
                    found = pool.complete([prompts[n] for n in own], replace(sampler or self.sampler, round=step))
                    for number, completions in zip(own, found, strict=True):
                        plain = [{"ids": list(c.ids), "text": c.text, "finished": c.finished} for c in completions]
                        journal.append(number, plain)
            finally:
                journal.close()
            known = pool.gathered(journal.known)
        return [known[n] for n in range(len(prompts))]

    def judged(
        self,
        pool: Pool,
        judge: Judge,
        prompts: Sequence[Prompt],
        texts: Sequence[Sequence[str]],
        name: str = "scores",
    ) -> list[list[float | None]]:
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
        journal = Lines(pool.folder, name, _rank())
        with self.seconds("judging"):
            try:
                own, size = [n for n in pool.share(len(prompts)) if n not in journal.known], judge.prompts_at_once
                for start in range(0, len(own), size):
                    some = own[start : start + size]
                    asked = [(prompts[n], text) for n in some for text in texts[n]]
                    said = judge.score([prompt for prompt, _ in asked], [text for _, text in asked]) if asked else []
                    waiting = iter(checked(said, len(asked)))
                    for n in some:
                        journal.append(n, [next(waiting) for _ in texts[n]])
            finally:
                journal.close()
            known = pool.gathered(journal.known)
        return [known[n] for n in range(len(prompts))]

    @contextmanager
    def seconds(self, stage: str) -> Iterator[None]:
        """Add the time that this context takes to that of a stage in the record."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start


def check(**values: int | None) -> None:
    """Refuse options that must be at least 1, unless they are `None`.

    Raises:
        ValueError: One is below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def _refuse_changes(path: Path, identity: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, identity)
        return
    known = read_json(path)
    names = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
    if not names:
        return
    table = Table("option", "the round", "this run", title="Changed since the round was begun")
    for name in names:
        table.add_row(name, str(known.get(name)), str(identity.get(name)))
    Console().print(table)
    raise ValueError(
        f"The round in `{path.parent}` was begun with another {', '.join(names)}: undo that, or start in a new folder."
    )
