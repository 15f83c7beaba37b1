"""A low-rank product whose rows each have the factors of one of several patches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from thought_kernels.ops import library
from thought_kernels.ops.checks import check_device, check_float_tensor, check_like, check_range, check_row_integers
from thought_kernels.ops.library import message

_NAME = "gathered_low_rank"


def gathered_low_rank(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    index: Tensor,
    *,
    vector: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiplies each row of a batch with the low-rank factors that it picks, which are read where they lie.

    With V_p = right[p], U_pᵀ = left[p] and v_p = vector[p]::

        y[b, t] = residual[b, t] + x[b, t] V_p U_pᵀ + v_p        p = index[b]
        y[b, t] = residual[b, t]                                  index[b] = −1

    That is 2 · B · T · r · (d_in + d_out) FLOPs. A step of decoding waits for the factors, r · (d_in + d_out) numbers a
    patch: no row has a copy of them, and the C++ kernel reads them once for the rows of a patch together (for every 64
    tokens, where there are more). It gives a row the same bits beside whatever other rows, on however many threads.
    Beside y, B · T · r numbers are allocated, up to d_in / 128 times as many where rows are few. Not differentiable.

    >>> right, left = torch.ones(2, 3, 1), torch.tensor([[[1.0, 2.0]], [[0.0, 5.0]]])  # two patches of rank 1
    >>> gathered_low_rank(torch.ones(3, 1, 3), right, left, torch.tensor([1, -1, 0]))[:, 0]
    tensor([[ 0., 15.],
            [ 0.,  0.],
            [ 3.,  6.]])

    Args:
        x: ``[B, T, d_in]``, any float dtype.
        right: ``[P, d_in, r]``, float32 or float64, the dtype of the arithmetic; float64 where x or residual is. A
            patch of a smaller rank has zeros behind it.
        left: ``[P, r, d_out]``, right's dtype. A last stride of 1 in both factors saves a copy of them.
        index: integers ``[B]``, −1 for none.
        vector: ``[P, d_out]``, right's dtype, or None.
        residual: ``[B, T, d_out]``, any float dtype, or None. It is left as it is.
        backend: "reference", "cpp", "triton", "cuda", or None for the fastest that supports the call.

    Returns:
        ``[B, T, d_out]``, new and contiguous, in residual's dtype, or x's where there is none; rounded once.

    Raises:
        ValueError, TypeError: if an argument breaks the rules above, or the named backend cannot run the call.

    Source: Chen et al., Punica, arXiv:2310.18547, §4 (segmented gather matrix-vector products); the patches are those
        of Transmuting prompts into weights, eq. 4, truncated.
    """
    through_torch = library.dispatched(x, right, left, index, vector, residual)
    run = torch.ops.thought_kernels.gathered_low_rank if through_torch else _run
    return run(x, right, left, index, vector=vector, residual=residual, backend=backend)


@torch.no_grad()
def gathered(
    x: Tensor, right: Tensor, left: Tensor, index: Tensor, vector: Tensor | None, residual: Tensor | None
) -> Tensor:
    """gathered_low_rank for callers that know their arguments to be right, in a hot path.

    Nothing is checked, and the index, int64, is not looked at: on a GPU nobody waits for it.
    """
    if library.dispatched(x, right, left, index, vector, residual):
        return gathered_low_rank(x, right, left, index, vector=vector, residual=residual)
    return _launched(x, right, left, index, vector, residual, None)


@torch.no_grad()
def _run(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    index: Tensor,
    *,
    vector: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    _check(x, right, left, index, vector, residual)
    check_range(_NAME, "index", index, -1, len(right) - 1)
    return _launched(x, right, left, index.long(), vector, residual, backend)


def _launched(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    index: Tensor,
    vector: Tensor | None,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    chosen = library.choose(_NAME, backend, x.device, functools.partial(_unsupported, x, right, residual))
    launch = library.kernel(f"{_NAME}_cpp") if chosen == "cpp" else library.launcher(_NAME, chosen)
    return launch(x, right, left, index, vector, residual)


def _unsupported(x: Tensor, right: Tensor, residual: Tensor | None, backend: str) -> str | None:
    if backend != "triton":
        return None
    if right.dtype == torch.float64:
        return "it computes in float32"
    return library.interpreter_unsupported(x, residual)


def _fake(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    index: Tensor,
    *,
    vector: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    _check(x, right, left, index, vector, residual)
    like = x if residual is None else residual
    return like.new_empty(*x.shape[:2], left.shape[2])


def _check(
    x: Tensor, right: Tensor, left: Tensor, index: Tensor, vector: Tensor | None, residual: Tensor | None
) -> None:
    check_float_tensor(_NAME, "x", x)
    if x.dim() != 3:
        raise ValueError(message(_NAME, "x", "be [B, T, d_in]", list(x.shape)))
    check_float_tensor(_NAME, "right", right)
    check_device(_NAME, "right", right, "x", x)
    for name, tensor in (("left", left), ("vector", vector)):
        if tensor is not None or name == "left":
            check_like(_NAME, name, tensor, "right", right)
    if residual is not None:
        check_float_tensor(_NAME, "residual", residual)
        check_device(_NAME, "residual", residual, "x", x)
    _check_dtype(x, right, residual)
    _check_shapes(x, right, left, vector, residual)
    check_row_integers(_NAME, "index", index, x, "x")


def _check_dtype(x: Tensor, right: Tensor, residual: Tensor | None) -> None:
    """What is wider than the arithmetic would lose digits that the rows without a patch must keep."""
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.dtype == torch.float64 and right.dtype != torch.float64:
            raise TypeError(message(_NAME, "right", f"be torch.float64 beside {name} in torch.float64", right.dtype))
    if right.dtype not in (torch.float32, torch.float64):
        raise TypeError(message(_NAME, "right", "be float32 or float64", right.dtype, "pass right.float()"))


def _check_shapes(x: Tensor, right: Tensor, left: Tensor, vector: Tensor | None, residual: Tensor | None) -> None:
    batch, length, d_in = x.shape
    if right.dim() != 3 or right.shape[1] != d_in:
        raise ValueError(message(_NAME, "right", f"be [P, d_in, r] with d_in = {d_in}", list(right.shape)))
    patches, _, rank = right.shape
    if left.dim() != 3 or left.shape[:2] != (patches, rank):
        rule = f"be [P, r, d_out] with P = {patches} and r = {rank}"
        raise ValueError(message(_NAME, "left", rule, list(left.shape)))
    d_out = left.shape[2]
    if vector is not None and vector.shape != (patches, d_out):
        rule = f"be [P, d_out] with P = {patches} and d_out = {d_out}"
        raise ValueError(message(_NAME, "vector", rule, list(vector.shape)))
    if residual is not None and residual.shape != (batch, length, d_out):
        rule = f"have shape {[batch, length, d_out]}"
        raise ValueError(message(_NAME, "residual", rule, list(residual.shape)))


library.declare(
    "gathered_low_rank(Tensor x, Tensor right, Tensor left, Tensor index, *, Tensor? vector=None,"
    " Tensor? residual=None, str? backend=None) -> Tensor",
    implementation=_run,
    fake=_fake,
)
library.declare_kernel(
    "gathered_low_rank_cpp(Tensor x, Tensor right, Tensor left, Tensor index, Tensor? vector, Tensor? residual,"
    " str? instructions=None) -> Tensor"
)
