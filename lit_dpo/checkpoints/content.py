"""The form of what a checkpoint holds, so that a forged or foreign one is refused before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_KINDS = {
    **dict.fromkeys(("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "loops", "callbacks"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    **dict.fromkeys(("epoch", "global_step"), int),
    **{"lit_dpo": dict, "pytorch-lightning_version": str, "PreferenceDataModule": dict},
}
_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
_LAYOUT = {"pairs_per_step", "accumulate", "batches"}


def check_content(content: Any, path: Path, weights: bool = True) -> None:
    """Refuse what was loaded from a checkpoint's place and has not the form of one.

    Args:
        content: What `torch.load` gave.
        path: The path that messages name.
        weights: They are in it, and not loaded already or in shards beside it.

    Raises:
        ValueError: Names the part that is something else.
    """
    for part in _wrong_parts(content, weights):
        raise ValueError(f"`{path}` is no checkpoint of a `PreferenceModule`{part}; give one written by `lit-dpo fit`.")


def _wrong_parts(content: Any, weights: bool) -> Iterable[str]:
    if not isinstance(content, dict) or (weights and "state_dict" not in content):
        yield ""
        return
    for name, kind in _KINDS.items():
        if name in content and not isinstance(content[name], kind):
            yield f": its `{name}` is {content[name]!r:.40}"
    for name, tensor in content.get("state_dict", {}).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            yield f": its weight {name!r:.60} is no plain tensor"
    for name in ("optimizer_states", "lr_schedulers"):
        if not all(isinstance(state, dict) for state in content.get(name, [])):
            yield f": its `{name}` are not what an optimizer or a schedule writes"
    if "loops" in content:
        if "pytorch-lightning_version" not in content:
            yield ", or not whole: the version of Lightning is missing"
        for loop in _LOOPS:
            state = content["loops"].get(loop)
            if not isinstance(state, dict) or not all(_counts(v) for k, v in state.items() if k.endswith("progress")):
                yield f": its counters of `{loop}` are missing or no numbers"
    ours = content.get("lit_dpo")
    if ours is not None:
        names, sums, layout = (ours.get(name) for name in ("names", "sums", "step_layout"))
        good = isinstance(names, list) and all(isinstance(n, str) for n in names) and isinstance(sums, torch.Tensor)
        if not good or not (
            layout is None or (isinstance(layout, dict) and layout.keys() >= _LAYOUT and _counts(layout))
        ):
            yield ": its own part `lit_dpo` is incomplete"


def _counts(value: Any) -> bool:
    """Whether there are only numbers in it, at any depth."""
    rest = [value] if isinstance(value, dict) else []
    for inner in rest:
        rest += [v for v in inner.values() if isinstance(v, dict)]
    return bool(rest) and all(isinstance(v, dict | int) for inner in rest for v in inner.values())
