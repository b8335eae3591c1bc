"""Tiny random models of several architectures."""

import torch
from torch import nn

from lit_dpo.models import load_model

VOCABULARY = 50
# Weights are drawn wide (0.3 instead of 0.02), so that attention to a wrong token changes the log-probs visibly.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_DECODER = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 64}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}  # two query heads share a key head
DESCRIPTIONS = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "sliding_window": None},
    "gpt_neox": _DECODER,
    "gpt2": {**_COMMON, "n_positions": 64},
    "gemma": {**_GROUPED, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 32},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "granite": {**_GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "mixtral": {**_GROUPED, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {
        **_COMMON,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {  # keys wider than values
        **_DECODER,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "nemotron": {**_GROUPED, "head_dim": 8},
    "codegen": {**{k: v for k, v in _COMMON.items() if k != "pad_token_id"}, "rotary_dim": 4},
    "biogpt": _DECODER,
    "bloom": {**_COMMON, "n_head": 4},
    "mamba": {**_COMMON, "state_size": 4},
}


def tiny_model(model_type, dtype="float32", seed=0, **overrides):
    """A random model of three blocks; in float64 its norms are exact, which transformers' are not."""
    description = {"model_type": model_type, **DESCRIPTIONS[model_type], **overrides}
    model = load_model(description, dtype=dtype, seed=seed)
    if dtype == "bfloat16":  # PyTorch 2.11 draws other numbers in it; these are the float32 ones, rounded
        model.load_state_dict(load_model(description, seed=seed).state_dict())
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide one that is left out
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    if dtype == "float64":
        _exact_norms(model)
    return model


class _ExactRMSNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma scales by 1 + weight
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (self.offset + self.weight)


def _exact_norms(model):
    """Replace the RMS norms, which compute in float32 whatever comes in."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _ExactRMSNorm(child))
