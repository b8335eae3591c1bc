"""What a policy is worth: its rewards on pairs measured from a given model, and the truth about what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import support
import yaml
from claim import Results
from commands import Config, Record, digest, lines, lit_dpo, named, write

from lit_dpo.tools.compare import Difference, compare


def export(run: Path, beyond: float = 0.0, base: Path | None = None) -> Path:
    """The last policy of a run as a folder, extrapolated beyond it from a base if so asked."""
    folder = run / (f"beyond-{beyond:g}" if beyond else "policy")
    if not folder.exists():
        more = ["--extrapolate", str(beyond), "--base", str(base)] if beyond else []
        lit_dpo(["export", str(run / "checkpoints" / "last.ckpt"), str(folder), *more], run / "log.txt")
    return folder


def scores(policy: Path, base: Path, rows: Path, scale: str, **loss: Any) -> list[Record]:
    """What a folder's policy makes of pairs, its rewards measured from `base` whatever it was trained with.

    Args:
        policy: Folder.
        base: Folder of the model that rewards are measured from.
        rows: File of pairs.
        scale: As of `commands.settings`.
        loss: Options of `DPOLoss`, beta 1 by default, so that rewards are nats.
    """
    path = policy.parent / f"{policy.name}-{rows.stem}-{digest([str(base), loss])}.jsonl"
    if not path.exists():
        device = {"accelerator": "gpu", "precision": "bf16-mixed"} if scale == "gpu" else {"accelerator": "cpu"}
        config: Config = {
            "threads": 1,
            "model": {
                "model": str(policy),
                "loss": named("DPOLoss", **{"beta": 1.0, **loss}),
                "reference": named("FrozenReference", model=str(base)),
            },
            "data": {
                "train": [str(rows)], "predict": [str(rows)], "max_length": 512, "eval_batch_size": 64,
                "cache_tokens": False,
            },
            "trainer": {**device, "devices": 1, "enable_progress_bar": False, "logger": False},
        }  # fmt: skip
        write(path.with_suffix(".yaml"), yaml.safe_dump(config))
        words = ["predict", "--config", str(path.with_suffix(".yaml")), "--predictions", str(path)]
        lit_dpo([*words, "--trainer.default_root_dir", str(policy.parent)], policy.parent / "log.txt")
    return lines(path)


def accuracy(records: Sequence[Record]) -> float:
    """Share of pairs whose chosen reward is the higher one; a tie counts one half."""
    return mean(0.5 + 0.5 * ((r["margin"] > 0) - (r["margin"] < 0)) for r in records)


def replies(policy: Path, prompts: Path, samples: int = 1, temperature: float = 1.0, tokens: int = 48) -> list[Record]:
    """What a folder's policy says to the prompts of a file, by default one sample each, at temperature 1."""
    path = policy.parent / f"{policy.name}-said-{prompts.stem}-{samples}-{temperature:g}.jsonl"
    if not path.exists():
        words = ["sample", str(policy), "--prompts", str(prompts), "--count", "0", "--samples", str(samples)]
        words += ["--temperature", str(temperature), "--max_new_tokens", str(tokens), "--batch_size", "256"]
        lit_dpo([*words, "--jsonl", str(path)], policy.parent / "log.txt")
    return lines(path)


def quality(said: Sequence[Record]) -> float:
    """Share of the four parts that are good, over replies to prompts of the synthetic set."""
    return mean(support.score(each["prompt"], each["completion"]) / 4 for each in said)


def kept(records: Sequence[Record]) -> Record:
    """Of each pair what a comparison needs, short enough for a file of results."""
    wins = "".join("+-="[(row["margin"] <= 0) + (row["margin"] == 0)] for row in records)
    return {"wins": wins, "logps": " ".join(f"{row['logp_chosen']:.2f}" for row in records)}


def compared(results: Results, arms: Mapping[str, str]) -> list[Difference]:
    """Differences between arms over the same pairs and seeds, with corrected intervals, as `lit-dpo compare` has them.

    Args:
        results: Each record holds what `kept` gives.
        arms: Names to print, and the arms that they stand for.
    """
    sign = {"+": 1.0, "-": -1.0, "=": 0.0}
    runs = {
        name: [
            {
                f"{place}": {"margin": sign[won], "logp_chosen": float(logp)}
                for place, (won, logp) in enumerate(zip(one["wins"], one["logps"].split(), strict=True))
            }
            for one in results[arm]
        ]
        for name, arm in arms.items()
    }
    return [each for each in compare(runs) if each.what == "accuracy"]
