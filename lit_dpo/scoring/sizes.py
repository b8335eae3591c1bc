"""Whether the rows of a stage fit a model: its embedding, its positions, and how these depend on the length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_dpo.scoring.decoder import decoder_parts
from lit_dpo.scoring.score import SHARDED_METHOD, length_turn


def check_sizes(model: nn.Module, longest: int, largest: int) -> str | None:
    """Refuse rows that the model cannot read.

    Args:
        model: A model that `score` takes.
        longest: Tokens of the longest sequence, prompt and one completion together.
        largest: Largest token id.

    Returns:
        What to warn of: rows longer than the model's rotary positions.

    Raises:
        ValueError: There is no such token, or no such position.
    """
    parts = decoder_parts(model)
    name, embedding = type(parts.model).__name__, parts.model.get_input_embeddings()
    known = getattr(embedding, "num_embeddings", None)
    if known is not None and largest >= known:
        raise ValueError(
            f"The rows hold token id {largest}, but the embedding of {name} has {known} tokens, 0 to {known - 1}: use "
            "the model's own `tokenizer`."
        )
    positions = getattr(parts.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or longest <= positions:
        return None
    problem = f"The longest row has {longest} tokens, but {name} knows {positions} positions"
    if _has_table(parts.decoder, positions, embedding):
        raise ValueError(f"{problem}: give the data a `max_length` of {positions} at most.")
    if length_turn(parts) == positions:  # made for more
        return None
    return f"{problem}, and log-probs beyond them may mean little: a `max_length` of {positions} avoids that."


def check_rows(models: Sequence[nn.Module], sets: Iterable[tuple[Any, Tensor, Any]]) -> None:
    """`check_sizes` for all rows of a stage; and say if some are long enough to change a model's rotary positions.

    Args:
        models: Policy and reference.
        sets: Data sets with the rows of theirs that will be seen; see `PreferenceDataModule.reference_sets`.

    Raises:
        ValueError: As `check_sizes`; or a sharded model would need another number of forward passes on each process.
    """
    longest = largest = 0
    for dataset, rows, _ in sets:
        prompt, chosen, rejected = dataset.lengths[rows].unbind(1)
        longest = max(longest, int((prompt + torch.maximum(chosen, rejected)).max()))
        largest = max(largest, dataset.largest_id)
    for warning in dict.fromkeys(check_sizes(model, longest, largest) for model in models):
        if warning is not None:
            rank_zero_warn(warning)
    for turn in {length_turn(decoder_parts(model)) for model in models}:
        if turn is None or longest <= turn:
            continue
        rule = f"beyond {turn} tokens the model's rotary positions depend on the length"
        if any(hasattr(model, SHARDED_METHOD) for model in models):
            raise ValueError(
                f"A sharded model cannot take longer rows, since {rule}, and the longest row has {longest}: give the "
                f"data a `max_length` of {turn} at most."
            )
        rank_zero_info(f"Batches longer than {turn} tokens are scored one sequence at a time: {rule}.")


def _has_table(decoder: nn.Module, positions: int, embedding: nn.Module) -> bool:
    """Whether positions are looked up in a table that ends, learnt or computed once."""
    for module in decoder.modules():
        rows = module.num_embeddings if isinstance(module, nn.Embedding) and module is not embedding else 0
        if positions <= rows <= positions + 8:  # OPT keeps 2 more
            return True
        for buffer in module.buffers(recurse=False):
            if (buffer.dim() == 2 and len(buffer) == positions) or buffer.shape[-2:] == (positions, positions):
                return True
    return False
