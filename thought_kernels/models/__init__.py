"""Model families: `describe(model)` turns a transformers model into the one description the rest of the package uses.

    families   one short description per family: what modules are called, and what its block does with them
    from_family  the Decoder of a model by its family's description
    decoder    Decoder: embedding, blocks, final norm, head
    block      Block: the arithmetic between the sites that patches act on (no architecture named)
    norm       RMSNorm and LayerNorm, and their change in difference form
    linear     weights of linear modules, and which library forms their float32 products on a CPU
    quantised  weights of quantised modules as the numbers that they stand for
    load       a model and its tokenizer from a folder, the hub or a GGUF file
    sharded    weights and activations that tensor parallelism has divided among processes
    undisturbed  dropout, autocast and the package's own attention off while activations are compared

A further family is one more description in `families.FAMILIES`.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.models.families import FAMILIES, MISSING
from thought_kernels.models.from_family import build
from thought_kernels.models.sharded import check_whole

__all__ = ["FAMILIES", "Block", "Decoder", "describe", "family_names", "in_memory", "unsupported"]


def describe(model: nn.Module | Decoder) -> Decoder:
    """The blocks of a transformers model, described in the terms of theory §1.

    Nothing is copied: the description reads the model's own modules each time, so patches, hooks, dtype changes and
    moves to another device made later are seen. A Decoder is returned as it is; of a model wrapped by torch.compile,
    peft, DataParallel or DistributedDataParallel it is the model inside that is described, adapters included.

    Args:
        model: a transformers model whose `config.model_type` is in `families.FAMILIES`, such as LlamaForCausalLM or
            Gemma3ForConditionalGeneration, on any device or several.

    Returns:
        The Decoder.

    Raises:
        TypeError: if no family's description serves the model.
        ValueError: if the model is of a supported kind with a feature that the mathematics does not cover, such as
            bidirectional attention, or peft puts tokens of its own before the prompt.
    """
    if isinstance(model, Decoder):
        return model
    if isinstance(model, str | os.PathLike):
        raise TypeError(
            f"describe: model must be a loaded model, got the name {os.fspath(model)!r}; "
            "model, tokenizer = tk.load(...) loads it"
        )
    model = _unwrapped(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise TypeError(unsupported("describe", f"{type(model).__name__} of type {model_type!r}", model_type))
    return build(model, FAMILIES[model_type])


def family_names() -> str:
    """The families as people write them, for messages."""
    return ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))


def unsupported(function: str, actual: str, model_type: str | None) -> str:
    """The sentence that refuses a model of a type that no description serves."""
    if model_type is None and "Tokenizer" in actual:
        return f"{function}: model must be a transformers model, got {actual}; give the model first, then its tokenizer"
    missing = MISSING.get(model_type or "", "")
    return f"{function}: model must be of one of the families {family_names()}, got {actual}; " + (
        f"its blocks have {missing}, which no description covers yet"
        if missing
        else "a further family needs a description in thought_kernels/models/families.py"
    )


def in_memory(function: str, model: Any, *, divided: bool = False) -> Decoder:
    """The model's Decoder, for functions that read its weights themselves.

    Args:
        function: opens the error's sentence.
        model: as for describe.
        divided: whether weights may be divided among processes, which all make this call.

    Raises:
        ValueError: weights that are not in memory, such as those that accelerate has offloaded, or that tensor
            parallelism has divided.
        TypeError, ValueError: as describe.
    """
    decoder = describe(model)
    for name, parameter in decoder.model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{function}: model must have its weights in memory, got {name} on the meta device; load it without "
                "offloading, in a narrower dtype if it is too large"
            )
    if not divided:
        check_whole(function, decoder.model)
    return decoder


def _unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's, peft's and data parallelism's wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
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
