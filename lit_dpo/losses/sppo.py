"""Self-Play Preference Optimization with hard labels."""

from dataclasses import dataclass

from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class SPPOLoss(PreferenceLoss):
    """Bring each log-ratio to a target of its own: up for chosen, down for rejected.

    The loss of a pair is `(r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2`. The paper's targets come from
    the probability of winning under a preference model; here it is 1 for chosen and 0 for rejected.

    Source: Wu et al., Self-Play Preference Optimization, https://arxiv.org/abs/2405.00675, equation 4.7 with hard
    labels, as in TRL. Its rounds of sampling are no part of the loss.

    Args:
        beta: Strength of the pull to the reference, above 0 (the paper's 1 / eta); bigger stays closer. The targets
            are `1 / (2 * beta)` nats: 500 at the default.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(SPPOLoss(beta=0.1)(policy, reference).item(), 5)  # (-2 - 5) ** 2 + (-6 + 5) ** 2
    50.0
    """

    beta: float = 0.001

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        target = 1 / (2 * self.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2

    def formula(self) -> str:
        """The two squared distances."""
        target = 1 / (2 * self.beta)
        return f"(r_w - {target}) ** 2 + (r_l + {target}) ** 2"
