"""Simple Preference Optimization."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """Raise the chosen completion's mean log-prob over the rejected one's by a margin, with no reference.

    The reward is what decoding maximises, the mean log-prob of a token, so that length alone earns nothing and no
    reference model takes memory. With `a = logp / |y|` the loss of a pair is
    `-logsigmoid(beta * (a_w - a_l - gamma_beta_ratio))`. Nothing but a small learning rate keeps the policy close to
    its start. Reward metrics are those of the summed log-probs.

    Source: Meng et al., SimPO, https://arxiv.org/abs/2405.14734, and the options of the authors' code.

    Args:
        beta: Rewards per nat per token, above 0; bigger sharpens the loss. The authors use 2 to 10.
        gamma_beta_ratio: Margin in nats per token by which the chosen completion shall lead, at least 0; beta times
            this is the paper's gamma.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(SimPOLoss()(policy, reference).item(), 5)  # log(1 + exp(-2.5 * (-42 / 20 + 56 / 30 - 0.5)))
    1.98165
    """

    needs_reference: ClassVar[bool] = False

    beta: float = 2.5
    gamma_beta_ratio: float = 0.5

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(self.gamma_beta_ratio >= 0, "gamma_beta_ratio", "at least 0", self.gamma_beta_ratio)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        return -F.logsigmoid(self.beta * (policy.per_token().margin - self.gamma_beta_ratio))

    def formula(self) -> str:
        """The logistic loss of the lead in mean log-prob."""
        return f"-logsigmoid({self.beta} * (logp_w/|y_w| - logp_l/|y_l| - {self.gamma_beta_ratio}))"
