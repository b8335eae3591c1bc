"""The model card of an exported policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lit_dpo.extrapolate import Extrapolation


def model_card(options: Mapping[str, Any], facts: Mapping[str, Any], beyond: Extrapolation | None = None) -> str:
    """The text of `README.md` in the exported folder, in the form that the Hugging Face hub reads.

    Args:
        options: The module's hyperparameters: model, loss, reference, adapter, dtype and so on.
        facts: What a checkpoint says of its run: `data`, `step`, `step_layout`, `metrics`, `versions`.
        beyond: How the weights were changed after training.
    """
    model = options["model"]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["lit-dpo", "dpo", "preference-tuning"]}
    if isinstance(model, str):
        head["base_model"] = model
    settings = {
        "starting model": model,
        "loss": options["loss"],
        "reference": options["reference"] or "default",
        "adapter": options["adapter"] or "none: all weights trained",
        "dtype of the weights": options["dtype"],
        "code of the model's own": "ran while training (--trust-remote-code)"
        if options.get("trust_remote_code")
        else None,
        **{f"data, {name}": source for name, source in (facts.get("data") or {}).items() if source},
        "optimizer steps": facts.get("step"),
        "extrapolated": beyond and f"policy + {beyond.alpha} * (policy - base), base {beyond.base}",
        "pairs an optimizer step": (facts.get("step_layout") or {}).get("pairs_per_step"),
    }
    parts = [
        f"---\n{yaml.safe_dump(head)}---",
        "# A policy trained on preferences\n\nTrained with lit_dpo. Settings as the run had them:",
        _table({name: _shown(value) for name, value in settings.items() if value is not None}),
    ]
    if facts.get("metrics"):
        metrics = {name: f"{value:.4g}" for name, value in facts["metrics"].items()}
        when = ", before its weights were extrapolated" if beyond else ""
        parts += [f"Measured at the exported checkpoint{when}:", _table(metrics)]
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    return "\n\n".join([*parts, *([f"Versions: {versions}."] if versions else [])]) + "\n"


def _shown(value: Any) -> str:
    """A loss or reference as it would be written in Python, everything else as it prints."""
    if isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}:
        inside = ", ".join(f"{name}={_shown(option)}" for name, option in value["init_args"].items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)


def _table(values: Mapping[str, str]) -> str:
    rows = "".join(f"| {name} | `{value.replace('|', '/').replace('`', '')}` |\n" for name, value in values.items())
    return f"| | |\n|---|---|\n{rows}".rstrip()
