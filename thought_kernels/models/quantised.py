"""Quantised linear modules: their weights as the numbers that they stand for.

Nothing here is needed to run such a module, which is called like any other: only who reads W itself needs these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.models.linear import input_width, is_plain, linear_weight

_ROWS = 4096


def dequantised(module: Any) -> Tensor | None:
    """W [d_out, d_in] of torchao's weights and of torch's own quantised modules, which unpack themselves, else None."""
    weight = getattr(module, "weight", None)
    if callable(weight):  # torch's own modules, whose numbers lie in an object of their own
        weight = weight()
    return weight.dequantize() if isinstance(weight, Tensor) and unpacks(weight) else None


def unpacks(weight: Tensor) -> bool:
    """Whether ``dequantize`` makes an ordinary tensor of it."""
    return weight.is_quantized or type(weight).dequantize is not Tensor.dequantize


def weight_of(module: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The weight of an embedding, or W [d_out, d_in] of a linear module, as it is kept; None of what is not at hand.

    Of a module that wraps another one, such as peft's, it is the inner one's: adapters are no part of it. Offloaded
    weights (on meta) and sharded ones (DTensor) are not at hand.

    Args:
        module: the module, or None.
        dtype, device: as called_weight's.
    """
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if is_plain(getattr(module, "weight", None)):
        return linear_weight(module)
    if not isinstance(module, nn.Module) or not all(map(_is_at_hand, _tensors(module))):
        return None
    found = dequantised(module)
    # A class of its own knows its layout; torch's own has nothing but its weight, which is of a kind unknown here.
    if found is None and type(module) is not nn.Linear and hasattr(module, "in_features"):
        return called_weight(module, input_width(module), dtype, device)
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _is_at_hand(tensor: Tensor) -> bool:
    return not tensor.is_meta and not hasattr(tensor, "device_mesh")


@torch.no_grad()
def called_weight(module: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W [d_out, d_in] of whatever is linear, read off by what it makes of unit vectors: W eᵢ + b less b.

    Of activations that a module rounds to few bits, unit vectors are the ones that stay as they are. bitsandbytes' own
    unpacking will not do: on some CPUs its modules pack their weights anew at their first call, and it does not know
    it. Hooks, which may be a patch's, take no part. Where there is a bias, W is as exact as W + b is in `dtype`.

    Args:
        module: takes [..., d_in].
        width: d_in.
        dtype: of the activations that it takes.
        device: where it is, if it has neither parameters nor buffers to tell.
    """
    place = next(_tensors(module), torch.empty(0, device=device)).device
    constant = module.forward(torch.zeros(1, width, dtype=dtype, device=place))
    columns = []
    for start in range(0, width, _ROWS):
        units = torch.zeros(min(_ROWS, width - start), width, dtype=dtype, device=place)
        units.diagonal(start).fill_(1)
        columns.append(module.forward(units) - constant)
    return torch.cat(columns).T
