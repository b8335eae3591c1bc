"""Several references at a time: the weighted mean of their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lit_dpo.losses.base import check
from lit_dpo.pairs import PairBatch, PairLogps
from lit_dpo.references.base import Reference, refuse_incomplete, scored_by
from lit_dpo.scoring.score import Scorer


@dataclass(eq=False)
class MixedReference(Reference):
    """Several references as one: the weighted mean of their log-probs, which is a geometric mean of probabilities.

    A policy that is pulled to K references with strengths `beta_k` has its optimum where a policy has it that is
    pulled to this one with the strength `sum beta_k`, with the weights `beta_k / sum beta_k`. What is mixed: the
    log-prob of each completion, and where the loss asks for them the log-prob of each token and the same at
    intermediate layers. The mean is not normalised to a probability. For whole completions the missing constant depends
    on the prompt alone and drops out of the difference of the two log-ratios; it stays in losses that look at one
    log-ratio alone, such as DPOP, BCO and SPPO.

    Source: the objective is that of Le et al., MRPO, https://arxiv.org/abs/2405.16388; its optimum is derived here.
    The paper's weights, which differ by pair, are not offered, because they depend on which completion was chosen.

    Args:
        references: The references, at least one. Each may be any other, a mixture too.
        weights: One for each, above 0, adding up to 1; `None` weighs all alike.

    Raises:
        ValueError: An option is out of its range.
    """

    references: list[Reference]
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.references or not all(isinstance(reference, Reference) for reference in self.references):
            raise ValueError(f"`references` must be a list of one or more references, got {self.references!r}.")
        weights = self._weights()
        check(
            len(weights) == len(self.references), "weights", f"{len(self.references)} numbers, one a reference", weights
        )
        check(all(weight > 0 for weight in weights), "weights", "above 0", weights)
        check(abs(sum(weights) - 1) <= 1e-6, "weights", "numbers that add up to 1", weights)

    def _weights(self) -> list[float]:
        return [1 / len(self.references)] * len(self.references) if self.weights is None else self.weights

    def score(self, policy: nn.Module, batch: PairBatch, scorer: Scorer) -> PairLogps:
        """The weighted mean of the log-probs of a batch under each reference.

        Raises:
            ValueError: One of them does not give all that was asked for.
        """
        found = [scored_by(reference, policy, batch, scorer) for reference in self.references]
        if len(found) == 1:
            return found[0]
        for reference, logps in zip(self.references, found, strict=True):
            refuse_incomplete(reference, logps, scorer)
        return _mean(found, self._weights())


def _mean(found: Sequence[PairLogps], weights: Sequence[float]) -> PairLogps:
    """The weighted mean of log-probs of the same pairs, all that they hold."""

    def mixed(values: Sequence[Tensor]) -> Tensor:
        total = weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            total = total + weight * value
        return total

    tokens = [logps.tokens for logps in found if logps.tokens is not None]
    return replace(
        found[0],
        chosen=mixed([logps.chosen for logps in found]),
        rejected=mixed([logps.rejected for logps in found]),
        layers={layer: _mean([logps.layers[layer] for logps in found], weights) for layer in found[0].layers},
        tokens=mixed(tokens) if len(tokens) == len(found) else None,
    )
