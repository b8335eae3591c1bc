"""What a preference loss is: the contract that every loss, the package's own and a user's, fulfils."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from lit_dpo.own_code import refuse_signature
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class PreferenceLoss(ABC):
    """A function from log-probs of policy and reference to one loss per pair.

    Subclass it as a frozen dataclass; the fields are the loss's options, in Python and on the command line, and the
    class docstring is their help. A subclass needs nothing but `__call__`; see docs/extending.md for examples.

    Attributes:
        beta: Factor between log-ratios and implicit rewards, in rewards per nat; 1 unless the loss has such an option.
        layers: Decoder blocks whose log-probs the loss wants in `PairLogps.layers`, as 1-based numbers once `resolve`
            has run; none unless the loss asks for some.
        detach_head: Whether those intermediate log-probs leave final norm and head out of the gradient.
        needs_reference: False for a loss that never looks at the reference; none is then built, and the loss is
            called with a reference of zeros.
        needs_rejected: False for a loss that never looks at the rejected completion; without a reference it is not
            scored in training then, and `policy.rejected` is 0 there.
        needs_tokens: True for a loss that reads the log-probs of single tokens, `PairLogps.tokens`.
        columns: Columns of numbers that the loss reads from the rows, in `PairLogps.columns` of the policy.
    """

    if TYPE_CHECKING:  # read-only for the type checker; a subclass declares them as fields or takes the defaults

        @property
        def beta(self) -> float: ...  # noqa: D102
        @property
        def layers(self) -> tuple[int | float, ...]: ...  # noqa: D102
        @property
        def detach_head(self) -> bool: ...  # noqa: D102

    needs_reference: ClassVar[bool] = True
    needs_rejected: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = {name for base in cls.__mro__ for name in (*vars(base), *inspect.get_annotations(base))}
        for name, default in (("beta", 1.0), ("layers", ()), ("detach_head", False)):
            if name not in declared:
                setattr(cls, name, default)
        torch.serialization.add_safe_globals([cls])  # so that checkpoints holding one load with weights_only=True

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`; the mean over pairs is the caller's."""

    def resolve(self, blocks: int) -> Self:
        """This loss for a decoder of `blocks` blocks: depths become block numbers, and are checked."""
        return self

    def terms(self, policy: PairLogps, reference: PairLogps) -> dict[str, Tensor]:
        """Named terms worth logging, each of shape `(batch,)`."""
        return {}

    def formula(self) -> str:
        """The loss of a pair as one line of mathematics with the options filled in; the constructor call unless given.

        In it `logp_w` and `logp_l` are the policy's log-probs of chosen and rejected completion, `r_w` and
        `r_l` the same minus the reference's, and `|y_w|` and `|y_l|` the numbers of tokens. `r_w[a:b]` is the
        share of the tokens a to b in `r_w`, `r_w[s]` that of segment s, and `m = min(|y_w|, |y_l|)`. Any other
        name is a column of the row.
        """
        return repr(self)


def per_pair(loss: PreferenceLoss, policy: PairLogps, reference: PairLogps) -> Tensor:
    """The value of a loss, which must be one number a pair.

    Raises:
        ValueError: It is something else, does not depend on the policy, or needs what the loss did not declare, as of a
            loss from a user's file.
    """
    name = type(loss).__name__
    try:
        losses: object = loss(policy, reference)
    except KeyError as error:
        raise ValueError(
            f"`{name}` asks for {error}, which is not there: a loss declares the row values that it reads in `columns` "
            "and decoder blocks in `layers`."
        ) from error
    wanted = tuple(policy.chosen.shape)
    if isinstance(losses, Tensor) and losses.shape == wanted:
        if policy.chosen.requires_grad and not losses.requires_grad:
            raise ValueError(f"`{name}` has no gradient: do not detach the log-probs of the policy.")
        return losses
    got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    raise ValueError(
        f"`{name}` must return one value a pair, shape {wanted}, got {got}: leave out its own mean or "
        "sum, since the mean is taken over the pairs of a whole optimizer step."
    )


def refuse_functions(name: str, *losses: object) -> None:
    """Refuse what is no loss, a function above all, with the lines that make one of it.

    Args:
        name: Of the option.
        losses: What was given.

    Raises:
        ValueError: One of them is no `PreferenceLoss`.
    """
    for loss in losses:
        if isinstance(loss, PreferenceLoss):
            refuse_signature(loss, "__call__", "policy", "reference")
            _refuse_plain_class(loss)
            continue
        if isinstance(loss, type) or not callable(loss):
            made = f": give `{loss.__name__}(...)` instead of the class" if isinstance(loss, type) else ""
            raise ValueError(f"`{name}` must be a `PreferenceLoss`, got {loss!r}{made}.")
        given = getattr(loss, "__name__", "function")
        given = given if given.isidentifier() else "function"
        raise ValueError(
            f"`{name}` must be a `PreferenceLoss`, got a function, whose options no configuration or checkpoint could "
            f"keep. These lines make it one; give `MyLoss()` then:\n\n"
            "@dataclasses.dataclass(frozen=True)\n"
            "class MyLoss(lit_dpo.PreferenceLoss):\n"
            f"    def __call__(self, policy, reference): return {given}(policy, reference)"
        )


def _refuse_plain_class(loss: PreferenceLoss) -> None:
    """Refuse a class that declares options, but not as a dataclass: they could not be set."""
    known = type(loss).__dataclass_fields__
    options = {name: str(kind) for name, kind in inspect.get_annotations(type(loss)).items() if name not in known}
    if any("ClassVar" not in kind for kind in options.values()):
        raise ValueError(
            f"`{type(loss).__name__}` must be a dataclass, so that its options {', '.join(options)} can be set: put "
            "`@dataclass(frozen=True)` on it."
        )


def refuse_missing(loss: PreferenceLoss, columns: Collection[str]) -> None:
    """Refuse a loss that reads columns of the rows which do not come with them.

    Args:
        loss: Says in its `columns` what it reads.
        columns: Names of those that come along.

    Raises:
        ValueError: One is missing.
    """
    declared: object = loss.columns
    if isinstance(declared, str):
        raise ValueError(
            f"`columns` of `{type(loss).__name__}` must be a tuple of names: write `columns = ({declared!r},)`, "
            "with the comma."
        )
    if missing := [f"`{name}`" for name in loss.columns if name not in columns]:
        raise ValueError(
            f"`{type(loss).__name__}` needs the numbers {', '.join(missing)} of every row: name their columns in "
            "--data.values (in Python: the data module's `values`)."
        )


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """`r_w` and `r_l`: policy minus reference log-probs of chosen and rejected, each of shape `(batch,)`."""
    return policy.chosen - reference.chosen.detach(), policy.rejected - reference.rejected.detach()


def token_log_ratios(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Policy minus reference log-prob of every completion token, shape `(completion tokens,)`.

    Raises:
        ValueError: One of the two has no log-probs of single tokens.
    """
    if policy.tokens is None or reference.tokens is None:
        raise ValueError(
            "This loss needs the log-prob of every token, of policy and reference: score the pairs with `per_token`."
        )
    return policy.tokens - reference.tokens.detach()


def column(policy: PairLogps, name: str) -> Tensor:
    """The numbers of one column of the rows, in the log-probs' dtype, shape `(batch,)`.

    Raises:
        ValueError: The column did not come along.
    """
    if name not in policy.columns:
        raise ValueError(f"This loss needs the number `{name}` of every row: name the column in the data's `values`.")
    return policy.columns[name].to(policy.chosen.dtype)


def implicit_rewards(policy: PairLogps, reference: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards `beta * r` of chosen and rejected, detached, each of shape `(batch,)`; the same for every loss."""
    chosen, rejected = log_ratios(policy.detach(), reference.detach())
    return beta * chosen, beta * rejected


def check(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError, that the option `name` must be `rule` and what it is, unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {rule}, got {value}.")
