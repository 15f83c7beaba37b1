"""Tiny random Gemma 3 models and tokenizers, so that tests need no download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}  # full layers of Gemma 3 4B and up
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64}

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# The shape of Gemma 3's own template: BOS inside, system text folded into the first user turn, contents trimmed,
# contents as text or as a list of parts.
GEMMA_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""


def tiny_text_config(**changes: Any) -> Gemma3TextConfig:
    """Odd sizes, grouped queries, head_dim ≠ hidden/heads, a score scale of its own, two windows' worth of layers."""
    settings: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 36, "intermediate_size": 52, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": dict(LINEAR_ROPE),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    settings |= changes
    settings["num_hidden_layers"] = len(settings["layer_types"])
    return Gemma3TextConfig(**settings)


def tiny_gemma3(
    seed: int = 0, dtype: torch.dtype = torch.float32, *, attention: str = "eager", **changes: Any
) -> Gemma3ForCausalLM:
    """A random Gemma3ForCausalLM in eval mode; `changes` go to Gemma3TextConfig, `attention` is HF's implementation."""
    config = tiny_text_config(**changes)
    config._attn_implementation = attention
    return randomised(Gemma3ForCausalLM(config), seed, dtype)


def tiny_multimodal_gemma3(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Gemma3ForConditionalGeneration:
    """A random Gemma3ForConditionalGeneration, vision tower included, in eval mode."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = Gemma3Config(
        text_config=tiny_text_config(**changes), vision_config=vision, mm_tokens_per_image=4, image_token_index=63,
        boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return randomised(Gemma3ForConditionalGeneration(config), seed, dtype)


def randomised(model: Any, seed: int, dtype: torch.dtype) -> Any:
    """Weights drawn anew from `seed`, large enough that attention is far from uniform; norms and biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    assert isinstance(model, PreTrainedModel)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), *, template: str | None = GEMMA_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Characters as tokens, plus whole words for the turn names; `merges` join pairs of tokens, across newlines too.

    Every printable ASCII character and a few others are tokens, a space is written ▁, anything else is <unk>.
    """
    characters = [chr(code) for code in range(33, 127)] + ["▁", "\n", "é", "à"]
    words = [("u", "s"), ("us", "e"), ("use", "r"), ("m", "o"), ("mo", "d"), ("mod", "e"), ("mode", "l")]
    pairs = [*words, *merges]
    vocabulary = [*SPECIAL_TOKENS, *characters, *dict.fromkeys(first + second for first, second in pairs)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, pairs, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = template
    return fast
