"""From a batch of pairs and a causal language model to log-probs."""

from lit_dpo.scoring.score import score

__all__ = ["score"]
