"""Model adapters: `describe(model)` turns a transformers model into the one description the rest of the package uses.

    decoder    Block and Decoder, the description, and the arithmetic of a block (no architecture named)
    linear     which library forms the float32 products of linear modules on a CPU
    gemma3     where Gemma 3 keeps its parts, for every class and size that transformers has
    undisturbed  dropout and autocast off while activations are compared

A further architecture is one more file with a `describe` function and one more line in `ADAPTERS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from thought_kernels.models.decoder import Block, Decoder

__all__ = ["ADAPTERS", "Block", "Decoder", "describe", "in_memory"]

ADAPTERS = {  # config.model_type of transformers -> the module whose describe(model) serves it
    "gemma3": "thought_kernels.models.gemma3",
    "gemma3_text": "thought_kernels.models.gemma3",
}


def describe(model: nn.Module | Decoder) -> Decoder:
    """The blocks of a transformers model, described in the terms of theory §1.

    Nothing is copied: the description reads the model's own modules each time, so patches, hooks, dtype changes and
    moves to another device made later are seen. A Decoder is returned as it is; of a model wrapped by torch.compile or
    peft it is the model inside that is described, adapters included.

    Args:
        model: a transformers model whose `config.model_type` is in `ADAPTERS`, such as Gemma3ForCausalLM or
            Gemma3ForConditionalGeneration, on any device or several.

    Returns:
        The Decoder.

    Raises:
        TypeError: if no adapter serves the model.
        ValueError: if the model is of a supported kind with a feature that the mathematics does not cover, such as
            bidirectional attention, or peft puts tokens of its own before the prompt.
    """
    if isinstance(model, Decoder):
        return model
    model = _unwrapped(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ADAPTERS:
        raise TypeError(
            f"describe: model must be a transformers model of type {' or '.join(ADAPTERS)}, got {type(model).__name__}"
            f" of type {model_type!r}; a further architecture needs one file like thought_kernels/models/gemma3.py"
        )
    adapter: Decoder = import_module(ADAPTERS[model_type]).describe(model)
    return adapter


def in_memory(function: str, model: Any) -> Decoder:
    """The model's Decoder, for functions that read its weights themselves.

    Args:
        function: opens the error's sentence.
        model: as for describe.

    Raises:
        ValueError: weights that are not in memory, such as those that accelerate has offloaded.
        TypeError, ValueError: as describe.
    """
    decoder = describe(model)
    for name, parameter in decoder.model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{function}: model must have its weights in memory, got {name} on the meta device; load it without "
                "offloading, in a narrower dtype if it is too large"
            )
    return decoder


def _unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's and peft's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif any(kind.__module__.startswith("peft.") for kind in type(model).__mro__):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise ValueError(
                    f"describe: model must read its prompt only, got {type(model).__name__} with learned tokens before "
                    "it; an instruction cannot be told from those"
                )
            # Mixed models and bare tuners, which have no such method, hand the name on to the model inside.
            model = model.get_base_model() if hasattr(model, "get_base_model") else model.model
        else:
            return model
