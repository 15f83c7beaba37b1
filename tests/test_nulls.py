"""Matrices without structure: what they give by formula, and the Marchenko-Pastur law with what stands out of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.nulls import marchenko_pastur, null_saturation, shuffled, shuffled_figures


def normal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("m, n", [(200, 200), (100, 400), (50, 1000), (400, 100)])
def test_independent_entries_have_the_saturation_of_the_formula(m: int, n: int) -> None:
    found = spectral.saturation(normal(m, n))
    # D_i scatters by about √(2/m) and is averaged over n features; the bias is of the order 1/m.
    assert found == pytest.approx(null_saturation(m, n), abs=4 / min(m, n))


def test_shuffling_keeps_the_entries_and_nothing_else() -> None:
    W = normal(40, 3) @ normal(3, 120)  # of rank 3, hence far from its null
    other = shuffled(W, 1)
    assert torch.equal(other.flatten().sort().values, W.flatten().sort().values)
    assert not torch.equal(other, shuffled(W, 2)) and torch.equal(other, shuffled(W, 1))
    assert spectral.frame_spectrum(other).rank == 40
    assert spectral.saturation(other) == pytest.approx(null_saturation(40, 120), abs=0.1)


@pytest.mark.parametrize("m, n", [(300, 300), (200, 600), (600, 200), (60, 3000)])
@pytest.mark.parametrize("deviation", [1e-3, 2.0])
def test_noise_is_a_bulk_without_spikes(m: int, n: int, deviation: float) -> None:
    eigenvalues = spectral.empirical_spectral_density(deviation * normal(m, n)).eigenvalues
    bulk = marchenko_pastur(eigenvalues, m, n)
    short, long = min(m, n), max(m, n)
    # The median of short eigenvalues scatters by less than 1/short of the spectrum's width: they repel one another.
    assert bulk.variance == pytest.approx(deviation**2, rel=20 / short)
    assert bulk.upper == pytest.approx(bulk.variance * (math.sqrt(m) + math.sqrt(n)) ** 2)
    assert bulk.lower == pytest.approx(bulk.variance * (math.sqrt(long) - math.sqrt(short)) ** 2, abs=1e-12)
    assert (bulk.spikes, bulk.share) == (0, 0)
    assert bulk.distance <= 8 / short


@pytest.mark.parametrize("m, n", [(300, 300), (200, 600), (600, 200)])
def test_planted_spikes_are_counted(m: int, n: int) -> None:
    """Singular values s of a rank-one part stand out from √(mn)^(1/2) on (Benaych-Georges and Nadakuditi, 2012)."""
    left, right = (torch.linalg.qr(normal(size, 5, seed=1))[0] for size in (m, n))
    strengths = torch.tensor([1.6, 2.0, 3.0, 5.0, 9.0], dtype=torch.float64) * (m * n) ** 0.25
    W = normal(m, n) + (left * strengths) @ right.T
    bulk = marchenko_pastur(spectral.empirical_spectral_density(W).eigenvalues, m, n)
    assert bulk.spikes == 5
    # Of a planted s² an eigenvalue (s² + m)(s² + n)/s² is left.
    expected = ((strengths**2 + m) * (strengths**2 + n) / strengths**2).sum()
    total = W.square().sum()
    assert bulk.share == pytest.approx(float(expected / total), rel=0.1)
    assert bulk.variance == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.9])
def test_the_distance_is_to_the_law(ratio: float) -> None:
    """Eigenvalues at the law's own quantiles, by trapezoids under its density, are next to nothing away."""
    short, long = 400, round(400 / ratio)
    a, b = (1 - math.sqrt(short / long)) ** 2, (1 + math.sqrt(short / long)) ** 2
    x = np.linspace(a, b, 200_001)
    density = np.sqrt(np.clip((b - x) * (x - a), 0, None)) / (2 * np.pi * short / long * x)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    assert below[-1] == pytest.approx(1, abs=2e-3)
    quantiles = np.interp((np.arange(short) + 0.5) / short, below / below[-1], x)
    bulk = marchenko_pastur(torch.from_numpy(quantiles * long), short, long)
    assert bulk.distance <= 0.5 / short + 3e-3 and bulk.spikes == 0
    assert bulk.variance == pytest.approx(1, rel=5e-3)


def test_a_heavy_tail_has_no_such_bulk() -> None:
    entries = normal(300, 600) / torch.rand(300, 600, generator=torch.Generator().manual_seed(2)).double() ** 0.7
    bulk = marchenko_pastur(spectral.empirical_spectral_density(entries).eigenvalues, 300, 600)
    noise = marchenko_pastur(spectral.empirical_spectral_density(normal(300, 600)).eigenvalues, 300, 600)
    assert bulk.spikes > 0 and bulk.distance > 3 * noise.distance


@pytest.mark.parametrize("m, n, slope", [(576, 576, 2), (576, 1536, 2), (300, 4000, 3)])
def test_where_most_would_be_spikes_none_are_counted(m: int, n: int, slope: float) -> None:
    """λ_k = k^(−slope) has no bulk to stand out from."""
    short = min(m, n)
    smooth = torch.arange(1, short + 1, dtype=torch.float64) ** -slope
    bulk = marchenko_pastur(smooth, m, n)
    assert bulk.spikes is None and bulk.share is None and bulk.distance > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_no_bulk(dtype: torch.dtype) -> None:
    W = (normal(20, 5) @ normal(5, 30, seed=1)).to(dtype)
    assert marchenko_pastur(torch.linalg.svdvals(W).square(), 20, 30).spikes is None


def test_how_often_noise_has_a_spike() -> None:
    """One matrix of 50 x 50 in five hundred: of 600 eight or more are all but impossible (Poisson, 1.2: 5e-5)."""
    noise = torch.randn(600, 50, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = [marchenko_pastur(values.square(), 50, 50).spikes for values in torch.linalg.svdvals(noise)]
    assert sum(count != 0 for count in found) < 8


@pytest.mark.parametrize(
    "W",
    [
        torch.eye(64),
        normal(60, 60),
        normal(80, 30),
        normal(20, 3000).relu(),
        (torch.rand(16, 2000, generator=torch.Generator().manual_seed(3)) < 0.01).double(),
    ],
)
def test_figures_of_shuffled_entries_are_those_of_a_shuffled_matrix(W: Tensor) -> None:
    """Means over orders, since each order has figures of its own."""
    others = [shuffled(W, seed) for seed in range(30)]
    found = [shuffled_figures(W, seed) for seed in range(30)]
    for name, values in {
        "saturation": [spectral.saturation(other) for other in others],
        "residual": [float(one[one > 0].median()) for one in map(spectral.eigenvector_residual, others)],
    }.items():
        wanted, mean = np.mean(values), np.mean([getattr(one, name) for one in found])
        scatter = (np.std(values) + np.std([getattr(one, name) for one in found])) / 30**0.5
        assert abs(mean - wanted) <= 5 * scatter + 1e-9, name


def test_next_to_nothing_shuffled_has_figures() -> None:
    W = torch.zeros(4, 2000)
    W[0, :2] = 1.0
    for seed in range(8):
        found = shuffled_figures(W, seed)
        assert 0 < found.saturation <= 1 + 1e-9 and found.residual >= 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="null_saturation: m and n must be at least 1, got 0 and 3"):
        null_saturation(0, 3)
    with pytest.raises(ValueError, match="marchenko_pastur: eigenvalues must be finite, got NaN"):
        marchenko_pastur(torch.tensor([1.0, math.nan]), 4, 5)
    for values in (torch.zeros(3), torch.ones(9), torch.ones(0)):
        with pytest.raises(ValueError, match="marchenko_pastur: eigenvalues must be up to min"):
            marchenko_pastur(values, 4, 5)
