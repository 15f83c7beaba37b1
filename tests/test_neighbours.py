"""Features by name: who takes whose dimension, clusters, and what became of a matrix."""

from __future__ import annotations

import pytest
import torch
from figures import polygon, simplex, union
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.comparison import compare_matrices
from thought_kernels.spectral.inspect_changes import shuffled_change
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


def test_zero_features_are_left_out_before_the_mean() -> None:
    W, order = normal(8, 30) + 5, [*range(7), *range(12, 35)]
    padded = torch.zeros(8, 40, dtype=torch.float64)
    padded[:, order] = W
    names = [f"token {i}" for i in range(40)]
    plain, found = shared_features(W, centred=True), shared_features(padded, names, centred=True)
    assert (plain.zero_features, found.zero_features, found.features) == (0, 10, 40)
    assert [one.index for one in found.most_shared] == [order[one.index] for one in plain.most_shared]
    assert [one.name for one in found.least_shared] == [f"token {order[one.index]}" for one in plain.least_shared]
    for name in ("common", "mean_dimensionality", "null_dimensionality", "linked", "clustered"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-12), name
    for one, other in zip(found.most_shared, plain.most_shared, strict=True):
        assert (one.dimensionality, one.norm) == pytest.approx((other.dimensionality, other.norm), rel=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_noise_is_its_own_null_at_both_ends(centred: bool) -> None:
    W = normal(40, 400)
    kept = W.clone()
    found = shared_features(W, centred=centred)
    assert torch.equal(W, kept)  # shuffled elsewhere
    assert found.null.mean_dimensionality == pytest.approx(found.mean_dimensionality, rel=0.02)
    for told, null in ((found.most_shared, found.null.most_shared), (found.least_shared, found.null.least_shared)):
        for name, scatter in (("dimensionality", 0.1), ("norm", 0.1), ("residual", 0.25)):  # ten extremes of 400
            mean = sum(getattr(one, name) for one in told) / len(told)
            assert getattr(null, name) == pytest.approx(mean, rel=scatter), name
        assert null.share == pytest.approx(sum(one.neighbours[0].share for one in told) / len(told), rel=0.3)
        assert null.cosine == pytest.approx(sum(abs(one.neighbours[0].cosine) for one in told) / len(told), rel=0.3)
    assert (found.clustered, found.null.clustered, found.null.largest_cluster) == (0, 0, 0)


def test_shuffled_entries_have_no_clusters() -> None:
    groups = normal(40, 10)[:, torch.arange(300) % 10] + 0.1 * normal(40, 300, seed=1)
    found = shared_features(groups)
    assert found.clustered == 300 and len(found.clusters) == 10
    assert (found.null.clustered, found.null.largest_cluster) == (0, 0)
    shared = sum(one.dimensionality for one in found.most_shared) / 10
    assert found.null.most_shared.dimensionality > 2 * shared
    assert found.null.most_shared.cosine < 0.8 < found.most_shared[0].neighbours[0].cosine


def test_numbers_and_what_has_no_features_are_refused_by_name() -> None:
    W = normal(6, 9)
    for arguments, sentence in (
        ({"count": 0}, "shared_features: count must be at least 1, got 0"),
        ({"count": -1}, "shared_features: count must be at least 1, got -1"),
        ({"neighbours": -1}, "shared_features: neighbours must be at least 0, got -1"),
        ({"clusters": -1}, "shared_features: clusters must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            shared_features(W, **arguments)
    for value in (1.0, 0.1):  # a mean of tenths is rounded
        with pytest.raises(ValueError, match="shared_features: W must differ from its mean where centred, got"):
            shared_features(torch.full((4, 7), value), centred=True)
    one = shared_features(torch.ones(3, 1), neighbours=0, clusters=0)
    assert one.most_shared[0].neighbours == () and one.clusters == () and one.null.most_shared.share == 0


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


def test_a_shuffled_change_knows_nothing_of_the_matrix() -> None:
    W = torch.logspace(0, -1, 40, dtype=torch.float64)[:, None] * normal(40, 160)
    step = 0.05 * spectral.frame_spectrum(W).frame_basis[:, :1] @ normal(1, 160, seed=1)
    kept, other = W.clone(), W + step
    found, null = compare_matrices(W, other), shuffled_change(W, other)
    assert torch.equal(W, kept) and torch.equal(other, W + step)
    assert found["top_share"] == pytest.approx(1) and null["top_share_null"] == pytest.approx(0.1, abs=0.03)
    assert found["stable_rank"] == pytest.approx(1) and null["stable_rank_null"] > 10
    chance = W + 0.05 * normal(40, 160, seed=2)
    figures, nulls = compare_matrices(W, chance), shuffled_change(W, chance)
    for name, scatter in (("stable_rank", 0.1), ("dimensionality_change", 0.1), ("other_saturation", 0.02)):
        assert nulls[f"{name}_null"] == pytest.approx(figures[name], rel=scatter), name
    assert nulls["spectral_distance_null"] == pytest.approx(figures["spectral_distance"], abs=0.05)
