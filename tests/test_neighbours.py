"""Features by name: who takes whose dimension, clusters, and what became of a matrix."""

from __future__ import annotations

import pytest
import torch
from figures import polygon, simplex, union
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.comparison import compare_matrices
from thought_kernels.spectral.neighbours import shared_features


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_are_the_parts_of_one_over_d() -> None:
    W = normal(6, 15)
    names = [f"token {i}" for i in range(15)]
    found = shared_features(W, names, count=15, neighbours=14)
    products = (W.T @ W).square()
    assert [one.index for one in found.most_shared] == [one.index for one in reversed(found.least_shared)]
    for one in found.most_shared:
        i = one.index
        assert one.name == names[i]
        assert one.dimensionality == pytest.approx(float(products[i, i] / products[i].sum()), rel=1e-9)
        for other in one.neighbours:
            j = names.index(other.name)
            assert other.share == pytest.approx(float(products[i, j] / products[i].sum()), rel=1e-9)
            cosine = float(W[:, i] @ W[:, j] / (W[:, i].norm() * W[:, j].norm()))
            assert other.cosine == pytest.approx(cosine, rel=1e-9)
        # ‖w‖⁴ of its own and all others make the whole.
        assert one.dimensionality + sum(other.share for other in one.neighbours) == pytest.approx(1, rel=1e-9)
        shares = [other.share for other in one.neighbours]
        assert shares == sorted(shares, reverse=True)
    assert found.mean_dimensionality == pytest.approx(float(spectral.fractional_dimensionality(W).mean()), rel=1e-9)
    assert found.null_dimensionality == pytest.approx(6 / 21)


def test_clusters_are_found_and_named() -> None:
    """A digon and a 13-gon among directions of their own; the triangle's cosines are too small to link it."""
    W = union(torch.eye(60, dtype=torch.float64), simplex(1), polygon(13), 3 * simplex(2))
    W = torch.cat([W, torch.zeros(len(W), 1, dtype=torch.float64)], 1)
    found = shared_features(W, count=5)
    assert found.linked < 0.9
    told = {cluster.geometry: cluster.names for cluster in found.clusters}
    assert told == {"13-gon": tuple(str(i) for i in range(62, 75)), "digon": ("60", "61")}
    assert [len(cluster.names) for cluster in found.clusters] == [13, 2]
    assert found.most_shared[0].dimensionality == pytest.approx(2 / 13)
    assert found.least_shared[0].dimensionality == pytest.approx(1)
    with pytest.raises(ValueError, match="shared_features: names must be 79, one for each feature, got 1"):
        shared_features(W, ["a"])
    with pytest.raises(ValueError, match="shared_features: W must have a nonzero feature"):
        shared_features(torch.zeros(2, 3))


def test_the_mean_vector_can_be_taken_away() -> None:
    W = normal(8, 30) + 5
    plain, centred = shared_features(W), shared_features(W, centred=True)
    mean = W.mean(1)
    assert plain.common == centred.common == pytest.approx(30 * float(mean @ mean / W.square().sum()), rel=1e-9)
    assert plain.mean_dimensionality < 0.1 < centred.mean_dimensionality
    without = spectral.fractional_dimensionality(W - mean[:, None])
    assert centred.mean_dimensionality == pytest.approx(float(without.mean()), rel=1e-6)


def test_a_change_is_told_by_where_it_is() -> None:
    W = torch.logspace(0, -1, 20, dtype=torch.float64)[:, None] * normal(20, 80)
    spectrum = spectral.frame_spectrum(W)
    along = spectrum.frame_basis[:, :1] @ normal(1, 80, seed=1)
    found = compare_matrices(W, W + 0.01 * along)
    assert found["change"] == pytest.approx(0.01 * float(along.norm() / W.norm()), rel=1e-6)
    assert found["stable_rank"] == pytest.approx(1) and found["top_share"] == pytest.approx(1)
    chance = compare_matrices(W, W + 0.01 * normal(20, 80, seed=2))
    assert chance["top_share"] == pytest.approx(0.1, abs=0.05) and chance["stable_rank"] > 5
    D, E = spectral.fractional_dimensionality(W), spectral.fractional_dimensionality(W + 0.01 * along)
    assert found["dimensionality_change"] == pytest.approx(float((E - D).abs().mean() / D.mean()), rel=1e-6)
    rotated = torch.linalg.qr(normal(20, 20, seed=3))[0] @ W
    turned = compare_matrices(W, rotated)
    assert turned["spectral_distance"] <= 0.05 and turned["dimensionality_change"] <= 1e-9 and turned["change"] > 1
    same = compare_matrices(W, W)
    assert (same["change"], same["stable_rank"], same["top_share"]) == (0, 0, 0)
    assert compare_matrices(W, 2 * W)["spectral_distance"] > 0.2
    with pytest.raises(ValueError, match="compare_matrices: other must be"):
        compare_matrices(W, W.T)
