"""The model card of an exported policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_dpo.extrapolate import Extrapolation


def model_card(
    options: Mapping[str, Any], facts: Mapping[str, Any], made: str = "", beyond: Extrapolation | None = None
) -> str:
    """The text of `README.md` in the exported folder, in the form that the Hugging Face hub reads.

    Args:
        options: The module's hyperparameters: model, loss, reference, adapter, dtype and so on.
        facts: What a checkpoint says of its run: `data`, `step`, `step_layout`, `metrics`, `versions`.
        made: How it was made; see `how_made`.
        beyond: How the weights were changed after training.
    """
    model = options["model"]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["lit-dpo", "dpo", "preference-tuning"]}
    if (base := _base(model)) is not None:
        head["base_model"] = base
    if sources := _hub_names(facts.get("data") or {}):
        head["datasets"] = sources
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
    parts += [made] if made else []
    return "\n\n".join([*parts, *([f"Versions: {versions}."] if versions else [])]) + "\n"


def how_made(config: Path | None, *commands: str) -> str:
    """The commands that made an export, with the configuration of its run, as Markdown.

    Args:
        config: The run's `config.yaml`, with every setting of the run; `None` if it is not known.
        commands: Those behind the training.
    """
    text = ""
    if config is not None and config.is_file() and config.stat().st_size <= _LONGEST_CONFIG:
        text = config.read_text(encoding="utf-8", errors="replace").strip()
    known = bool(text) and "```" not in text  # which would end the block
    lines = "\n".join([*(["lit-dpo fit --config config.yaml"] if known else []), *commands])
    parts = [f"Made by these commands:\n\n```bash\n{lines}\n```"] if lines else []
    return "\n\n".join([*parts, *([f"`config.yaml`:\n\n```yaml\n{text}\n```"] if known else [])])


def _base(model: object) -> str | None:
    """The name that the hub may know the starting model by; that of an export of ours is the one it started from."""
    if not isinstance(model, str):
        return None
    if not Path(model).exists():
        return model if _HUB_NAME.fullmatch(model) else None
    card = Path(model) / "README.md"
    if not card.is_file() or card.stat().st_size > _LONGEST_CONFIG:
        return None
    try:
        head = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
        base = head.get("base_model")
    except (IndexError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return base if isinstance(base, str) and _HUB_NAME.fullmatch(base) else None


def _hub_names(data: Mapping[str, Any]) -> list[str]:
    """The data sets that are on the hub: what looks like its names and is no file here."""
    named = [str(name) for sources in data.values() if isinstance(sources, list) for name in sources]
    found = [name.partition(":")[0] for name in named if not Path(name.partition(":")[0]).exists()]
    return list(dict.fromkeys(name for name in found if "/" in name and _HUB_NAME.fullmatch(name)))


_HUB_NAME = re.compile(r"(?!.*\.(jsonl?|csv|parquet|gz|arrow)$)[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LONGEST_CONFIG = 1 << 16  # bytes


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
