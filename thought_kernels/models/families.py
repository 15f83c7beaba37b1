"""One short description per family: where transformers keeps a family's parts, and what its block does with them.

A block is `h = x + m n₁(o_proj(attention))`, `y = h + m n₂(mlp(u))`, with u the norm of h, or of x where attention and
MLP stand side by side. Families differ in the names of modules, in which norms there are and of what kind, in the
windows and rotary embeddings of their layers, and in a few factors; everything else is one code in block.py.

Strings that end in "of the config" are names of attributes there; None means that the family has no such thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A family of decoders; the defaults are Llama's.

    Attributes:
        name: as people write it.
        embedding, layers, final_norm: names in the text model.
        position_embedding: name in the text model of learned absolute positions' embedding; no layer is rotary then.
        attention: name in the decoder layer. The MLP is `mlp` everywhere.
        qkv: names in the attention of the projections to queries, keys and values, or of the one fused projection.
        qkv_by_head: a fused projection's rows are (q, k, v) head by head, not all q, then all k, then all v.
        o_proj: name in the attention.
        mlp_inputs: names in the MLP of the modules that multiply its input.
        down_proj: name in the MLP.
        input_norm, pre_feedforward_norm: names in the layer of the norms before attention and MLP.
        post_attention_norm, post_feedforward_norm: names in the layer of the norms after them.
        head_norms: whether the attention has q_norm and k_norm, over a head or over all of them.
        weight_offset: added to the norms' weights, 1 where the checkpoint stores them less one.
        centred: norms are LayerNorms.
        window: "all" layers have config.sliding_window where it is a number, or those whose config.layer_types say so.
        rotary_layers: attribute of the config, a list that is 0 where a layer has no rotary embedding.
        softcap, logit_softcap: attribute of the config, c in c·tanh(score / c).
        parallel: attribute of the config that says whether attention and MLP read the same stream.
        embedding_multiplier, residual_multiplier, logit_divisor: attribute of the config.
    """

    name: str
    embedding: str = "embed_tokens"
    position_embedding: str | None = None
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_by_head: bool = False
    o_proj: str = "o_proj"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    down_proj: str = "down_proj"
    input_norm: str | None = "input_layernorm"
    pre_feedforward_norm: str | None = "post_attention_layernorm"
    post_attention_norm: str | None = None
    post_feedforward_norm: str | None = None
    head_norms: bool = False
    weight_offset: float = 0.0
    centred: bool = False
    window: Literal["all", "by_type"] | None = None
    rotary_layers: str | None = None
    softcap: str | None = None
    logit_softcap: str | None = None
    parallel: str | None = None
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_divisor: str | None = None


_LLAMA = Family("Llama")
_MISTRAL = replace(_LLAMA, name="Mistral", window="all")
_QWEN2 = replace(_LLAMA, name="Qwen 2", window="by_type")
_QWEN3 = replace(_QWEN2, name="Qwen 3", head_norms=True)
_GEMMA = replace(_LLAMA, name="Gemma", weight_offset=1.0)
_GEMMA2 = replace(
    _GEMMA, name="Gemma 2", window="by_type", softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
    post_attention_norm="post_attention_layernorm", pre_feedforward_norm="pre_feedforward_layernorm",
    post_feedforward_norm="post_feedforward_layernorm",
)  # fmt: skip
# transformers never applies Gemma 3's attn_logit_softcapping, so neither does its description.
_GEMMA3 = replace(_GEMMA2, name="Gemma 3", softcap=None, head_norms=True)
_OLMO2 = replace(
    _LLAMA, name="OLMo 2", head_norms=True, input_norm=None, pre_feedforward_norm=None,
    post_attention_norm="post_attention_layernorm", post_feedforward_norm="post_feedforward_layernorm",
)  # fmt: skip

_GRANITE = replace(
    _LLAMA, name="Granite", embedding_multiplier="embedding_multiplier", residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)  # fmt: skip
_GPT2 = Family(
    "GPT-2", embedding="wte", position_embedding="wpe", layers="h", final_norm="ln_f", attention="attn",
    qkv=("c_attn",), o_proj="c_proj", mlp_inputs=("c_fc",), down_proj="c_proj", input_norm="ln_1",
    pre_feedforward_norm="ln_2", centred=True,
)  # fmt: skip
_GPT_NEOX = Family(
    "GPT-NeoX", embedding="embed_in", final_norm="final_layer_norm", attention="attention", qkv=("query_key_value",),
    qkv_by_head=True, o_proj="dense", mlp_inputs=("dense_h_to_4h",), down_proj="dense_4h_to_h", centred=True,
    parallel="use_parallel_residual",
)  # fmt: skip

FAMILIES: dict[str, Family] = {  # by config.model_type of transformers
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": replace(_MISTRAL, name="Ministral", window="by_type"),
    "mixtral": replace(_MISTRAL, name="Mixtral"),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, name="Qwen 3 MoE", window="all"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, name="OLMo 3", window="by_type"),
    "phi3": replace(_MISTRAL, name="Phi 3", qkv=("qkv_proj",), mlp_inputs=("gate_up_proj",)),
    "smollm3": replace(_LLAMA, name="SmolLM 3", window="by_type", rotary_layers="no_rope_layers"),
    "granite": _GRANITE,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}

_PER_LAYER = "embeddings that enter at every layer"
MISSING = {  # model types whose block does something that no field above says
    "gemma3n": f"AltUp's several residual streams and {_PER_LAYER}",
    "gemma3n_text": f"AltUp's several residual streams and {_PER_LAYER}",
    "gemma4": f"{_PER_LAYER}, keys and values shared between layers, and a norm of values",
    "gemma4_text": f"{_PER_LAYER}, keys and values shared between layers, and a norm of values",
}
