"""What happens around training: stopping, keeping, showing, exporting."""

from lit_dpo.callbacks.early_stopping import BestCheckpoint, RewardEarlyStopping
from lit_dpo.callbacks.exporting import ExportModel
from lit_dpo.callbacks.first_model import FirstModelMetrics
from lit_dpo.callbacks.last_checkpoint import LastCheckpoint, Stopped
from lit_dpo.callbacks.margins import RecordMargins
from lit_dpo.callbacks.predictions import PairPredictionWriter
from lit_dpo.callbacks.progress import ProgressLine
from lit_dpo.callbacks.samples import SampleCompletions, SamplePrompts
from lit_dpo.callbacks.summary import PolicyLine, RunSummary

__all__ = [
    "BestCheckpoint",
    "ExportModel",
    "FirstModelMetrics",
    "LastCheckpoint",
    "PairPredictionWriter",
    "PolicyLine",
    "ProgressLine",
    "RecordMargins",
    "RewardEarlyStopping",
    "RunSummary",
    "SampleCompletions",
    "SamplePrompts",
    "Stopped",
]
