"""Tiny descriptions of most decoder architectures of transformers, from one list of sizes."""

from transformers import AutoConfig

# Every name that some configuration has for a size; an architecture takes those it knows.
SIZES = {
    "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "initializer_range": 0.35, "init_std": 0.35,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "sliding_window": 128,
    "attention_chunk_size": 128,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "kv_channels": 8,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "state_size": 8, "conv_L_cache": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "is_decoder": True, "is_encoder_decoder": False,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "head_dim": None}  # keys and values from one latent vector: a head each
OVERRIDES = {
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "youtu": _LATENT, "minicpm3": _LATENT, "axk1": _LATENT,
    "falcon": {"hidden_dropout": 0.2, "num_kv_heads": 4},
    "gemma3n_text": {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"floor_scale": 16, "attn_scale": 0.5, "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mixtral": {"router_jitter_noise": 0.3},
    "opt": {"layerdrop": 0.3},
    "xglm": {"num_attention_heads": 4, "attention_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def described(model_type, **more):
    """A description of about 20,000 weights of standard deviation 0.35."""
    kind = type(AutoConfig.for_model(model_type))
    names = kind().to_dict()
    aliases = getattr(kind, "attribute_map", {})
    sizes = {aliases.get(k, k): v for k, v in SIZES.items() if k in names or aliases.get(k) in names}
    if names.get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    return {"model_type": model_type, **sizes, **OVERRIDES.get(model_type, {}), **more}
