"""From a batch of pairs and a causal language model to log-probs."""
