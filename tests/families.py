"""Tiny random models of every family that is described, in the shapes in which a family's members differ."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from models import randomised
from transformers import AutoModelForCausalLM

SLIDING, FULL = "sliding_attention", "full_attention"
TYPES = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WHOLE_HEADS = {"hidden_size": 48, "num_attention_heads": 4}  # where hidden size must be heads times head_dim
BIASES = {"attention_bias": True, "mlp_bias": True}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 21}

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (class of the configuration, settings)
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma2": ("Gemma2", {**TYPES, "head_dim": 12, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma2 uncapped": ("Gemma2", {**TYPES, "head_dim": 12, "attn_logit_softcapping": None,
                                   "final_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", {**TYPES, "head_dim": 12, "query_pre_attn_scalar": 7}),
    "llama": ("Llama", {"head_dim": 12, "rope_parameters": LLAMA3_ROPE}),
    "llama, heads of their own, biases": ("Llama", {**WHOLE_HEADS, **BIASES, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": 5}),
    "mistral without windows": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "ministral": ("Ministral", {**TYPES, "head_dim": 12}),
    "qwen2": ("Qwen2", {**WHOLE_HEADS, "num_key_value_heads": 1}),
    "qwen2, windows above": ("Qwen2", {**WHOLE_HEADS, "use_sliding_window": True, "sliding_window": 5,
                                       "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "qwen3, windows above": ("Qwen3", {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5,
                                       "max_window_layers": 1}),
    "olmo2": ("Olmo2", WHOLE_HEADS),
    "olmo3": ("Olmo3", {**WHOLE_HEADS, **TYPES}),
    "phi3": ("Phi3", {**WHOLE_HEADS, **HALF_ROTARY, "sliding_window": 5}),
    "smollm3": ("SmolLM3", {**WHOLE_HEADS, "no_rope_layer_interval": 2}),
    "granite": ("Granite", {**WHOLE_HEADS, **MULTIPLIERS, "logits_scaling": 2.0}),
    "granite with biases": ("Granite", {**WHOLE_HEADS, **MULTIPLIERS, **BIASES}),
    "gpt2": ("GPT2", {"n_embd": 48, "n_inner": 53, "n_layer": 3, "n_head": 4, "n_positions": 96}),
    "gpt2, scaled by layer": ("GPT2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 96,
                                       "scale_attn_by_inverse_layer_idx": True}),
    "pythia": ("GPTNeoX", {**WHOLE_HEADS, **HALF_ROTARY}),
    "gpt_neox, one after the other": ("GPTNeoX", {**WHOLE_HEADS, "use_parallel_residual": False,
                                                  "attention_bias": False}),
    "mixtral": ("Mixtral", {"head_dim": 12, "num_local_experts": 5, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 12, "use_sliding_window": True, "sliding_window": 5}),
    "qwen3_moe, dense below": ("Qwen3Moe", {**EXPERTS, "head_dim": 12, "mlp_only_layers": [0]}),
}  # fmt: skip
EXPERT_CASES = [name for name, (kind, _) in CASES.items() if kind in ("Mixtral", "Qwen3Moe")]
DENSE_CASES = [name for name in CASES if name not in EXPERT_CASES]
# Families whose o_proj and MLP inputs all have biases.
BIASED_CASES = ["llama, heads of their own, biases", "granite with biases", "gpt2", "pythia"]


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a case, with transformers' eager attention, in eval mode."""
    kind, settings = CASES[name]
    shape: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if kind != "GPT2":  # which has names of its own for these
        shape |= {
            "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 96,
        }  # fmt: skip
    if kind not in ("GPT2", "GPTNeoX"):
        shape["num_key_value_heads"] = 2
    config = getattr(transformers, f"{kind}Config")(**shape | settings | changes)
    config._experts_implementation = "eager"  # transformers' grouped products have no float64
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed, dtype)
