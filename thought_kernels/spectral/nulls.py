"""What matrices without structure give: independent entries, by formula, and a matrix's own entries, shuffled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import triangle

_GRID = 4096  # points of the Marchenko-Pastur distribution function; its error is far below any bulk's own scatter
_AT_ONCE = 4 << 20  # entries that are shuffled at once
_SAMPLE = 512  # features whose D and CV stand for all
_EDGE = 4.0  # Tracy-Widom widths above the edge: of 50 x 50 noise one matrix in 500 has an eigenvalue beyond
_FAR = 0.2  # of a bulk, what lies elsewhere than the law has it, from which on it is none


def null_saturation(m: int, n: int) -> float:
    """The saturation that independent entries give.

    Σ D_i / rank → max(m, n) / (m + n), which is 1 / (1 + m/n) where m ≤ n

    Since ‖w_i‖² ≈ m v and w_iᵀ F w_i ≈ ‖w_i‖⁴ + n m v² for entries of variance v, D_i ≈ m / (m + n).

    Args:
        m, n: rows and features, at least one of each.

    Raises:
        ValueError: none of either.

    Source: ours, from SS eq. 3.1.
    """
    if m < 1 or n < 1:
        raise ValueError(message("null_saturation", "m and n", "be at least 1", f"{m} and {n}"))
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
        spikes: eigenvalues above the upper edge by more than four Tracy-Widom widths; None where there is no such bulk:
            they would be more than half of all, or the rest is more than 0.2 away from the law.
        share: of Σ λ that the spikes hold, or None.
        distance: Kolmogorov-Smirnov, between the eigenvalues up to the edge and the law.
    """

    variance: float
    lower: float
    upper: float
    spikes: int | None
    share: float | None
    distance: float


def marchenko_pastur(eigenvalues: Tensor, m: int, n: int) -> Bulk:
    """The Marchenko-Pastur law of the bulk of a spectrum, and what stands out above it.

    The eigenvalues of W Wᵀ for independent entries of variance v fill v (√long ∓ √short)². v is such that the law's
    median is the spectrum's; what then lies above the edge is left out of the median, until no more does. Above the
    edge by 4 v (√long + √short) (1/√long + 1/√short)^(1/3), Gaussian noise has next to no eigenvalues (one matrix of
    20 x 20 in a hundred has one, of 50 x 50 one in five hundred): those are spikes. A heavy-tailed or smooth spectrum
    has no such bulk: where more than half of the eigenvalues would be left out, or the rest is far from the law,
    nothing is there to stand out from, and no spikes are counted.

    Args:
        eigenvalues: of W Wᵀ, ``[min(m, n)]`` in any order, nonnegative; those that are missing count as 0.
        m, n: the shape of W.

    Returns:
        The Bulk.

    Raises:
        ValueError: no positive eigenvalue, NaN or an infinity, or more of them than min(m, n).

    Source: Marchenko and Pastur, "Distribution of eigenvalues for some sets of random matrices", 1967; the width of the
        edge is Johnstone's, "On the distribution of the largest eigenvalue in principal components analysis", 2001.
    """
    short, long = min(m, n), max(m, n)
    values = eigenvalues.detach().to("cpu", torch.float64).sort().values
    if not bool(torch.isfinite(values).all()):
        raise ValueError(message("marchenko_pastur", "eigenvalues", "be finite", "NaN or an infinity"))
    if len(values) > short or not len(values) or float(values[-1]) <= 0:
        actual = f"{len(values)} of a {m} x {n} matrix"
        raise ValueError(message("marchenko_pastur", "eigenvalues", "be up to min(m, n), one positive", actual))
    values = torch.cat([values.new_zeros(short - len(values)), values])
    rounding = (short * torch.finfo(torch.float32).eps) ** 2  # of a matrix of less than full rank: no bulk
    values = torch.where(values > rounding * values[-1], values, 0)
    places, below = _unit_law(short / long)  # of λ / (v long)
    median = float(places[int(torch.searchsorted(below, 0.5))])
    top = (1 + math.sqrt(short / long)) ** 2
    width = _EDGE * (1 + math.sqrt(short / long)) * (1 + math.sqrt(long / short)) ** (1 / 3) * long ** (-2 / 3)
    kept, collapsed = short, False
    while True:
        bulk = values[:kept]
        middle = float(bulk[kept // 2] + bulk[(kept - 1) // 2]) / 2
        variance = middle / median / long
        inside = int((values <= variance * long * (top + width)).sum())
        collapsed = inside < short / 2
        if inside >= kept or collapsed:
            break
        kept = inside
    bulk = values[:kept]
    law = bulk.new_ones(kept)
    if variance:
        law = torch.from_numpy(np.interp((bulk / (variance * long)).numpy(), places.numpy(), below.numpy()))
    steps = torch.arange(kept + 1, dtype=torch.float64) / kept
    distance = float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())
    lower = variance * long * (1 - math.sqrt(short / long)) ** 2
    collapsed = collapsed or distance > max(_FAR, 8 / short)  # a few eigenvalues scatter by some 1/short
    spikes = None if collapsed else short - kept
    share = None if collapsed else float(values[kept:].sum() / values.sum())
    return Bulk(variance, lower, variance * long * top, spikes, share, distance)


def bulk_half_width(m: int, n: int) -> float:
    """(λ₊ − λ₋)/(λ₊ + λ₋) of the Marchenko-Pastur law's edges, 2 √(mn) / (m + n): Theorem 11's ω of a noise feature."""
    return 2 * math.sqrt(m * n) / (m + n)


class Shuffled(NamedTuple):
    """Figures of a matrix whose entries were shuffled.

    Attributes:
        eigenvalues: of its frame operator ``[min(m, n)]`` float64, largest first.
        saturation: Σ D_i / rank.
        residual: median CV_i.
    """

    eigenvalues: Tensor
    saturation: float
    residual: float


def shuffled_figures(W: Tensor, seed: int = 0) -> Shuffled:
    """What the entries of W give in another order, at a part of the cost of measuring W.

    Features are taken in random order, and a few millions of entries at a time are shuffled: of a matrix of any size
    only so many are in memory twice. D_i and CV_i are those of up to 512 of the features that are not zero then, whose
    mean D stands for all of these. Singular values count as frame_spectrum counts them, down to what squaring leaves.

    Args:
        W: ``[m, n]``, features in columns, finite and not all zero.
        seed: of the order.
    """
    m, n = W.shape
    generator = torch.Generator().manual_seed(seed)
    dense = W if W.is_contiguous() else W.T  # of a transposed matrix aminmax would make a copy
    largest = max(abs(float(bound)) for bound in torch.aminmax(dense))
    exponent = math.frexp(largest)[1]  # squares of what is left are of any dtype's range
    F = torch.zeros(min(m, n), min(m, n), dtype=torch.float64)
    samples, present = F[:, :0], 0
    for block in _shuffled_blocks(W, exponent, generator):
        F += block @ block.T
        nonzero = block[:, block.abs().amax(0) > 0]
        present += nonzero.shape[1]
        samples = torch.cat([samples, nonzero[:, : _SAMPLE - samples.shape[1]]], 1)
    norms, image = samples.square().sum(0), F @ samples
    rayleigh = (samples * image).sum(0) / norms
    residuals = torch.linalg.vector_norm(image - rayleigh * samples, dim=0) / (rayleigh * norms.sqrt())
    eigenvalues = torch.linalg.eigvalsh(F).flip(0).clamp(min=0)
    eps = torch.finfo(W.dtype if W.dtype == torch.float64 else torch.float32).eps
    cut = max((max(m, n) * eps) ** 2, len(F) * torch.finfo(torch.float64).eps)
    rank = int((eigenvalues > cut * eigenvalues[0]).sum())
    saturation = float((norms / rayleigh).mean()) * present / rank
    return Shuffled(eigenvalues * 4.0**exponent, saturation, float(residuals.median()))


def _shuffled_blocks(W: Tensor, exponent: int, generator: torch.Generator) -> Iterator[Tensor]:
    """W / 2^exponent in blocks of columns in random order, the entries of each shuffled; float64, no taller than wide.

    Of a W that is taller than wide one block ``[n, n]`` with the same Gram matrix.
    """
    m, n = W.shape
    scale = torch.tensor(-exponent)
    order = torch.randperm(n, generator=generator).to(W.device)
    for chosen in order.split(max(_SAMPLE, _AT_ONCE // m) if m <= n else n):
        block = torch.ldexp(W[:, chosen].cpu().double(), scale).flatten()
        block = block[torch.randperm(block.numel(), generator=generator)].view(m, -1)
        yield block if m <= n else triangle(block.T).T


def spectral_distance(first: Tensor, second: Tensor, count: int) -> float:
    """Kolmogorov-Smirnov distance between two spectra of ``count`` eigenvalues each; missing ones are 0."""
    both = [torch.cat([values.new_zeros(count - len(values)), values.sort().values]) for values in (first, second)]
    at = torch.cat(both)
    below = [torch.searchsorted(values, at, right=True) for values in both]
    return float((below[0] - below[1]).abs().max()) / count


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
