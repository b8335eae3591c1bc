"""What the command line says when something is wrong: one sentence, and what was probably meant."""

from __future__ import annotations

import difflib
import pickle
import re
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_dpo.data import Partition
from lit_dpo.losses import PreferenceLoss
from lit_dpo.reference import Reference

PLUGGABLE = (PreferenceLoss, Reference, Partition)
_USERS_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    MisconfigurationException,
    pickle.UnpicklingError,
)


def users_fault(error: Exception) -> bool:
    """Whether an error is about what the user gave, and so needs no traceback."""
    wrong_weights = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
    return wrong_weights or isinstance(error, _USERS_ERRORS)


def one_sentence(message: object) -> str:
    """An error message on one line, without jsonargparse's own words where there are better ones."""
    text = " ".join(str(message).split())
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
        package = denied[1].partition(".")[0]
        return f"A configuration may not name `{denied[1]}`: if you trust that package, add `--allow-import {package}`"
    if unknown := re.search(r'key "([\w.]+)".*Expected a dot import path string: ([\w.]+)', text):
        return f"`{unknown[1]}`: there is no class `{unknown[2]}`; a class of your own needs its import path"
    if refused := re.search(r"Option '([\w.]+)' is not accepted", text):
        return f"there is no option `{refused[1]}`: `--help` lists them, `--model.loss.help CLASS` those of a class"
    if "loading state_dict" in text:
        return "The checkpoint holds other weights than the model has: give the `model` and `adapter` it was made with."
    if "Weights only load failed" in text:
        return "What `ckpt_path` names does not load as a checkpoint: give a .ckpt file written by `lit-dpo fit`."
    if broken := re.search(r"Errors: - (`.*?\.) - ", text):  # the class itself says what is wrong
        return broken[1]
    return text


def nearest(message: str, parser: Any) -> list[str]:
    """Options or class names close to a name in an error message that is neither."""
    options = [option for action in parser._actions for option in action.option_strings]
    names = getattr(parser._subcommands_action, "_name_parser_map", {})
    for sub in names.values():
        options += [option for action in sub._actions for option in action.option_strings]
    classes = {*names, *(name for base in PLUGGABLE for name in subclass_names(base))}
    message = re.sub(r"\S*/\S*|.* required: .*", "", message)  # no paths, and nothing that is only missing
    for word in re.findall(r"--?[\w.]+|[\w.]+", message):
        known = set(options) if word.startswith("--") else classes | {option.removeprefix("--") for option in options}
        if word in known or len(word) < 4:
            continue
        close = difflib.get_close_matches(word, known, n=3, cutoff=0.75)
        if close:
            return close
    return []


def subclass_names(base: type[Any]) -> set[str]:
    """Names of all classes below one."""
    return {name for sub in base.__subclasses__() for name in (sub.__name__, *subclass_names(sub))}
