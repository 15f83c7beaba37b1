"""Tiny models as GGUF files with float32 weights, which llama.cpp runs as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

ARCHITECTURES = {"llama": "llama", "granite": "granite", "qwen2": "qwen2", "gemma3_text": "gemma3"}
_INTERLEAVED = ("llama", "granite")  # whose rotary pairs are neighbours there, and halves of a head in transformers


def write_model(model: Any, path: Path) -> Path:
    """The model as llama.cpp's own converter would write it, without a vocabulary."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, array in _weights(model, architecture):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(model: Any, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in model.named_parameters():
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = 1 + tensor
        if architecture in _INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            heads = model.config.num_attention_heads if ".q_proj." in name else model.config.num_key_value_heads
            tensor = _interleaved(tensor, heads)
        yield name, tensor.detach().float().contiguous().numpy()


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
