"""Rounds: preference pairs of the policy's own completions, sampled, judged and paired before each step."""

from lit_dpo.rounds.active import Active
from lit_dpo.rounds.command import Command
from lit_dpo.rounds.discriminated import Discriminated
from lit_dpo.rounds.discriminator import Discriminator
from lit_dpo.rounds.filtered import Filtered
from lit_dpo.rounds.implicit import ImplicitReward
from lit_dpo.rounds.judges import Judge, JudgeError, RewardModel, Verifier
from lit_dpo.rounds.on_policy import OnPolicy
from lit_dpo.rounds.pickers import AllPairs, BestVsWorst, Candidate, ChosenVsSample, Picker, RightVsWrong
from lit_dpo.rounds.self_play import SelfPlay

__all__ = [
    "Active",
    "AllPairs",
    "BestVsWorst",
    "Candidate",
    "ChosenVsSample",
    "Command",
    "Discriminated",
    "Discriminator",
    "Filtered",
    "ImplicitReward",
    "Judge",
    "JudgeError",
    "OnPolicy",
    "Picker",
    "RewardModel",
    "RightVsWrong",
    "SelfPlay",
    "Verifier",
]
