"""The power law that the largest eigenvalues of a weight matrix follow, if any: its density's heavy tail."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.library import message

MIN_EIGENVALUES = 50  # fewer say nothing about a tail; WeightWatcher stops at the same number
MIN_TAIL = 10  # a law through fewer points fits anything
_CHUNK = 4 << 20  # elements of the table of distances held at once


class Tail(NamedTuple):
    """A power law p(λ) ∝ λ^-α for λ ≥ x_min.

    Attributes:
        alpha: maximum-likelihood exponent.
        x_min: where the tail begins, in the units of the eigenvalues.
        distance: Kolmogorov-Smirnov distance between the tail and its law, as power_law_tail takes it.
        length: eigenvalues in the tail.
        low, high: 95 % interval of alpha given x_min; the choice of x_min is not counted in it.
    """

    alpha: float
    x_min: float
    distance: float
    length: int
    low: float
    high: float


def power_law_tail(
    eigenvalues: Tensor, *, min_eigenvalues: int = MIN_EIGENVALUES, min_tail: int = MIN_TAIL
) -> Tail | None:
    """The power law that fits the largest eigenvalues best, or None where there are too few.

    For each start x of a tail, α = 1 + n / Σ ln(λ_i / x) over the n eigenvalues at or above x, which is the maximum
    likelihood. The start is the one whose tail is nearest to its own law, in the largest distance between the
    cumulative distributions; the empirical one is taken just below each eigenvalue, as in the authors' own program and
    in the packages powerlaw and weightwatcher, so that exponents compare. The interval is α ± 1.96 (α − 1) / √n.

    Args:
        eigenvalues: of W Wᵀ, ``[r]``, in any order, nonnegative; zeros do not count.
        min_eigenvalues: with fewer positive ones there is no answer.
        min_tail: a tail has at least as many.

    Returns:
        The Tail; None with too few eigenvalues, or where all in every tail are equal.

    Raises:
        TypeError, ValueError: not a vector of finite nonnegative numbers, or a limit below 2.

    Source: Clauset, Shalizi and Newman, "Power-law distributions in empirical data", 2009, eq. 3.1, 3.2 and 3.9; of
        weights' spectra, Martin and Mahoney, "Implicit self-regularization in deep neural networks", 2021.
    """
    values = _checked(eigenvalues)
    for name, number in (("min_eigenvalues", min_eigenvalues), ("min_tail", min_tail)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 2:
            raise ValueError(message("power_law_tail", name, "be an integer of at least 2", repr(number)))
    logs = values[values > 0].sort().values.log()
    total = len(logs)
    if total < max(min_eigenvalues, min_tail):
        return None
    # Candidates: every distinct eigenvalue that leaves min_tail at or above it; of equal ones the first.
    starts = torch.arange(total - min_tail + 1)
    starts = starts[(starts == 0) | (logs[starts] > logs[(starts - 1).clamp(min=0)])]
    counts = total - starts
    # Σ ln(λ / x) from the top down, relative to the largest, so that nothing large is subtracted.
    below_top = (logs - logs[-1]).flip(0).cumsum(0).flip(0)
    spread = below_top[starts] - counts * (logs[starts] - logs[-1])
    usable = spread > 1e-12 * counts
    starts, counts, spread = starts[usable], counts[usable], spread[usable]
    if not len(starts):
        return None
    exponents = counts / spread  # α − 1
    distances = _distances(logs, starts, counts, exponents)
    best = int(distances.argmin())
    alpha, count = 1 + float(exponents[best]), int(counts[best])
    half = 1.96 * (alpha - 1) / math.sqrt(count)
    x_min = math.exp(float(logs[starts[best]]))
    return Tail(alpha, x_min, float(distances[best]), count, alpha - half, alpha + half)


def _distances(logs: Tensor, starts: Tensor, counts: Tensor, exponents: Tensor) -> Tensor:
    """max |S(λ) − P(λ)| of each tail over its eigenvalues, S the share of the tail strictly below λ."""
    total, found = len(logs), []
    positions = torch.arange(total, dtype=torch.float64)
    for chunk in torch.arange(len(starts)).split(max(1, _CHUNK // total)):
        first = starts[chunk, None]
        law = -torch.expm1(-(exponents[chunk, None] * (logs - logs[starts[chunk], None])))  # 1 − (λ/x)^(1−α)
        gap = (law - (positions - first) / counts[chunk, None]).abs()
        found.append(gap.masked_fill(positions < first, 0).amax(1))
    return torch.cat(found)


def _checked(eigenvalues: Tensor) -> Tensor:
    if not isinstance(eigenvalues, Tensor) or not eigenvalues.is_floating_point():
        actual = eigenvalues.dtype if isinstance(eigenvalues, Tensor) else type(eigenvalues).__name__
        raise TypeError(message("power_law_tail", "eigenvalues", "be a floating tensor [r]", actual))
    if eigenvalues.dim() != 1:
        raise ValueError(message("power_law_tail", "eigenvalues", "be a vector [r]", list(eigenvalues.shape)))
    values = eigenvalues.detach().to("cpu", torch.float64)
    if len(values) and not (bool(values.isfinite().all()) and float(values.min()) >= 0):
        raise ValueError(message("power_law_tail", "eigenvalues", "be finite and nonnegative", "others"))
    return values
