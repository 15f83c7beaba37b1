"""RMSNorm of a row, and how it changes when the row is shifted."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from thought_kernels.ops import library
from thought_kernels.ops.checks import check_device, check_float_tensor, check_like, check_number
from thought_kernels.ops.library import message

_NAME = "rms_norm_pair"


def rms_norm_pair(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises x and returns with it the exact change of the norm under ``x + delta``, without subtracting two norms.

    With γ = weight + weight_offset, z a row of x, z' = z + δz, r(z) = (mean z² + eps)^(-1/2)::

        n(z) = γ ⊙ z r
        n(z') − n(z) = γ ⊙ (r' δz + (r' − r) z),     r' − r = −s r² r'² / (r + r'),     s = mean(δz ⊙ (2z + δz))

    so that the change keeps its relative accuracy however small delta is. Given the residual stream, the first output
    is residual + n(x): five passes over memory, x, delta and residual read and both outputs written, where norms and a
    sum of their own take seven. Not differentiable.

    Args:
        x: ``[..., d]``, any float dtype.
        delta: x's shape, any float dtype; float32 beside a bfloat16 x is usual.
        weight: ``[d]``, any float dtype.
        eps: added to the mean square, ≥ 0.
        weight_offset: 1.0 for Gemma, whose weights are stored less one.
        residual: the stream that n(x) is added to, x's shape and dtype.
        backend: "reference", "cpp", "triton", "cuda", or None for the fastest that supports the call.

    Returns:
        n(x), or residual + n(x), in x's dtype, and n(x + delta) − n(x) in delta's dtype; both of x's shape, and new.
        Computed in float64 if x or delta is float64, in float32 otherwise. n(x) is rounded to x's dtype before it is
        added, so that the sum equals that of two calls bit for bit; Triton may round float32 sums once instead.

    Raises:
        ValueError, TypeError: if an argument breaks the rules above, or the named backend cannot run the call.

    Source: Zhang and Sennrich, arXiv:1910.07467, for RMSNorm; the difference form is this project's.
    """
    through_torch = library.dispatched(x, delta, weight, residual)
    run = torch.ops.thought_kernels.rms_norm_pair if through_torch else _run
    return run(x, delta, weight, eps=eps, weight_offset=weight_offset, residual=residual, backend=backend)


@torch.no_grad()
def _run(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, delta, weight, residual, eps, weight_offset)
    chosen = library.choose(_NAME, backend, x.device, functools.partial(_unsupported, x, delta, weight))
    if chosen in ("cpp", "cuda"):
        return library.kernel(f"{_NAME}_{chosen}")(x, delta, weight, residual, eps, weight_offset)
    return library.launcher(_NAME, chosen)(x, delta, weight, residual, eps, weight_offset)


def _unsupported(x: Tensor, delta: Tensor, weight: Tensor, backend: str) -> str | None:
    if backend not in ("triton", "cuda"):
        return None
    if torch.float64 in (x.dtype, delta.dtype, weight.dtype):
        return "it computes in float32"
    if x.shape[-1] > 8192:
        return f"it keeps rows of at most 8192 in registers, not {x.shape[-1]}"
    return library.interpreter_unsupported(x, delta, weight) if backend == "triton" else None


def _fake(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, delta, weight, residual, eps, weight_offset)
    return x.new_empty(x.shape), delta.new_empty(x.shape)


def _check(x: Tensor, delta: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float) -> None:
    check_float_tensor(_NAME, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(message(_NAME, "x", "be [..., d] with d ≥ 1", list(x.shape)))
    for name, tensor in (("delta", delta), ("weight", weight)):
        check_float_tensor(_NAME, name, tensor)
        check_device(_NAME, name, tensor, "x", x)
    if residual is not None:
        check_like(_NAME, "residual", residual, "x", x)
    for name, other in (("delta", delta), ("residual", residual)):
        if other is not None and other.shape != x.shape:
            raise ValueError(message(_NAME, name, f"have x's shape {list(x.shape)}", list(other.shape)))
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(message(_NAME, "weight", f"be [d] with d = {x.shape[-1]}", list(weight.shape)))
    check_number(_NAME, "eps", eps, or_zero=True)
    check_number(_NAME, "weight_offset", weight_offset)


library.declare(
    "rms_norm_pair(Tensor x, Tensor delta, Tensor weight, *, float eps, float weight_offset=0.0,"
    " Tensor? residual=None, str? backend=None) -> (Tensor, Tensor)",
    implementation=_run,
    fake=_fake,
)
for _backend in ("cpp", "cuda"):
    library.declare_kernel(
        f"{_NAME}_{_backend}(Tensor x, Tensor delta, Tensor weight, Tensor? residual, float eps, float weight_offset)"
        " -> (Tensor, Tensor)"
    )
