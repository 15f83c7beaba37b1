"""What all rows of a batch begin with, run once: its keys and values serve every row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from thought_kernels.generation.padding import Ids
from thought_kernels.models.roomy_cache import repeated
from thought_kernels.prompts.cuts import common_length


def shared_length(prompts: Ids) -> int:
    """How many tokens all prompts begin with; a token of each is left to say what comes first."""
    return min(common_length(min(map(list, prompts)), max(map(list, prompts))), min(map(len, prompts)) - 1)


def run_prefix(model: Any, ids: Sequence[int]) -> dict[str, Any]:
    """The cache of a prefix as a keyword argument of the model, none for an empty one."""
    if not ids:
        return {}
    row = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    return cache_of(model(input_ids=row, use_cache=True, logits_to_keep=1))


def behind(prefix: dict[str, Any], rows: int, width: int, room: int = 0) -> dict[str, Any]:
    """A copy of the cache for so many rows, of so many tokens, and room for more; the prefix stays as it is."""
    cache = copy.deepcopy(prefix)
    for kept in cache.values():
        repeated(kept, rows, width, room)
    return cache


def cache_of(output: Any) -> dict[str, Any]:
    """A model's cache under the name that this version of transformers has for it, as output and as argument."""
    name = next(name for name in ("cache", "past_key_values") if name in output)
    return {name: output[name]}


def sees_all(model: Any, length: int) -> bool:
    """Whether every layer sees so many places of the cache.

    Windows count places, and padding behind a prefix takes some: rows of different lengths are right behind a prefix
    only while all are seen.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = None if kinds and "sliding_attention" not in kinds else getattr(config, "sliding_window", None)
    return window is None or length <= window
