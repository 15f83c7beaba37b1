"""The frame operator and the Gram matrix of a weight matrix, and each feature's share of dimensions.

W is [m, n] with features in columns. F = W Wᵀ [m, m] and M = Wᵀ W [n, n] are the Gram sums of `accumulate`, with
features or neurons as its rows. What is said of every feature comes from the smaller of the two, in blocks of columns:
nothing here grows with n², and W is never copied or widened as a whole unless its scale would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from thought_kernels.ops.accumulate import accumulate
from thought_kernels.ops.checks import FLOATS
from thought_kernels.ops.library import message

_TINY = {torch.float32: 1e-30, torch.float64: 1e-250}  # below this a quotient of products has few digits left
_LOST_DIGITS = 1e-4  # of F's norm: below this a float64 quadratic form keeps fewer than eleven digits
_QR_ROWS = 8192
_BLOCK_ELEMENTS = 2 << 20  # of a block of columns: a product with F runs at full speed, and the block stays in cache


def frame_operator(W: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The frame operator of the features, exactly symmetric and unchanged when features are permuted.

    F = W Wᵀ = Σ_i w_i w_iᵀ

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        dtype: float32 or float64, of the sums; W's own by default, float32 for the 16-bit dtypes.

    Returns:
        ``[m, m]`` in ``dtype``.

    Raises:
        TypeError: W is not a floating tensor, or ``dtype`` is another.
        ValueError: W is not a matrix, is empty, or holds NaN or an infinity.

    Source: Spectral superposition, §2.2, eq. 2.2.
    """
    check_matrix("frame_operator", W)
    return _gram_of_rows(W.detach().T, accumulator_dtype("frame_operator", W, dtype))


def gram(W: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The Gram matrix of the features: n² numbers, so for few features only.

    M = Wᵀ W,  M_ij = w_i · w_j

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        dtype: as in frame_operator.

    Returns:
        ``[n, n]`` in ``dtype``, exactly symmetric.

    Raises:
        TypeError, ValueError: as frame_operator does.

    Source: Spectral superposition, §2.
    """
    check_matrix("gram", W)
    return _gram_of_rows(W.detach(), accumulator_dtype("gram", W, dtype))


def fractional_dimensionality(W: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The fraction of a dimension that each feature has to itself: 1 alone, d/p in a tight frame of p features.

    D_i = ‖w_i‖⁴ / Σ_j (w_i · w_j)² = ‖w_i‖⁴ / (w_iᵀ F w_i),  and 0 for a zero feature

    Two products of size m² n: F, and w_iᵀ F w_i in blocks of columns. Where n < m it is M_ii² / (M²)_ii instead. The
    value does not depend on W's scale, however large or small. Of a feature whose κ_i lies far below F's largest
    eigenvalue float32 loses the digits between them; float64 takes such features from a QR factorisation of W.

    Args:
        W: ``[m, n]``, features in columns; float64, float32, bfloat16 or float16, finite.
        dtype: float32 or float64, of the arithmetic; W's own by default, float32 for the 16-bit dtypes.

    Returns:
        ``[n]`` in ``dtype``, each in [0, 1] to rounding.

    Raises:
        TypeError, ValueError: as frame_operator does.

    Source: Spectral superposition, eq. 3.1 and 3.2, Lemmas B.9 and B.10.
    """
    largest = check_matrix("fractional_dimensionality", W)
    dtype = accumulator_dtype("fractional_dimensionality", W, dtype)
    if largest == 0:
        return torch.zeros(W.shape[1], dtype=dtype, device=W.device)
    W, _ = in_range(W.detach(), largest, dtype)
    if W.shape[1] < W.shape[0]:
        M = _gram_of_rows(W, dtype)
        # A row over its diagonal first: a tiny feature's squares would underflow. M_ij² / M_ii² sums to 1/D_i.
        diagonal = M.diagonal().clone()
        ratios = M.div_(torch.where(diagonal > 0, diagonal, 1)[:, None]).square_().sum(1)
        return torch.where(diagonal > 0, 1 / ratios, 0)
    F = _gram_of_rows(W.T, dtype)
    scale = F.diagonal().max()
    F /= scale
    bound = float(torch.linalg.matrix_norm(F))
    parts, small = [], []
    buffer = F.new_empty(0)
    for columns in column_blocks(W):
        x = W[:, columns].to(dtype)
        unit = x.new_ones(())
        if buffer.shape != x.shape:
            buffer = torch.empty_like(x, memory_format=torch.contiguous_format)
        squared_norm, energy = _norm_and_energy(F, x, buffer)
        if float(energy.min()) < _TINY[dtype]:  # rare: a feature so small that its energy has underflowed, or is zero
            peak = x.abs().amax(0)
            unit = torch.where(peak > 0, peak, 1)
            squared_norm, energy = _norm_and_energy(F, x / unit, buffer)
        ratio = squared_norm / torch.where(energy > 0, energy, 1)
        parts.append(ratio * squared_norm * unit / scale * unit)
        small.append((ratio * _LOST_DIGITS * bound > 1).nonzero()[:, 0] + columns.start)
    dimensionality, lost = torch.cat(parts), torch.cat(small)
    if dtype == torch.float64 and len(lost):
        # A sum of squares does not cancel: w F w = ‖Lᵀ w‖² keeps twice the digits.
        w, L = W[:, lost].double(), triangle(W)
        peak = w.abs().amax(0)
        w /= peak
        ratio = torch.linalg.vector_norm(w, dim=0).square() * peak / torch.linalg.vector_norm(L.T @ w, dim=0)
        dimensionality[lost] = ratio.square()
    return dimensionality


def _norm_and_energy(F: Tensor, x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """‖x_i‖² and x_iᵀ F x_i of the columns of x ``[m, block]``; the buffer has x's shape."""
    energy = torch.mm(F, x, out=buffer).mul_(x).sum(0)
    return torch.mul(x, x, out=buffer).sum(0), energy


def check_matrix(function: str, W: object, name: str = "W") -> float:
    """The largest magnitude in W, after raising the contract's errors for anything but a finite, nonempty matrix."""
    if not isinstance(W, Tensor) or W.layout != torch.strided:
        actual = W.layout if isinstance(W, Tensor) else type(W).__name__
        raise TypeError(message(function, name, "be a dense tensor [m, n]", actual))
    if W.is_meta:
        raise ValueError(message(function, name, "have values", "a tensor on the meta device", "load the weights"))
    if W.dtype not in FLOATS:
        raise TypeError(message(function, name, "be float64, float32, bfloat16 or float16", W.dtype))
    if W.dim() != 2:
        raise ValueError(message(function, name, "be a matrix [m, n], features in columns", list(W.shape)))
    if W.numel() == 0:
        raise ValueError(message(function, name, "have at least one row and one feature", list(W.shape)))
    dense = W.detach().T if W.stride(0) < W.stride(1) else W.detach()  # a transposed W would be copied as a whole
    low, high = (float(bound) for bound in torch.aminmax(dense))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(message(function, name, "be finite", "NaN or an infinity"))
    return max(-low, high)


def accumulator_dtype(function: str, W: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype sums are taken in: the one asked for, or W's, at least float32."""
    if dtype is None:
        return torch.float64 if W.dtype == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(message(function, "dtype", "be torch.float32 or torch.float64", dtype))
    return dtype


def in_range(W: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, int]:
    """W itself, or W / 2^k where squares and their sums could leave the range of ``dtype``; and k."""
    _, exponent = math.frexp(largest)
    if abs(exponent) <= (40 if dtype == torch.float32 else 240):
        return W, 0
    # In float64, since 2^-k may not be a float32; in two steps, since it may not be a float64 either.
    half = exponent // 2
    scaled = W.double() * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent)
    return scaled.to(dtype), exponent


def column_blocks(W: Tensor) -> Iterator[slice]:
    """Slices that cover the columns of W, a bounded number of elements at a time."""
    step = max(64, _BLOCK_ELEMENTS // W.shape[0])
    for start in range(0, W.shape[1], step):
        yield slice(start, start + step)


def _gram_of_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_i a_i a_iᵀ over the rows, by accumulate; its cross product, not wanted here, has one row of zeros."""
    count, size = rows.shape
    total = torch.zeros(size, size, dtype=dtype, device=rows.device)
    unused = torch.zeros(1, size, dtype=dtype, device=rows.device)
    accumulate(unused, rows.new_zeros(1, 1).expand(count, 1), rows, gram=total)
    return total


def triangle(A: Tensor) -> Tensor:
    """L ``[k, k]`` with L Lᵀ = A Aᵀ for A ``[k, long]``, by QR of blocks of columns, never by squaring."""
    k, length = A.shape
    upper = A.new_zeros(0, k, dtype=torch.float64)
    step = max(_QR_ROWS, 2 * k)
    for start in range(0, length, step):
        upper = torch.linalg.qr(torch.cat([upper, A[:, start : start + step].T.double()]), mode="r")[1]
    return upper.T
