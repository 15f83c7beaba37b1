"""What `accumulate` is timed against: the sums as other code computes them, into the outputs by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """delta and activation [rows, d] in one dtype, weights [rows] float32."""

    delta: Tensor
    activation: Tensor
    weights: Tensor


Outputs = dict[str, Tensor]


def upcast(inputs: Inputs, out: Outputs) -> None:
    """What quantisation and model-editing tools do: H += x.float().T @ x.float(), on whole batches."""
    dtype = out["cross"].dtype
    w = inputs.weights.to(dtype)
    factor = (w / inputs.activation.to(dtype).norm(dim=1))[:, None]
    out["cross"] += inputs.delta.to(dtype).T @ (factor * inputs.activation.to(dtype))
    out["gram"] += inputs.activation.to(dtype).T @ (factor * inputs.activation.to(dtype))
    out["delta_sum"] += inputs.delta.to(dtype).T @ w
    out["activation_sum"] += inputs.activation.to(dtype).T @ w


def einsum(inputs: Inputs, out: Outputs) -> None:
    """The formulas as they stand in a paper."""
    d, a, w = inputs.delta.float(), inputs.activation.float(), inputs.weights
    factor = w / a.norm(dim=1)
    out["cross"] += torch.einsum("n,nd,nk->dk", factor, d, a)
    out["gram"] += torch.einsum("n,nd,nk->dk", factor, a, a)
    out["delta_sum"] += torch.einsum("n,nd->d", w, d)
    out["activation_sum"] += torch.einsum("n,nd->d", w, a)


def bare_loop(inputs: Inputs, out: Outputs) -> None:
    """cross alone, without weights, norms, gram or sums: for tokens that need nothing else."""
    for d, a in zip(inputs.delta, inputs.activation, strict=True):
        out["cross"] += torch.outer(d, a)


def per_token(inputs: Inputs, out: Outputs) -> None:
    """All that accumulate does, one d x d matrix per token and product, with the scaling moved to the vector."""
    for d, a, w in zip(inputs.delta, inputs.activation, inputs.weights, strict=True):
        d, a = d.float(), a.float()
        scaled = a * (w / a.norm())
        out["cross"] += torch.outer(d, scaled)
        out["gram"] += torch.outer(a, scaled)
        out["delta_sum"] += w * d
        out["activation_sum"] += w * a


def per_token_as_printed(inputs: Inputs, out: Outputs) -> None:
    """All that accumulate does, with the formula as it is printed: H += w * outer(delta, a) / norm(a)."""
    for d, a, w in zip(inputs.delta, inputs.activation, inputs.weights, strict=True):
        d, a = d.float(), a.float()
        out["cross"] += w * torch.outer(d, a) / a.norm()
        out["gram"] += w * torch.outer(a, a) / a.norm()
        out["delta_sum"] += w * d
        out["activation_sum"] += w * a


def bare_products(inputs: Inputs) -> tuple[str, Callable[[Outputs], None]]:
    """The strongest peer: cross and gram as two bare products; scaling and widening are done beforehand, untimed."""
    factor = (inputs.weights / inputs.activation.float().norm(dim=1))[:, None]
    if inputs.delta.device.type == "cpu":
        left, right = inputs.delta.float(), inputs.activation.float()
        scaled = right * factor
    else:
        left, right = inputs.delta, inputs.activation
        scaled = (right.float() * factor).to(right.dtype)
    mixed = scaled.dtype != torch.float32

    def run(out: Outputs) -> None:
        for total, operand in ((out["cross"], left), (out["gram"], right)):
            if mixed:
                torch.addmm(total, operand.T, scaled, out_dtype=torch.float32, out=total)
            else:
                total.addmm_(operand.T, scaled)

    name = "two addmm(out_dtype=float32), scaled before" if mixed else "two addmm_ on inputs scaled before"
    return name, run
