"""A model that computes what it would in inference, whatever mode its owner left it in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from thought_kernels.models.attention_interface import NAME
from thought_kernels.models.linear import fast_linears


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Dropout off in every module and autocast off on the model's device, both restored afterwards.

    The flags are set one by one: modules that merge weights or the like in their own `train()` do nothing of it here.
    Where the package's own attention function is set, which takes no padding on the left, transformers' eager one is.
    Its linear modules are fast ones (`fast_linears`).

    Args:
        model: a torch module with parameters.
    """
    training = [module for module in model.modules() if module.training]
    device = next(iter(model.parameters())).device.type
    every = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    ours = [config for config in every if getattr(config, "_attn_implementation", None) == NAME]
    try:
        for module in training:
            module.training = False
        for config in ours:
            config._attn_implementation = {"": "eager"}  # "": of this config alone, not of those in it
        with torch.autocast(device, enabled=False), fast_linears(model):
            yield
    finally:
        for module in training:
            module.training = True
        for config in ours:
            config._attn_implementation = {"": NAME}
