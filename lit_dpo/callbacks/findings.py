"""What stands out in the validations of a run, in a plain sentence each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_STEP = 0.01  # an accuracy that changes by less stays the same
_CHANCE = 0.5  # the accuracy of implicit rewards before the first step: every pair is a tie

Validation = tuple[int, Mapping[str, float]]  # the optimizer step, and metrics by name


def findings(history: Sequence[Validation], pairs: int | None = None) -> list[str]:
    """Sentences for what was seen, or none.

    - More than half of the chosen completions are less likely than under the reference, and so is their mean.
    - The last accuracy is 0.01 or more above all earlier ones.
    - The accuracy is 0.01 or more below its highest value, which came earlier.
    - Of what the accuracy gained over 1/2, less than half is left when pairs whose chosen completion is longer and
      pairs whose chosen one is shorter count alike. A policy that only prefers length gains nothing then.

    Args:
        history: The validations in their order.
        pairs: How many pairs each is over, if that is known. An accuracy that changes by less than its standard error
            then stays the same, too.

    >>> values = [{"val/rewards/accuracies": a} for a in (0.5, 0.7, 0.6)]
    >>> findings(list(enumerate(values)))
    ['Accuracy fell after step 1, from 0.700 to 0.600: train for fewer steps, or export the best checkpoint.']
    """
    measured = [(step, values) for step, values in history if "val/rewards/accuracies" in values]
    if not measured:
        return []
    found = [_displaced(measured[-1][1]), _moved(measured, pairs), _length(measured[-1][1])]
    return [sentence for sentence in found if sentence]


def accuracy_among(values: Mapping[str, float], length: str, stage: str = "val") -> float | None:
    """The accuracy among pairs whose chosen completion is `longer` or `shorter`; nothing if there are none.

    >>> accuracy_among({"val/length/longer": 0.5, "val/length/longer_won": 0.4}, "longer")
    0.8
    """
    share, won = (values.get(f"{stage}/length/{length}{ending}") for ending in ("", "_won"))
    return won / share if share and won is not None else None


def _displaced(last: Mapping[str, float]) -> str:
    """`displacement` is there exactly if there is a reference, so that rewards are changes of log-probs."""
    logp, share, reward = (last.get(f"val/{name}") for name in ("logps/chosen", "displacement", "rewards/chosen"))
    if logp is None or share is None or reward is None or reward >= 0 or share <= _CHANCE:
        return ""
    return (
        f"Chosen log-probs fell: {share:.0%} of the chosen completions are less likely than under the reference (mean "
        f"reward {reward:.3g}, mean log-prob now {logp:.4g} nats): consider `DPOPLoss`, or an SFT term by "
        "`WeightedLoss`."
    )


def _moved(measured: Sequence[Validation], pairs: int | None) -> str:
    values = [(values["val/rewards/accuracies"], step) for step, values in measured]
    (last, _), (best, when) = values[-1], max(values, key=lambda value: value[0])
    least = _STEP if pairs is None else max(_STEP, math.sqrt(best * (1 - best) / pairs))
    over = "" if pairs is None else f" over {pairs:,} pairs"
    if best - last >= least:
        return (
            f"Accuracy fell after step {when}, from {best:.3f} to {last:.3f}{over}: train for fewer steps, or export "
            "the best checkpoint."
        )
    before, when = max(values[:-1], key=lambda value: value[0], default=(last, 0))
    if last - before >= least:
        return f"Accuracy still rises, to {last:.3f} from {before:.3f} at step {when}{over}: more steps may help."
    return ""


def _length(last: Mapping[str, float]) -> str:
    longer, shorter = accuracy_among(last, "longer"), accuracy_among(last, "shorter")
    if longer is None or shorter is None or "val/displacement" not in last:
        return ""
    gain, alike = last["val/rewards/accuracies"] - _CHANCE, (longer + shorter) / 2 - _CHANCE
    if gain < _STEP or alike >= gain / 2:
        return ""
    return (
        f"Most of the gain is length: accuracy is {longer:.3f} where the chosen completion is longer and {shorter:.3f} "
        "where it is shorter: consider `SimPOLoss` or `LDDPOLoss`, or data with balanced lengths."
    )
