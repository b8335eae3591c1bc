"""The argument parser: errors in one sentence, and classes that inherit no options from the one they replace."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, suppress
from inspect import isabstract, signature
from io import StringIO
from typing import Any, NoReturn

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_dpo.adapters import LoRA
from lit_dpo.cli.messages import did_you_mean, one_sentence
from lit_dpo.cli.private import all_options
from lit_dpo.data import Partition
from lit_dpo.losses import PreferenceLoss
from lit_dpo.references.base import Reference
from lit_dpo.rounds import Judge, Picker
from lit_dpo.vllm_engine import VLLM

# What a configuration may name: narrow paths, none of which runs or loads anything by itself.
IMPORTABLE = (
    *(f"lit_dpo.{name}" for name in ("losses", "references", "schedules", "callbacks")),
    *(f"lit_dpo.rounds.{name}" for name in ("judges", "command", "implicit", "pickers", "on_policy")),
    *(f"lit_dpo.rounds.{name}" for name in ("filtered", "discriminated", "discriminator", "self_play", "active")),
    *(f"lit_dpo.{name}" for name in ("data.partition", "data.splits", "adapters.LoRA", "LoRA", "WarmupDecay")),
    *("lit_dpo.strategies.FSDP2Strategy", "lit_dpo.vllm_engine.VLLM", "lit_dpo.VLLM"),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "strategies", "profilers", "plugins")),
    *("lightning.fabric.plugins.environments", "lightning.fabric.plugins.io"),  # where some of its plugins are defined
    *("lightning.Callback", "torch.optim", "torch.distributed.fsdp"),
)
PLUGGABLE = (PreferenceLoss, Reference, Partition, Judge, Picker)
_KINDS: dict[str, type[Any]] = {  # what an option takes, by its last name
    "loss": PreferenceLoss,
    "losses": PreferenceLoss,
    "base": PreferenceLoss,
    "reference": Reference,
    "references": Reference,
    "of": Reference,
    "partition": Partition,
    "judge": Judge,
    "gold": Judge,
    "discriminator": Judge,
    "picker": Picker,
    "adapter": LoRA,
    "engine": VLLM,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "callbacks": Callback,
    "logger": Logger,
    "strategy": Strategy,
}


class Parser(LightningArgumentParser):
    """An argument parser whose errors name what was probably meant, and that takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence, with the nearest valid names, and exit with status 2."""
        text = one_sentence(message)
        near = [] if "Did you mean" in text else nearest(text, self)
        if near:
            text = f"{text.rstrip('.')}. Did you mean {' or '.join(near)}?"
        sys.stderr.write(f"lit-dpo: error: {text}\n")
        raise SystemExit(2)


def completed(parser: Any, values: Mapping[str, Any]) -> str | None:
    """A configuration as yaml, the options that it does not name at their defaults; `None` if it does not parse."""
    with suppress(SystemExit), redirect_stderr(StringIO()):
        text: str = parser.dump(parser.parse_object(dict(values)), skip_none=False)
        return text
    return None


def nearest(message: str, parser: Any) -> list[str]:
    """Options or class names close to a name in an error message that is neither."""
    if unknown := re.search(r"`([\w.]+)`: there is no class `([\w.]+)`", message):
        kind = _KINDS.get(unknown[1].rpartition(".")[2])
        return did_you_mean(unknown[2], set() if kind is None else {kind.__name__, *subclass_names(kind)} - _ABSTRACT)
    if owned := re.search(r"^`([\w.]+)` is an option of a class.* for `([\w.]+)` before it", message):
        kind, name = _KINDS.get(owned[2].rpartition(".")[2]), owned[1].removeprefix(f"{owned[2]}.").partition(".")[0]
        having = {sub.__name__ for sub in _subclasses(kind) if name in signature(sub).parameters} if kind else set()
        return sorted(having) if len(having) <= 3 else []
    options = all_options(parser)
    nothing_misspelt = r"\S*/\S*|.*(required and not given|is no subclass of).*"  # paths, and what is missing
    message = re.sub(nothing_misspelt, "", message)
    for word in re.findall(r"--?[\w.]+|[\w.]+", message):
        known = set(options) if word.startswith("--") else {option.removeprefix("--") for option in options}
        while word not in known and len(word) >= 4:
            if close := did_you_mean(word, known):
                return close
            word = word.rpartition(".")[0] if word.count(".") > 1 else ""  # an option of what is misspelt
    return []


def subclass_names(base: type[Any]) -> set[str]:
    """Names of all classes below one that are nobody's own."""
    return {found.__name__ for found in _subclasses(base)}


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for sub in base.__subclasses__():
        if not sub.__name__.startswith("_") and not isabstract(sub):
            yield sub
        yield from _subclasses(sub)


_ABSTRACT = {kind.__name__ for kind in _KINDS.values() if kind not in (LoRA, VLLM)}
