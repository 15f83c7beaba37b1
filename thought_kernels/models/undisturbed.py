"""A model that computes what it would in inference, whatever mode its owner left it in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Dropout off in every module and autocast off on the model's device, both restored afterwards.

    The flags are set one by one: modules that merge weights or the like in their own `train()` do nothing of it here.

    Args:
        model: a torch module with parameters.
    """
    training = [module for module in model.modules() if module.training]
    device = next(iter(model.parameters())).device.type
    try:
        for module in training:
            module.training = False
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
