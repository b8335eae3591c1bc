"""D2PO: a few pairs of the policy's get gold labels, a discriminator learns from them, and labels the others."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lit_dpo.checkpoints.claim import is_first
from lit_dpo.checkpoints.durable import replace_file
from lit_dpo.data.partition import Pool, Prompt
from lit_dpo.data.streams import Streamed, those
from lit_dpo.files import read_json
from lit_dpo.processes import rank_zero_info, rank_zero_warn
from lit_dpo.rounds.base import RECORD, Rounds, check, own_rank
from lit_dpo.rounds.discriminator import AGREEMENT, Discriminator, Labelled
from lit_dpo.rounds.judges import Judge
from lit_dpo.rounds.pickers import BestVsWorst
from lit_dpo.rounds.rows import Row, digest_of, picked, prompts_of, said_of
from lit_dpo.sampling import Sampler
from lit_dpo.vllm_engine import VLLM

_GOLD, _FOLDER = "gold.jsonl", "discriminator"


class Discriminated(Rounds):
    """Rounds of the policy's own pairs, a few with gold labels, the others labelled by what learns from these (D2PO).

    A round is a step. The policy that starts it completes each prompt twice. The first `gold_per_round` prompts with
    two different completions go to the gold judge, which is the expensive one. A discriminator is trained anew on all
    pairs of this and earlier rounds that have a gold label, and labels the completions of the other prompts. The step
    trains on the pairs of this round, with gold labels and without.

    `gold.jsonl` in the folder of a step holds all labelled pairs so far, `discriminator` what was trained on them, a
    reward model. `round.json` has its agreement with held-out gold labels, by cross-validation; a warning tells of one
    no better than chance, or worse than in the round before. A run that is stopped goes on with the gold labels and the
    discriminator that it has, and makes the same pairs as one that was not. Of the gold judge it asks again at most
    what was under way. The reference is as in `OnPolicy`.

    Source: Singhal et al., D2PO: discriminator-guided DPO with response evaluation models,
    https://arxiv.org/abs/2405.01511: 256 pairs a round, 16 gold labels, beta 0.05, batches of 32.

    Args:
        prompts: A data set of pairs, or of rows with a `prompt` alone; or a `.txt` file with a prompt a line. A prompt
            counts once, however often it stands there.
        gold: The judge that is to be trusted: a verifier, a reward model, a command.
        discriminator: What learns from it; `None` is a `Discriminator` with the settings of the paper.
        rounds: Steps, at least 1.
        prompts_per_round: Prompts of a round, in the order of the file; each round begins where the one before ended,
            and behind the last prompt comes the first.
        gold_per_round: Most prompts of a round whose two completions the gold judge scores, at least 1.
        gap: Scores of a pair must differ by more than this, which is at least 0.
        min_pairs: A round that gives fewer pairs is an error, at least 1.
        temperature: Divides the logits, above 0.
        top_p: Draw among the fewest most likely tokens whose probabilities sum to this.
        max_new_tokens: Tokens of a completion at most, its end included.
        seed: Of the random numbers of sampling.
        batch_size: Completions sampled at a time; it does not change them.
        engine: `VLLM` samples with vLLM, which is less exact; by default transformers does.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        prompts: str,
        gold: Judge,
        discriminator: Discriminator | None = None,
        rounds: int = 1,
        prompts_per_round: int = 256,
        gold_per_round: int = 16,
        gap: float = 0.0,
        min_pairs: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 512,
        engine: VLLM | None = None,
    ) -> None:
        sampler = Sampler(2, temperature, top_p, max_new_tokens, seed, rows=batch_size, engine=engine)
        self.discriminator = discriminator or Discriminator()
        super().__init__(rounds, sampler, [gold, self.discriminator], min_pairs)
        check(prompts_per_round=prompts_per_round, gold_per_round=gold_per_round)
        self.prompts, self.gold, self.picker = prompts, gold, BestVsWorst(gap)
        self.prompts_per_round, self.gold_per_round = prompts_per_round, gold_per_round

    def make(self, step: int, pool: Pool) -> tuple[Sequence[Row], dict[str, Any]]:
        """Pairs with gold labels, pairs with those of the discriminator, and what is counted of both."""
        prompts, _ = prompts_of(self.prompts, step, self.prompts_per_round)
        known = _read(pool.folder_of(step - 1) / _GOLD) if step else []
        options = {"partition": "Discriminated", "gold_per_round": self.gold_per_round, "gap": self.picker.gap}
        who = {"gold": self.gold.identity(), **self.discriminator.identity()}
        self.begin(step, pool, prompts=digest_of(prompts), gold_before=digest_of(known), **options, **who)
        texts, counts = said_of(self.sample(step, pool, prompts))
        two = array("q", (n for n, said in enumerate(texts) if len(said) == 2))
        asked, rest = two[: self.gold_per_round], two[self.gold_per_round :]
        labels = self._picked(pool, self.gold, asked, prompts, texts, "gold")
        labelled = [*known, *_pairs(labels[0])]
        if len(labelled) < 2:
            why = ", ".join(f"{reason}: {count}" for reason, count in labels[1]["without_pair"].items())
            raise ValueError(
                f"Round {step} has {len(labelled)} pairs with a gold label, of {len(asked)} that were asked for "
                f"({why or 'nothing to ask for'}; completions with an end: {counts['finished']:.0%}), and a "
                "discriminator needs 2: raise `gold_per_round`, or take prompts whose completions differ."
            )
        if is_first():
            with replace_file(pool.folder / _GOLD) as file:
                file.write("".join(f"{json.dumps(pair)}\n" for pair in labelled).encode())
        agreement, of = self._trained(step, pool, labelled)
        silver = self._picked(pool, self.discriminator, rest, prompts, texts, "scores")
        reasons = {"no two different completions": len(prompts) - len(two)}
        for name, (_, told) in {"gold": labels, "discriminator": silver}.items():
            reasons |= {f"{name}: {reason}": count for reason, count in told["without_pair"].items()}
        pairs = labels[0], silver[0]
        return Streamed(sum(map(len, pairs)), lambda: chain(*pairs)), {
            "prompts": len(prompts),
            **counts,
            "gold_asked": len(asked),
            "gold_pairs": len(labels[0]),
            "gold_pairs_so_far": len(labelled),
            "agreement": agreement,
            "agreement_of": of,
            "no_opinion": labels[1]["no_opinion"] + silver[1]["no_opinion"],
            "without_pair": {reason: count for reason, count in reasons.items() if count},
        }

    def _picked(
        self,
        pool: Pool,
        judge: Judge,
        numbers: Sequence[int],
        prompts: Sequence[Prompt],
        texts: Sequence[list[str]],
        name: str,
    ) -> tuple[Sequence[Row], dict[str, Any]]:
        """The pairs of some prompts by a judge, and counts."""
        if not numbers:
            return [], {"no_opinion": 0, "without_pair": {}}
        some, said = those(numbers, prompts), those(numbers, texts)
        return picked(self.picker, some, said, self.judged(pool, judge, some, said, name))

    def _trained(self, step: int, pool: Pool, labelled: list[Labelled]) -> tuple[float, int]:
        """Have a discriminator that has learned from all labelled pairs; its agreement with held-out labels.

        Processes that are connected share what the first one trains, so that all of them label alike.
        """
        folder = pool.folder / _FOLDER
        alone = len(pool.share(2)) == 2
        if any(pool.gathered({own_rank(): (folder / AGREEMENT).exists()}).values()):  # before one writes it
            return self._load(folder)
        if is_first() and folder.exists():
            raise FileExistsError(f"`{folder}` holds something that is no discriminator of this round: move it away.")
        with self.seconds("training the discriminator"):
            if is_first() or alone:
                agreement, of = self.discriminator.fit(labelled, pool.model(0))
            if is_first():
                self.discriminator.save(folder, {"agreement": agreement, "of": of})
            pool.gathered({})  # the others wait for the first
            if not (is_first() or alone):
                agreement, of = self._load(folder)
        told = f"The discriminator of round {step} agrees with {agreement:.0%} of {of} held-out gold labels"
        before = read_json(pool.folder_of(step - 1) / RECORD).get("agreement") if step else None
        if agreement <= 0.5:
            rank_zero_warn(f"{told}, no better than chance: its labels are of no use; give more gold labels.")
        elif before is not None and agreement < before:
            rank_zero_warn(f"{told}, {before:.0%} in the round before: give more gold labels, or stop here.")
        else:
            rank_zero_info(f"{told}.")
        return agreement, of

    def _load(self, folder: Path) -> tuple[float, int]:
        found = read_json(folder / AGREEMENT)
        self.discriminator.load(folder)
        return float(found["agreement"]), int(found["of"])


def _pairs(rows: Sequence[Row]) -> list[Labelled]:
    """Rows as a prompt and the texts of its better and its worse completion."""
    found: list[Labelled] = []
    for row in rows:
        better: Any = row["chosen"]
        worse: Any = row["rejected"]
        if "prompt" in row:
            found.append((row["prompt"], better, worse))  # type: ignore[arg-type]
        else:
            found.append((better[:-1], better[-1]["content"], worse[-1]["content"]))
    return found


def _read(path: Path) -> list[Labelled]:
    """The labelled pairs of the round before."""
    if not path.exists():
        raise ValueError(f"`{path}` is missing, which holds the gold labels of the rounds before: restore it.")
    return [tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
