"""f-DPO."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_dpo.losses.base import PreferenceLoss, check, log_ratios
from lit_dpo.pairs import PairLogps


@dataclass(frozen=True)
class FDPOLoss(PreferenceLoss):
    """DPO under another divergence from the reference than the reverse KL.

    The divergence decides in which way the policy may stray from the reference, and with it how much of the
    reference's variety is kept. With the derivative f' of its generator the loss of a pair is
    `-logsigmoid(beta * (f'(e^r_w) - f'(e^r_l)))`, where `f'(e^r)` is, up to a constant that cancels,
    `logsigmoid(r)` for `js`, `-e^-r` for `forward_kl`, and `e^((alpha - 1) * r) / (alpha - 1)` for
    `alpha`, which lies between the forward KL (alpha 0) and the reverse KL (alpha 1). The last two grow
    exponentially and saturate soon: with log-ratios of -2 and -6 the forward KL's loss is 0 already. Exponents count
    as at most 80, near the end of float32's range; this bound is TRL's for `alpha`, and ours for `forward_kl`.

    Source: Wang et al., Beyond Reverse KL, https://arxiv.org/abs/2309.16240. No default is published; this is our
    choice.

    Args:
        beta: Strength of the pull to the reference, above 0, in rewards per nat; bigger stays closer.
        divergence: `js`, `forward_kl` or `alpha`.
        alpha: Order of the divergence `alpha`, in (0, 1), for that divergence only; left out, it is 0.5.

    Raises:
        ValueError: An option is out of its range.

    >>> import torch
    >>> from lit_dpo.pairs import PairLogps
    >>> policy = PairLogps(*torch.tensor([[-42.0], [-56.0], [20.0], [30.0]]))
    >>> reference = PairLogps(*torch.tensor([[-40.0], [-50.0], [20.0], [30.0]]))
    >>> round(FDPOLoss(beta=0.1)(policy, reference).item(), 5)  # log(1 + exp(-0.1 * (-2.12693 + 6.00248)))
    0.51803
    """

    beta: float = 0.1
    divergence: Literal["js", "forward_kl", "alpha"] = "js"
    alpha: float | None = None

    def __post_init__(self) -> None:
        check(self.beta > 0, "beta", "positive", self.beta)
        known = ("js", "forward_kl", "alpha")
        check(self.divergence in known, "divergence", "`js`, `forward_kl` or `alpha`", self.divergence)
        if self.alpha is not None:
            check(self.divergence == "alpha", "alpha", "left out unless `divergence` is `alpha`", self.alpha)
            check(0 < self.alpha < 1, "alpha", "in (0, 1)", self.alpha)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, shape `(batch,)`."""
        chosen, rejected = log_ratios(policy, reference)
        return -F.logsigmoid(self.beta * (self._score(chosen) - self._score(rejected)))

    @property
    def _power(self) -> float:
        """Of the probability ratio in f': -1 for the forward KL, alpha - 1 for the divergence alpha."""
        return -1.0 if self.divergence == "forward_kl" else (0.5 if self.alpha is None else self.alpha) - 1

    def _score(self, ratio: Tensor) -> Tensor:
        if self.divergence == "js":
            return F.logsigmoid(ratio)
        return torch.exp((self._power * ratio).clamp(max=80)) / self._power

    def formula(self) -> str:
        """The scores that the divergence makes of the log-ratios."""
        if self.divergence == "js":
            return f"-logsigmoid({self.beta} * (logsigmoid(r_w) - logsigmoid(r_l)))"
        power = round(self._power, 12)
        return f"-logsigmoid({self.beta} * (exp({power} * r_w) - exp({power} * r_l)) / {power})"
