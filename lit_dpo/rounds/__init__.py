"""Rounds: preference pairs of the policy's own completions, sampled, judged and paired before each step."""

from lit_dpo.rounds.command import Command
from lit_dpo.rounds.judges import Judge, JudgeError, RewardModel, Verifier
from lit_dpo.rounds.on_policy import OnPolicy
from lit_dpo.rounds.pickers import AllPairs, BestVsWorst, Candidate, ChosenVsSample, Picker, RightVsWrong
from lit_dpo.rounds.self_play import SelfPlay

__all__ = [
    "AllPairs",
    "BestVsWorst",
    "Candidate",
    "ChosenVsSample",
    "Command",
    "Judge",
    "JudgeError",
    "OnPolicy",
    "Picker",
    "RewardModel",
    "RightVsWrong",
    "SelfPlay",
    "Verifier",
]
