"""What matrices without structure give: independent entries, by formula, and a matrix's own entries, shuffled."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.spectrum import decompose

_GRID = 4096  # points of the Marchenko-Pastur distribution function; its error is far below any bulk's own scatter
_EDGE = 4.0  # Tracy-Widom widths above the edge: beyond lies one eigenvalue in 2,000 noise matrices


def null_saturation(m: int, n: int) -> float:
    """The saturation that independent entries give.

    Σ D_i / rank → max(m, n) / (m + n), which is 1 / (1 + m/n) where m ≤ n

    Since ‖w_i‖² ≈ m v and w_iᵀ F w_i ≈ ‖w_i‖⁴ + n m v² for entries of variance v, D_i ≈ m / (m + n).

    Args:
        m, n: rows and features.

    Source: ours, from SS eq. 3.1.
    """
    return max(m, n) / (m + n)


def shuffled(W: Tensor, seed: int = 0) -> Tensor:
    """W with all its entries in another order: the same values and Frobenius norm, and no structure.

    Args:
        W: ``[m, n]``.
        seed: of the order.

    Returns:
        A new tensor like W.
    """
    order = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(seed))
    return W.detach().flatten()[order.to(W.device)].view(W.shape)


class Bulk(NamedTuple):
    """A Marchenko-Pastur law through the bulk of a spectrum.

    Attributes:
        variance: of the entries that would make the bulk, in the units of λ / max(m, n).
        lower, upper: the law's edges, variance · (√long ∓ √short)², in the units of λ.
        spikes: eigenvalues above the upper edge by more than four Tracy-Widom widths.
        share: of Σ λ that the spikes hold.
        distance: Kolmogorov-Smirnov, between the eigenvalues up to the edge and the law.
    """

    variance: float
    lower: float
    upper: float
    spikes: int
    share: float
    distance: float


def marchenko_pastur(eigenvalues: Tensor, m: int, n: int) -> Bulk:
    """The Marchenko-Pastur law of the bulk of a spectrum, and what stands out above it.

    The eigenvalues of W Wᵀ for independent entries of variance v fill v (√long ∓ √short)². v is such that the law's
    median is the spectrum's; what then lies above the edge is left out of the median, until no more does. Above the
    edge by 4 v (√long + √short) (1/√long + 1/√short)^(1/3), noise has no eigenvalues: those are spikes. A heavy-tailed
    spectrum has no such bulk, and the distance says so.

    Args:
        eigenvalues: of W Wᵀ, ``[min(m, n)]`` in any order, nonnegative; those that are missing count as 0.
        m, n: the shape of W.

    Returns:
        The Bulk.

    Raises:
        ValueError: no positive eigenvalue, or more of them than min(m, n).

    Source: Marchenko and Pastur, "Distribution of eigenvalues for some sets of random matrices", 1967; the width of the
        edge is Johnstone's, "On the distribution of the largest eigenvalue in principal components analysis", 2001.
    """
    short, long = min(m, n), max(m, n)
    values = eigenvalues.detach().to("cpu", torch.float64).sort().values
    if len(values) > short or not len(values) or float(values[-1]) <= 0:
        actual = f"{len(values)} of a {m} x {n} matrix"
        raise ValueError(message("marchenko_pastur", "eigenvalues", "be up to min(m, n), one positive", actual))
    values = torch.cat([values.new_zeros(short - len(values)), values])
    places, below = _unit_law(short / long)  # of λ / (v long)
    median = float(places[int(torch.searchsorted(below, 0.5))])
    top = (1 + math.sqrt(short / long)) ** 2
    width = _EDGE * (1 + math.sqrt(short / long)) * (1 + math.sqrt(long / short)) ** (1 / 3) * long ** (-2 / 3)
    kept = short
    while True:
        bulk = values[:kept]
        middle = float(bulk[kept // 2] + bulk[(kept - 1) // 2]) / 2
        variance = middle / median / long
        inside = int((values <= variance * long * (top + width)).sum())
        if inside >= kept or inside == 0:
            break
        kept = inside
    bulk = values[:kept]
    law = bulk.new_ones(kept)
    if variance:
        law = torch.from_numpy(np.interp((bulk / (variance * long)).numpy(), places.numpy(), below.numpy()))
    steps = torch.arange(kept + 1, dtype=torch.float64) / kept
    distance = float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())
    lower = variance * long * (1 - math.sqrt(short / long)) ** 2
    share = float(values[kept:].sum() / values.sum())
    return Bulk(variance, lower, variance * long * top, short - kept, share, distance)


def shuffled_spectrum(W: Tensor, seed: int = 0) -> Tensor:
    """The positive eigenvalues of W Wᵀ with the entries shuffled, largest first, float64."""
    check_matrix("shuffled_spectrum", W)
    return decompose("shuffled_spectrum", shuffled(W, seed)).all_eigenvalues


def _unit_law(ratio: float) -> tuple[Tensor, Tensor]:
    """Places x and the share of the law below each, for v · long = 1 and short / long = ratio.

    Density √((b − x)(x − a)) / (2 π ratio x). With x = (a + b)/2 − (b − a)/2 cos t the integrand is smooth.
    """
    a, b = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    t = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * (math.pi / _GRID)
    x = (a + b) / 2 - (b - a) / 2 * t.cos()
    mass = ((b - a) / 2 * t.sin()).square() / x
    below = mass.cumsum(0) - mass / 2
    return x, below / mass.sum()
