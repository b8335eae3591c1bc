"""Iterative DPO: each step trains on pairs of what the policy that starts it says."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import write_json
from lit_dpo.data.pair import RowError
from lit_dpo.data.partition import Partition, Pool, Prompt
from lit_dpo.data.prompts import read_prompts
from lit_dpo.data.read import read_rows
from lit_dpo.data.rows import parse_row
from lit_dpo.files import read_json
from lit_dpo.processes import rank_zero_info, rank_zero_only
from lit_dpo.rounds.journal import Lines
from lit_dpo.rounds.judges import Judge, checked
from lit_dpo.rounds.pickers import Candidate, Picker, RightVsWrong
from lit_dpo.sampling import Sampler

RECORD = "round.json"
_IDENTITY = "round_options.json"


class OnPolicy(Partition):
    """Rounds of pairs of the policy's own completions: sampled, judged and paired before each step (iterative DPO).

    A round is a step. The policy that starts it completes prompts, the judge scores the completions, the picker makes
    pairs of them, and the step trains on these. Completions without an end, empty ones, and those that say what an
    earlier one of their prompt says, are left out. The folder of the step keeps it all: `completions.RANK.jsonl`,
    `scores.RANK.jsonl`, `pairs.jsonl`, and `round.json`, which counts. A run that is stopped goes on behind the last
    prompt that was sampled or judged, and makes the same pairs as one that was not.

    The reference of a round is the policy that starts it, or the model of a `FrozenReference` that names one, such as
    the first. The pool of the data module is not trained on.

    Source: Xu et al., Some things are more cringe than others: iterative preference optimization with the pairwise
    cringe loss, https://arxiv.org/abs/2312.16682; Pang et al., Iterative reasoning preference optimization,
    https://arxiv.org/abs/2404.19733.

    Args:
        prompts: A data set of pairs, or of rows with a `prompt` alone; or a `.txt` file with a prompt a line. A prompt
            counts once, however often it stands there.
        judge: What scores completions.
        picker: What makes pairs of them.
        rounds: Steps, at least 1.
        prompts_per_round: Prompts of a round, in the order of the file; each round begins where the one before ended,
            and behind the last prompt comes the first. `None` takes all prompts in each round.
        min_pairs: A round that gives fewer pairs is an error, at least 1.
        samples: Completions of a prompt.
        temperature: Divides the logits, above 0.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a completion at most, its end included.
        seed: Of the random numbers of sampling.
        batch_size: Completions sampled at a time; it does not change them.

    Raises:
        ValueError: An option is out of its range.
    """

    other_reference: ClassVar[bool] = True

    def __init__(
        self,
        prompts: str,
        judge: Judge,
        picker: Picker = RightVsWrong(),  # noqa: B008 - frozen
        rounds: int = 1,
        prompts_per_round: int | None = None,
        min_pairs: int = 1,
        samples: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 512,
    ) -> None:
        for name, value in {"rounds": rounds, "prompts_per_round": prompts_per_round, "min_pairs": min_pairs}.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` of a round must be above 0, where completions differ, got {temperature}.")
        self.prompts, self.judge, self.picker, self.rounds = prompts, judge, picker, rounds
        self.prompts_per_round, self.min_pairs = prompts_per_round, min_pairs
        self.sampler = Sampler(samples, temperature, top_p, max_new_tokens, seed, rows=batch_size)

    def next(self, step: int, pool: Pool) -> list[dict[str, object]] | None:
        """The pairs of a round.

        Raises:
            ValueError: There are too few prompts or pairs, the judge fails, or the round was begun with other options.
        """
        if step >= self.rounds:
            return None
        prompts, chosen = self._round(step)
        try:
            _refuse_changes(pool.folder / _IDENTITY, self._identity(step, prompts, chosen))
            start = time.perf_counter()
            completions = self._sample(step, pool, prompts)
            sampled = time.perf_counter()
            rank_zero_info(f"Round {step}: {len(prompts)} prompts sampled in {sampled - start:.1f} s, judging")
            texts, counts = _candidates(completions, chosen)
            scores = self._judge(pool, prompts, texts)
            seconds = {"sampling": sampled - start, "judging": time.perf_counter() - sampled}
        finally:
            self.judge.close()
        rows, record = self._pairs(prompts, texts, scores, bool(chosen))
        record = {"round": step, "prompts": len(prompts), **counts, **record, "seconds": seconds}
        if is_first():
            write_json(pool.folder / RECORD, record)
        if len(rows) < self.min_pairs:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in record["without_pair"].items())
            raise ValueError(
                f"Round {step} gives {len(rows)} pairs of {len(prompts)} prompts, fewer than `min_pairs`, which is "
                f"{self.min_pairs} (prompts without a pair: {reasons or 'none'}; completions with an end: "
                f"{counts['finished']:.0%}): take easier or harder prompts, more samples or more `max_new_tokens`."
            )
        rank_zero_info(f"Round {step}: {len(rows)} pairs, {record['mixed']:.0%} of the prompts mixed")
        return rows

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _round(self, step: int) -> tuple[list[Prompt], list[str]]:
        """The prompts of a round, and their chosen answers if the picker wants them."""
        found: dict[str, tuple[Prompt, str | None]] = {}
        for prompt, answer in self._read():
            found.setdefault(json.dumps(prompt), (prompt, answer))
        count = len(found) if self.prompts_per_round is None else self.prompts_per_round
        if not found or count > len(found):
            raise ValueError(
                f"`{self.prompts}` holds {len(found)} different prompts, and a round takes {count or 'at least 1'}: "
                "give more, or lower `prompts_per_round`."
            )
        known, first = list(found.values()), step * count
        taken = [known[(first + n) % len(known)] for n in range(count)]
        return [prompt for prompt, _ in taken], [answer for _, answer in taken if answer is not None]

    def _read(self) -> Iterator[tuple[Prompt, str | None]]:
        if not self.picker.needs_chosen:
            yield from ((prompt.content, None) for prompt in read_prompts(self.prompts))  # type: ignore[misc]
            return
        for where, row in read_rows(self.prompts):
            pair = parse_row(row, self.prompts, where)
            said = pair.chosen if isinstance(pair.chosen, str) else pair.chosen[-1].get("content")
            if said is None or (not isinstance(pair.chosen, str) and len(pair.chosen) > 1):
                remedy = "leave the row out, or use a picker that needs no chosen answer"
                raise RowError(where, "chosen", "a chosen answer of several turns cannot be judged", remedy)
            yield pair.prompt, said  # type: ignore[misc]

    def _identity(self, step: int, prompts: Sequence[Prompt], chosen: Sequence[str]) -> dict[str, Any]:
        """What decides the pairs of a round besides its policy, as plain values."""
        sampler = {name: value for name, value in vars(self.sampler).items() if name not in ("rows", "round")}
        picker = {"picker": type(self.picker).__name__, **getattr(self.picker, "__dict__", {})}
        content = json.dumps([list(prompts), list(chosen)]).encode()
        values = {"round": step, "prompts": sha256(content).hexdigest(), **sampler, **picker, **self.judge.identity()}
        return dict(json.loads(json.dumps(values)))

    # -- completions and scores ---------------------------------------------------------------------------------------

    def _sample(self, step: int, pool: Pool, prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """The completions of each prompt as the journals hold them."""
        journal = Lines(pool.folder, "completions", _rank())
        try:
            own = [n for n in pool.share(len(prompts)) if n not in journal.known]
            if own:
                found = pool.complete([prompts[n] for n in own], replace(self.sampler, round=step))
                for number, completions in zip(own, found, strict=True):
                    plain = [{"ids": list(c.ids), "text": c.text, "finished": c.finished} for c in completions]
                    journal.append(number, plain)
        finally:
            journal.close()
        known = pool.gathered(journal.known)
        return [known[n] for n in range(len(prompts))]

    def _judge(self, pool: Pool, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """The scores of each prompt's completions, those of its chosen answer last."""
        journal = Lines(pool.folder, "scores", _rank())
        try:
            own, size = [n for n in pool.share(len(prompts)) if n not in journal.known], self.judge.prompts_at_once
            for start in range(0, len(own), size):
                some = own[start : start + size]
                asked = [(prompts[n], text) for n in some for text in texts[n]]
                said = self.judge.score([prompt for prompt, _ in asked], [text for _, text in asked]) if asked else []
                waiting = iter(checked(said, len(asked)))
                for n in some:
                    journal.append(n, [next(waiting) for _ in texts[n]])
        finally:
            journal.close()
        known = pool.gathered(journal.known)
        return [known[n] for n in range(len(prompts))]

    # -- pairs --------------------------------------------------------------------------------------------------------

    def _pairs(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float | None]],
        chosen: bool,
    ) -> tuple[list[dict[str, object]], dict[str, Any]]:
        """Rows as a data file has them, and what is to be counted of them."""
        rows: list[dict[str, object]] = []
        reasons: Counter[str] = Counter()
        mixed = silent = 0
        for prompt, said, given in zip(prompts, texts, scores, strict=True):
            silent += sum(score is None for score in given)
            judged = [
                None if score is None else Candidate(text, score) for text, score in zip(said, given, strict=True)
            ]
            gold = judged.pop() if chosen else None
            candidates = [one for one in judged if one is not None]
            mixed += len({one.score for one in candidates}) > 1
            picked = self.picker.pick(candidates, gold)
            if isinstance(picked, str):
                reasons[picked] += 1
                continue
            rows += [_row(prompt, better.text, worse.text) for better, worse in picked]
        return rows, {
            "no_opinion": silent,
            "mixed": mixed / len(prompts),
            "pairs": len(rows),
            "without_pair": dict(sorted(reasons.items())),
        }


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def _candidates(
    completions: Sequence[Sequence[Mapping[str, Any]]], chosen: Sequence[str]
) -> tuple[list[list[str]], dict[str, Any]]:
    """What is judged of each prompt: completions with an end, not empty, all different; then its chosen answer."""
    texts: list[list[str]] = []
    total = finished = empty = duplicates = 0
    for number, found in enumerate(completions):
        ended = [one["text"] for one in found if one["finished"]]
        said = [text for text in ended if text.strip()]
        different = list(dict.fromkeys(said))
        total, finished = total + len(found), finished + len(ended)
        empty, duplicates = empty + len(ended) - len(said), duplicates + len(said) - len(different)
        texts.append([*different, *chosen[number : number + 1]])
    return texts, {"completions": total, "finished": finished / total, "empty": empty, "duplicates": duplicates}


def _row(prompt: Prompt, better: str, worse: str) -> dict[str, object]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": better, "rejected": worse}
    sides = {"chosen": better, "rejected": worse}
    return {name: [*prompt, {"role": "assistant", "content": text}] for name, text in sides.items()}


def _refuse_changes(path: Path, identity: dict[str, Any]) -> None:
    """Note what decides a round when it begins, and compare with that when it goes on."""
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
