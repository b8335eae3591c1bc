"""Options as plain values, so that a checkpoint holding them loads without running or importing anything."""

from __future__ import annotations

import dataclasses
from typing import Any

from lit_dpo.losses import PreferenceLoss
from lit_dpo.own_code import refuse_signature
from lit_dpo.references.base import Reference

_OBJECT = "given_as_object"


def plain(value: Any) -> Any:
    """Options as numbers, strings, lists and dicts; a loss or reference becomes its class path and options.

    Of a model or tokenizer object only its class is kept: see `refuse_absent`.
    """
    if hasattr(value, "save_pretrained"):
        return {_OBJECT: type(value).__name__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        own = vars(type(value))
        if isinstance(value, Reference) and "__init__" in own and "__dataclass_fields__" not in own:
            raise ValueError(
                f"`{type(value).__name__}` must be a dataclass, so that a checkpoint can keep its options: put "
                "`@dataclass(eq=False)` on it, and fields in the place of `__init__`."
            )
        if isinstance(value, Reference):
            refuse_signature(value, "score", "policy", "batch", "scorer")
        return _spec(value, options) if isinstance(value, PreferenceLoss | Reference) else options
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def alive(value: Any) -> Any:
    """The inverse of `plain` for losses and references, among the classes that are imported already.

    Raises:
        ValueError: The class is not imported.
    """
    if isinstance(value, list):
        return [alive(v) for v in value]
    if not isinstance(value, dict) or set(value) != {"class_path", "init_args"}:
        return value
    classes = {_path(cls): cls for base in (PreferenceLoss, Reference) for cls in _subclasses(base)}
    path = str(value["class_path"])
    if path.startswith("lit_dpo."):  # release 0.1.0 named the file too, as in `lit_dpo.losses.dpo.DPOLoss`
        path = f"lit_dpo.{path.rpartition('.')[2]}"
    if path not in classes:
        raise ValueError(f"The class `{value['class_path']}` is not known: import the module that defines it.")
    return classes[path](**{name: alive(option) for name, option in value["init_args"].items()})


def refuse_absent(name: str, value: Any) -> None:
    """Refuse an option from a checkpoint whose value was an object, which no checkpoint holds.

    Args:
        name: Of the option.
        value: As `plain` wrote it.

    Raises:
        ValueError: It was an object.
    """
    if isinstance(value, dict) and _OBJECT in value:
        raise ValueError(
            f"The checkpoint's `{name}` was given as an object, a {value[_OBJECT]}, which it does not hold: give it "
            f"again, as in `PreferenceModule.load_from_checkpoint(..., {name}=...)` or "
            f"`export_checkpoint(..., {name}=...)`."
        )


def _spec(value: object, options: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": _path(type(value)), "init_args": options}


def _path(cls: type[Any]) -> str:
    """The public name of a class of this package, so that files may move; else the import path."""
    return f"{'lit_dpo' if cls.__module__.startswith('lit_dpo.') else cls.__module__}.{cls.__qualname__}"


def _subclasses(base: type[Any]) -> list[type[Any]]:
    return [cls for sub in base.__subclasses__() for cls in (sub, *_subclasses(sub))]
