"""The catalogue of preference losses: one loss, one file."""

from lit_dpo.losses.base import PreferenceLoss, implicit_rewards, log_ratios, per_pair
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.dpop import DPOPLoss
from lit_dpo.losses.intermediate import IntermediateLoss
from lit_dpo.losses.ipo import IPOLoss
from lit_dpo.losses.sft import SFTLoss
from lit_dpo.losses.weighted import WeightedLoss

__all__ = [
    "DPOLoss",
    "DPOPLoss",
    "IPOLoss",
    "IntermediateLoss",
    "PreferenceLoss",
    "SFTLoss",
    "WeightedLoss",
    "implicit_rewards",
    "log_ratios",
    "per_pair",
]
