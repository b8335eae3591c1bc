"""What the command line says when something is wrong: one sentence, and what was probably meant."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Iterable

_USERS_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, pickle.UnpicklingError)
_ENDINGS = ("loss", "reference", "logger", "scheduler", "strategy", "callback")  # left out when a class is called short
_TYPES = {  # what Python calls them, and what a person does
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping such as '{name: value}'",
    "list": "a list such as '[a, b]'",
    "NoneType": "null",
}
_PRECISIONS = {"fp16": "16-mixed", "half": "16-mixed", "float16": "16-mixed", "bfloat16": "bf16-mixed"}


def users_fault(error: Exception) -> bool:
    """Whether an error is about what the user gave, and so needs no traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    wrong_weights = isinstance(error, RuntimeError) and "loading state_dict" in str(error)
    wrong_devices = isinstance(error, TypeError) and str(error).startswith("`devices`")  # of Lightning
    return wrong_weights or wrong_devices or isinstance(error, (*_USERS_ERRORS, MisconfigurationException))


def one_sentence(message: object) -> str:
    """An error message on one line, without jsonargparse's own words where there are better ones."""
    text = " ".join(str(message).split())
    if nested := re.search(r'key "([\w.]+)":.*Given value: NestedArg\(key=\'(?!class_path)([\w.]+)\'', text):
        option, name = nested.groups()
        return f"`{option}.{name}` is an option of a class, and none is named: name the class for `{option}` before it."
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
        package = denied[1].partition(".")[0]
        return f"A configuration may not name `{denied[1]}`: if you trust that package, add `--allow-import {package}`"
    if package := re.search(r"class_path '[\w.]*?(\w+)': Requirement '([\w.-]+)[^']*' not met", text):
        return f"`{package[1]}` needs a package that is not installed: `pip install {package[2]}` gets it."
    if lacking := re.search(r"class_path '[\w.]*?(\w+)': (.*?)(?: - Expected |$)", text):
        return f"`{lacking[1]}`: {lacking[2]}"
    number = re.search(r"Expected a <class '(int|float)'>", text)
    if not number and (unknown := re.search(r'key "([\w.]+)".*Expected a dot import path string: ([\w.]+)', text)):
        return f"`{unknown[1]}`: there is no class `{unknown[2]}`; a class of your own needs its import path"
    if own := re.search(r'key "([\w.]+)":.*Expected a path but ([\w.]+) .*(abstract|to a subclass of (\w+))', text):
        rule = f"is no subclass of `{own[4]}`" if own[4] else "lacks a method that its base class requires"
        return f"`{own[1]}`: `{own[2]}` {rule}: see docs/extending.md for what to write."
    if refused := re.search(r"Option '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", text):
        option = refused[1] or refused[2]
        return f"there is no option `{option}`: `--help` lists them, `--model.loss.help CLASS` those of a class"
    if broken := re.search(r"Errors: - (`.*?\.) - ", text):  # the class itself says what is wrong
        return broken[1]
    if wrong := re.search(r'key "([\w.]+)": (.*?(?:Errors:)?.*?Expected a .*?)\.? (?:Got|Given) value.*?: (.*)', text):
        return _wrong_value(wrong[1], wrong[2].rpartition("Errors:")[2], wrong[3].rpartition("Given value: ")[2])
    if required := re.fullmatch(r"the following arguments are required: ([\w., ]+)", text):
        names = re.sub(r"\b(fit|validate|test|predict)\.", "", required[1])
        return f"required and not given: `{names.replace(', ', '`, `')}`"
    if strategy := re.search(r"invalid strategy name: `strategy='(.*?)'`", text):
        return _no_strategy(strategy[1])
    if "loading state_dict" in text:
        return (
            "The checkpoint holds other weights than the model has: give the `model` and `adapter` it was made with, "
            "and the `reference` if that is a synced one."
        )
    if "Weights only load failed" in text:
        return "What `ckpt_path` names does not load as a checkpoint: give a .ckpt file written by `lit-dpo fit`."
    return text


def _wrong_value(option: str, expected: str, value: str) -> str:
    """A sentence for a value of the wrong type, from the types that jsonargparse names."""
    choices = [choice.strip("' ") for found in re.findall(r"Literal\[(.*?)\]", expected) for choice in found.split(",")]
    types = [_TYPES[name] for name in re.findall(r"<class '([\w.]+)'>", expected) if name in _TYPES]
    types = [kind for kind in dict.fromkeys(types) if kind != "null"]
    types = [kind for kind in types if kind != "a whole number" or "a number" not in types]
    rule = " or ".join(types) if not choices else f"one of {', '.join(dict.fromkeys(choices))}"
    if option == "data.columns":
        rule = "a mapping such as '{prompt: question, chosen: good, rejected: bad}'"
    near = [_PRECISIONS[value]] if _PRECISIONS.get(value) in choices else did_you_mean(value, choices)
    return f"`{option}` must be {rule or 'of another type'}, got {value!r}" + (
        f". Did you mean {' or '.join(near)}?" if near else "."
    )


def _no_strategy(name: str) -> str:
    from lightning.pytorch.strategies import StrategyRegistry

    near = did_you_mean(name, StrategyRegistry.available_strategies())
    hint = f"Did you mean {' or '.join(near)}?" if near else "The usual ones are auto, ddp and fsdp2."
    return f"`trainer.strategy`: there is no strategy `{name}`. {hint}"


def did_you_mean(word: str, known: Iterable[str]) -> list[str]:
    """Names close to one that is none of them, the closest first, three at most.

    Case does not matter, nor does the ending of a class that its option makes plain.

    >>> did_you_mean("ipo", ["DPOLoss", "IPOLoss"]), did_you_mean("LORA", ["LoRA"])
    (['IPOLoss'], ['LoRA'])
    """
    wanted, names = word.lower(), sorted(set(known))
    short = {name: re.sub(rf"({'|'.join(_ENDINGS)})$", "", name.lower()) for name in names}
    if same := [name for name in names if wanted in (name.lower(), short[name])]:
        return same[:3]
    lower = {name.lower(): name for name in names}
    close = [lower[found] for found in difflib.get_close_matches(wanted, lower, n=3, cutoff=0.75)]
    return close or [name for name in names if len(wanted) > 3 and name.lower().startswith(wanted)][:3]
