"""Identity Preference Optimization."""

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class IPOLoss(PreferenceLoss):
    """Bring the log-ratio difference to a finite target instead of pushing it to infinity.

    The loss of a pair is `(h - 1 / (2 * beta)) ** 2` with `h = r_w - r_l`, so it stays regularised even where
    the preferences are certain, where DPO's pull to the reference fades.

    Source: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences,
    https://arxiv.org/abs/2310.12036. The paper leaves open whether h comes from sums or from per-token means of
    log-probs; its authors confirmed means, their first public code used sums.

    Args:
        beta: Strength of the pull to the reference, above 0 (the paper's tau); bigger stays closer. The target
            `1 / (2 * beta)` is in nats per token with `length_normalize`, else in nats.
        length_normalize: Take h from means over the completion's tokens (the authors' confirmed form) instead of
            sums.

    Raises:
        ValueError: `beta` is not positive.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-10.0], [-30.0], [5.0], [5.0]]))
    >>> reference = PairLogps(*torch.tensor([[-20.0], [-20.0], [5.0], [5.0]]))
    >>> round(IPOLoss(beta=0.1)(policy, reference).item(), 4)  # (20 / 5 - 5) ** 2
    1.0
    """

    beta: float = 0.1
    length_normalize: bool = True

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        if self.length_normalize:
            policy, reference = policy.per_token(), reference.per_token()
        chosen, rejected = log_ratios(policy, reference)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def formula(self) -> str:
        """The squared distance from the target."""
        h = "r_w/|y_w| - r_l/|y_l|" if self.length_normalize else "r_w - r_l"
        return f"({h} - {1 / (2 * self.beta)}) ** 2"
