"""The catalogue of preference losses: one loss, one file."""

from lit_dpo.losses.adpo import ADPOLoss
from lit_dpo.losses.apo_down import APODownLoss
from lit_dpo.losses.apo_zero import APOZeroLoss
from lit_dpo.losses.base import (
    PreferenceLoss,
    implicit_rewards,
    log_ratios,
    per_pair,
    refuse_functions,
    refuse_missing,
    token_log_ratios,
)
from lit_dpo.losses.bco_pair import BCOPairLoss
from lit_dpo.losses.cpo import CPOLoss
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.dpo_shift import DPOShiftLoss
from lit_dpo.losses.dpop import DPOPLoss
from lit_dpo.losses.exo import EXOLoss
from lit_dpo.losses.f_dpo import FDPOLoss
from lit_dpo.losses.hinge import HingeLoss
from lit_dpo.losses.intermediate import IntermediateLoss
from lit_dpo.losses.ipo import IPOLoss
from lit_dpo.losses.lddpo import LDDPOLoss
from lit_dpo.losses.minor_dpo import MinorDPOLoss
from lit_dpo.losses.nca_pair import NCAPairLoss
from lit_dpo.losses.odpo import ODPOLoss
from lit_dpo.losses.orpo import ORPOLoss
from lit_dpo.losses.rdpo import RDPOLoss
from lit_dpo.losses.robust_dpo import RobustDPOLoss
from lit_dpo.losses.sft import SFTLoss
from lit_dpo.losses.simpo import SimPOLoss
from lit_dpo.losses.sppo import SPPOLoss
from lit_dpo.losses.weighted import WeightedLoss

__all__ = [
    "ADPOLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOPairLoss",
    "CPOLoss",
    "DPOLoss",
    "DPOPLoss",
    "DPOShiftLoss",
    "EXOLoss",
    "FDPOLoss",
    "HingeLoss",
    "IPOLoss",
    "IntermediateLoss",
    "LDDPOLoss",
    "MinorDPOLoss",
    "NCAPairLoss",
    "ODPOLoss",
    "ORPOLoss",
    "PreferenceLoss",
    "RDPOLoss",
    "RobustDPOLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "WeightedLoss",
    "implicit_rewards",
    "log_ratios",
    "per_pair",
    "refuse_functions",
    "refuse_missing",
    "token_log_ratios",
]
