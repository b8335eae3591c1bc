"""Low-rank adapters: attaching them, and folding them into the weights."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from lit_dpo.scoring.score import own_attention


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


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the policy's linear layers, through peft.

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.

    Args:
        rank: Rank of each update, at least 1; bigger adapts more and costs more.
        alpha: Scale of the update, applied as `alpha / rank`.
        dropout: Probability of dropping an input of an adapter while training, in [0, 1).
        target_modules: Names of the layers to adapt; `all-linear` is every linear layer but the output head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def attach(self, model: PreTrainedModel, seed: int = 0) -> nn.Module:
        """Wrap the model: its own weights are frozen, the adapters' train and start as no change at all.

        Args:
            model: The model, changed in place.
            seed: Seed of the adapters' random half, so that every process starts from the same one.

        Raises:
            ImportError: peft is not installed.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError('LoRA needs the package peft: pip install "lit-dpo[peft]".') from error
        # Some routers are linear layers to peft, but give more than a product.
        strange = [name for name, module in model.named_modules() if gives_no_tensor(module)]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            exclude_modules=strange if strange and self.target_modules == "all-linear" else None,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated")  # peft 0.21 asks for it
            torch.manual_seed(seed)
            wrapped: nn.Module = get_peft_model(model, config)
        return wrapped
