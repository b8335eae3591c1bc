"""DPO-Positive."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class DPOPLoss(PreferenceLoss):
    """DPO with a penalty where the chosen completion falls below the reference.

    DPO can lower both completions as long as the rejected one falls further, which it does above all on pairs that
    differ in a few tokens. The loss of a pair is `-logsigmoid(beta * (r_w - r_l - penalty * max(0, -r_w)))`; it
    equals DPO wherever `r_w >= 0`.

    Source: Pal et al., Smaug, https://arxiv.org/abs/2402.13228v2, equation 3. The penalty stands inside the sigmoid
    and under beta; version 1 of the paper printed it outside, which its authors corrected.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        penalty: Nats of margin given up per nat that the chosen completion lies below the reference (the paper's
            lambda), at least 0; 0 is plain DPO.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-21.0], [-30.0], [5.0], [5.0]]))
    >>> reference = PairLogps(*torch.tensor([[-20.0], [-20.0], [5.0], [5.0]]))
    >>> round(DPOPLoss(beta=0.1, penalty=5.0)(policy, reference).item(), 4)  # -log(sigmoid(0.1 * (9 - 5 * 1)))
    0.513
    """

    beta: float = 0.3
    penalty: float = 50.0

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        check(self.penalty >= 0, "penalty", "at least 0", self.penalty)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return -F.logsigmoid(self.beta * (chosen - rejected - self.penalty * F.relu(-chosen)))

    def formula(self) -> str:
        """The penalty inside the sigmoid and under beta."""
        return f"-logsigmoid({self.beta} * (r_w - r_l - {self.penalty} * max(0, -r_w)))"
