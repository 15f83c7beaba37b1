"""Short hashes of weights and data, so that kept results are not taken for those of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def fingerprint(model: Any) -> str:
    """A short hash of a model's weights, so that results of one checkpoint are not taken for another's."""
    return tensors_hash(model.named_parameters())[:16]


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors that notices any change of a name, a shape, a dtype or a single bit.

    It reads bytes and adds nothing up: sums round differently with another number of threads or on another CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_hash(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
