"""The slow way, written independently of the package: hooks on whole transformers forwards, one example at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """transformers computes norms, angles and softmax in float32 even in a float64 model; in here, in float64."""
    softmax = nn.functional.softmax
    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)),
    ):
        yield


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Collects per block what goes into its modules and what comes out.

    Inputs: of o_proj ("attention"), of the MLP ("mlp"), of down_proj ("down"), h ("residual") and x ("stream");
    outputs: of the MLP ("m") and of the block ("y").
    """
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        places = {
            "attention": layer.self_attn.o_proj, "mlp": layer.mlp, "residual": layer.pre_feedforward_layernorm,
            "down": layer.mlp.down_proj,
        }  # fmt: skip

        def keep(module: Any, args: Any, key: tuple[int, str]) -> None:
            seen[key] = args[0][0].double()

        for name, module in (("m", layer.mlp), ("y", layer)):
            handles.append(module.register_forward_hook(lambda m, _, out, key=(index, name): keep(m, [out], key)))

        for site, module in places.items():
            handles.append(module.register_forward_pre_hook(lambda m, a, key=(index, site): keep(m, a, key)))
        handles.append(layer.register_forward_pre_hook(lambda m, a, key=(index, "stream"): keep(m, a, key)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model: Any, ids: list[int], last: int) -> dict[tuple[int, str], Tensor]:
    """Everything recorded over the last `last` tokens of one forward of a float64 model."""
    assert model.dtype == torch.float64
    with recorded(model) as seen, float64_throughout():
        model(torch.tensor([ids]))
    return {key: value[-last:] for key, value in seen.items()}


def sums(pairs: list[tuple[Tensor, Tensor]], norm: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Σ (1/n) δ aᵀ/ν, Σ (1/n) a aᵀ/ν and Σ (1/n) δ over examples of (with, without) rows, token by token."""
    return row_sums([(prime - plain, plain, torch.ones(len(plain), dtype=plain.dtype)) for prime, plain in pairs], norm)


def row_sums(examples: list[tuple[Tensor, Tensor, Tensor]], norm: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Σ (s/n) δ aᵀ/ν, Σ (s/n) a aᵀ/ν and Σ (s/n) δ over examples of rows (δ, a, s), token by token."""
    (d_out, d_in) = (tensor.shape[1] for tensor in examples[0][:2])
    cross, gram, delta_sum = torch.zeros(d_out, d_in), torch.zeros(d_in, d_in), torch.zeros(d_out)
    cross, gram, delta_sum = cross.double(), gram.double(), delta_sum.double()
    for rows in examples:
        for delta, a, share in zip(*rows, strict=True):
            weight = share / len(rows[0])
            scale = weight / (a.norm() if norm else 1)
            cross += scale * torch.outer(delta, a)
            gram += scale * torch.outer(a, a)
            delta_sum += weight * delta
    return cross, gram, delta_sum
