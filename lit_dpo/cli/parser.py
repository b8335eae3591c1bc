"""The argument parser: errors in one sentence, and classes that inherit no options from the one they replace."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any, NoReturn

from jsonargparse import _typehints  # see switching_forgets_options
from jsonargparse._util import import_object
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_dpo.adapters import LoRA
from lit_dpo.cli.messages import did_you_mean, one_sentence
from lit_dpo.data import Partition
from lit_dpo.losses import PreferenceLoss
from lit_dpo.references.base import Reference

PLUGGABLE = (PreferenceLoss, Reference, Partition)
_KINDS: dict[str, type[Any]] = {  # what an option takes, by its last name
    "loss": PreferenceLoss,
    "losses": PreferenceLoss,
    "base": PreferenceLoss,
    "reference": Reference,
    "references": Reference,
    "of": Reference,
    "partition": Partition,
    "adapter": LoRA,
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
    options = [option for action in parser._actions for option in action.option_strings]
    for sub in getattr(parser._subcommands_action, "_name_parser_map", {}).values():
        options += [option for action in sub._actions for option in action.option_strings]
    message = re.sub(r"\S*/\S*|.*required and not given.*", "", message)  # no paths, and nothing that is only missing
    for word in re.findall(r"--?[\w.]+|[\w.]+", message):
        known = set(options) if word.startswith("--") else {option.removeprefix("--") for option in options}
        if word in known or len(word) < 4:
            continue
        if close := did_you_mean(word, known):
            return close
    return []


def subclass_names(base: type[Any]) -> set[str]:
    """Names of all classes below one that are nobody's own."""
    return {
        name
        for sub in base.__subclasses__()
        for name in (sub.__name__, *subclass_names(sub))
        if not name.startswith("_")
    }


_ABSTRACT = {kind.__name__ for kind in _KINDS.values() if kind is not LoRA}


@contextmanager
def switching_forgets_options() -> Iterator[None]:
    """Let a class named anew start from its own defaults.

    jsonargparse keeps options of the previous class that the new one happens to have too: `--model.loss DPOPLoss` over
    a config for DPO would silently train with DPO's beta. It offers no switch for that, hence the replaced function.
    """
    name = "discard_init_args_on_class_path_change"
    original = getattr(_typehints, name)

    def forget(parser: Any, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and not _same_class(previous["class_path"], value["class_path"]):
            previous["init_args"] = type(previous["init_args"])()

    setattr(_typehints, name, forget)
    try:
        yield
    finally:
        setattr(_typehints, name, original)


def _same_class(first: str | None, second: str | None) -> bool:
    """Whether two import paths lead to one class, as `lit_dpo.DPOLoss` and `lit_dpo.losses.DPOLoss` do."""
    if first is None or second is None or first == second:
        return first == second
    return bool(import_object(first) is import_object(second))
