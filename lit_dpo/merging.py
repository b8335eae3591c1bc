"""Adapters on a model: where they may sit, and folding them into its weights without changing what it says."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lit_dpo.scoring import own_attention


def refuse_tied_adapters(model: nn.Module) -> None:
    """Refuse adapters on a weight that another module shares: merged, they would change that module too.

    Raises:
        ValueError: An adapter sits on such a weight, as that of an input embedding which the output head is tied to.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        for parameter in base.parameters(recurse=False):
            others = [owner for owner in owners[id(parameter)] if owner != f"{name}.base_layer"]
            if others:
                ours, theirs = (path.removeprefix("base_model.model.") for path in (name, others[0]))
                raise ValueError(
                    f"The adapter on `{ours}`, which shares its weight with `{theirs}`, could not be merged without "
                    "changing that too. Leave it out of the adapter's `target_modules`, or start from a model whose "
                    "embeddings are not tied."
                )


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A copy of a model with its adapters folded into its weights, which scores a made-up row as the model does.

    Raises:
        ValueError: It does not. What rounding may change depends on the dtype, and on what the adapters change.
    """
    model = copy.deepcopy(model).eval()
    own_attention(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.weight.shape[0], (1, 16), generator=generator).to(head.weight.device)

    def logps(model: nn.Module) -> Tensor:  # of the row's tokens, shape (15,)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    dtype = head.weight.dtype
    before = logps(model)
    with model.disable_adapter():  # type: ignore[operator]
        effect = float((before - logps(model)).abs().max())
    folded: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    gap, size = float((logps(folded) - before).abs().max()), float(before.abs().max())
    share, rounding = (0.01, 1e-5) if dtype in (torch.float32, torch.float64) else (0.1, 0.02)
    limit = share * effect + rounding * size
    if gap > limit or math.isnan(gap) > math.isnan(size):  # a policy that is not finite is not the merge's fault
        raise ValueError(
            f"Merging the adapters would change the policy, a token's log-prob by {gap:.3g} nats (limit {limit:.2g}): "
            "an adapter may sit on a weight that two layers share. Export with `merge: false`."
        )
    return folded


@torch.no_grad()
def gives_no_tensor(module: nn.Module) -> bool:
    """Whether a module that inherits from `nn.Linear` gives something else than a tensor."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return False
    return not isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)
