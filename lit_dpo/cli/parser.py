"""The argument parser: errors in one sentence, and classes that inherit no options from the one they replace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import _typehints  # see switching_forgets_options
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser

from lit_dpo.cli.messages import nearest, one_sentence


class Parser(LightningArgumentParser):
    """An argument parser whose errors name what was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence, with the nearest valid names, and exit with status 2."""
        text = one_sentence(message)
        near = nearest(text, self)
        if near:
            text = f"{text.rstrip('.')}. Did you mean {' or '.join(near)}?"
        sys.stderr.write(f"lit-dpo: error: {text}\n")
        raise SystemExit(2)


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
