"""Private parts of Lightning's command line (2.6.6) and of jsonargparse (4.53) that are touched, with their reasons.

`tests/test_lightning_private.py` fails where one of them has moved, and where one is not needed any more. (`_get`,
`_parser` and `_run_subcommand` of LightningCLI, which `lit_dpo.cli.app` calls, are there for subclasses.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _typehints
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningCLI


class CheckpointsSetNoOptions(LightningCLI):
    """Lightning's command line, on which a checkpoint decides no option.

    Lightning would let a checkpoint's options override explicit ones, and import what they name. Can go with
    `test_a_checkpoint_still_sets_options`.
    """

    def _parse_ckpt_path(self) -> None:
        """Leave options alone."""


@contextmanager
def switching_forgets_options() -> Iterator[None]:
    """Let a class named anew start from its own defaults.

    jsonargparse keeps options of the previous class that the new one happens to have too: `--model.loss DPOPLoss` over
    a config for DPO would silently train with DPO's beta. It offers no switch for that, hence the replaced function.
    Can go with `test_another_class_still_keeps_options`.
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


def all_options(parser: Any) -> list[str]:
    """Every option of a parser and its commands, which argparse lists nowhere in public.

    Can go with `test_parsers_still_list_no_options`.
    """
    commands = getattr(parser._subcommands_action, "_name_parser_map", {}).values()
    actions = [*parser._actions, *(action for command in commands for action in command._actions)]
    return [option for action in actions for option in action.option_strings]
