"""What `lit-dpo check` says of what a run is given, before anything is computed: data, tokenizer, settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lit_dpo.data import PreferenceDataModule
from lit_dpo.module import PreferenceModule
from lit_dpo.tools.before import special_ids
from lit_dpo.tools.plan import Plan

_LOOKED_AT = 500  # rows whose ends are looked at


@dataclass(frozen=True)
class Finding:
    """What was found out about a run.

    Args:
        level: `fine`, `warning`, `fails`, or `estimate` for what it will take.
        text: In words, with numbers, and with a remedy where one is needed.
    """

    level: str
    text: str


def about_data(module: PreferenceModule, data: PreferenceDataModule, plan: Plan) -> Iterator[Finding]:
    """The rows, the steps they are divided into, the tokenizer, and where completions end."""
    training, tokenizer = data.training.dataset, module.tokenizer
    account = training.report.splitlines()[0] if training.report else f"{len(training)} pairs"
    yield Finding("fine", f"data: {account}; {len(data.training.rows)} pairs are trained on")
    if data.stepwise:
        yield _steps(type(data.partition).__name__, plan)
    template = "a chat template" if data.chat_template or tokenizer.chat_template else "no chat template"
    yield Finding("fine", f"tokenizer: {len(tokenizer)} tokens, EOS {tokenizer.eos_token!r}, {template}")
    rows = data.training.rows[:_LOOKED_AT].tolist()
    if not data.append_eos:
        remedy = "set `--data.append_eos true`, unless a chat template ends its turns"
        yield Finding("warning", f"no EOS is appended, so that nothing may teach the model where to end: {remedy}")
    special = special_ids(tokenizer)
    sides = [side for row in rows for side in training.pair(row)[1:]]
    ended = sum(not special.isdisjoint(i if i >= 0 else ~i for i in side[-3:]) for side in sides) / len(sides)
    if ended < 0.5:
        remedy = "raise `--data.max_length`, or keep `append_eos`"
        text = f"only {ended:.0%} of the completions looked at end with a special token, the others are cut or open"
        yield Finding("warning", f"{text}, so that the model may learn not to end: {remedy}")
    else:
        yield Finding("fine", f"{ended:.0%} of the completions looked at end with a special token")
    lengths = training.lengths[data.training.rows]
    cut = float((lengths[:, 0] + lengths[:, 1:].amax(1) >= data.max_length).double().mean())
    if cut > 0.2:
        yield Finding("warning", f"{cut:.0%} of the pairs are as long as `max_length` {data.max_length}: raise it")


def _steps(partition: str, plan: Plan) -> Finding:
    if not plan.known:
        text = (
            f"steps: `{partition}` divides or makes the pairs as training goes on, so that all pairs are taken as one"
        )
        return Finding("estimate", f"{text} step here; what it takes to score, sample and judge is not in the time")
    few, many = min(plan.pairs), max(plan.pairs)
    each = f"{few:,} to {many:,} pairs" if few < many else f"{few:,} pairs"
    return Finding("fine", f"steps: `{partition}` makes {len(plan.pairs)}, each of {each}; the estimates are for all")


def about_settings(module: PreferenceModule, trainer: Trainer) -> Iterator[Finding]:
    """What is known to fail often, and what is measured otherwise than it will be."""
    if "16" in str(trainer.precision) and "bf16" not in str(trainer.precision):
        remedy = "use `--trainer.precision bf16-mixed`"
        yield Finding("warning", f"float16 overflows where log-probs of long texts are summed: {remedy}")
    if module.dtype_name == "float16":
        yield Finding("warning", "float16 weights overflow and hardly move: set `--model.dtype float32`")
    if module.dtype_name == "bfloat16" and module.adapter is None:
        remedy = "set `--model.dtype float32` and `--trainer.precision bf16-mixed`"
        yield Finding("warning", f"bfloat16 weights do not move at the usual learning rates: {remedy}")
    if trainer.world_size > 1:
        text = f"measured on one of {trainer.world_size} processes, without what they send each other"
        yield Finding("estimate", f"{text}; of a sharded model each takes less memory than is said here")
