"""Exact frames in every disguise: dimensionality, leverage, saturation, clusters and the names of figures."""

from __future__ import annotations

import math
from collections import Counter

import figures
import pytest
import torch
from figures import FIGURES, disguise, polygon, simplex, square_antiprism, union
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import largest

from thought_kernels import spectral

UNIONS = {  # figures and the scales they come in; equal scales of one figure merge into one cluster
    "games of chance": [("triangle", 1.0), ("digon", 1.0)],
    "two equal triangles": [("triangle", 0.7), ("triangle", 0.7)],
    "cube and antiprism": [("cube", 1.0), ("square antiprism", 2.0)],
    "many": [("pentagon", 1.0), ("tetrahedron", 3.0), ("orthonormal basis", 0.1), ("digon", 0.3), ("simplex", 50.0)],
    "apart by 1 %": [("hexagon", 1.0), ("hexagon", 1.01), ("digon", 5.0)],
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FIGURES)), st.integers(0, 10**6), st.integers(0, 4), st.sampled_from([1e-9, 0.3, 1.0, 1e7])
)
def test_a_figure_is_known_in_any_disguise(name: str, seed: int, extra: int, scale: float) -> None:
    figure, dimension = FIGURES[name]
    W, _ = disguise(figure, seed, extra=extra, scale=scale)
    count = W.shape[1]
    expected = torch.full((count,), dimension / count, dtype=torch.float64)
    assert largest(spectral.fractional_dimensionality(W) - expected) <= 1e-10
    assert largest(spectral.leverage(W) - expected) <= 1e-10
    assert largest(spectral.slack(W)) <= 1e-10 and largest(spectral.eigenvector_residual(W)) <= 1e-10
    assert abs(spectral.saturation(W) - 1) <= 1e-10
    (frame,) = spectral.tight_frames(W)
    assert frame.features.tolist() == list(range(count)) and frame.dimension == dimension
    assert frame.eigenvalue == pytest.approx(scale**2 * count / dimension, rel=1e-10)
    assert frame.residual <= 1e-10
    assert spectral.identify_geometry(frame) == spectral.identify_geometry(W) == name
    assert spectral.identify_geometry(W.float()) == name
    assert set(spectral.classify_features(W)) == {"localized"}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(UNIONS)), st.integers(0, 10**6), st.integers(0, 3))
def test_unions_come_apart(name: str, seed: int, extra: int) -> None:
    parts = UNIONS[name]
    W = union(*(scale * FIGURES[figure][0] for figure, scale in parts))
    W = torch.cat([W, torch.zeros(len(W), 2, dtype=torch.float64)], 1)  # and two zero features
    counts = [FIGURES[figure][0].shape[1] for figure, _ in parts] + [2]
    owner = torch.tensor([*range(len(parts)), -1]).repeat_interleave(torch.tensor(counts))
    W, order = disguise(W, seed, extra=extra)
    owner = owner[order]
    expected = torch.zeros(len(owner), dtype=torch.float64)
    for index, (figure, _) in enumerate(parts):
        expected[owner == index] = FIGURES[figure][1] / FIGURES[figure][0].shape[1]
    assert largest(spectral.fractional_dimensionality(W) - expected) <= 1e-10
    assert largest(spectral.leverage(W) - expected) <= 1e-10
    assert abs(spectral.saturation(W) - 1) <= 1e-10
    frames = spectral.tight_frames(W)
    assert len(frames) == len(set(parts))
    assert [frame.eigenvalue for frame in frames] == sorted((frame.eigenvalue for frame in frames), reverse=True)
    found = Counter()
    for frame in frames:
        members = {parts[index][0] for index in owner[frame.features].tolist()}
        assert len(members) == 1, "a cluster holds figures of one eigenvalue only"
        copies = len(set(owner[frame.features].tolist()))
        (figure,) = members
        assert spectral.identify_geometry(frame) == (f"{figure} union" if copies > 1 else figure)
        for component in spectral.identify_components(frame):
            assert len(set(owner[component.features].tolist())) == 1
            found[component.geometry] += 1 if figure != "orthonormal basis" else 0.25  # of four vectors
    assert found == Counter(figure for figure, _ in parts)
    classes = spectral.classify_features(W)
    assert classes.counts == {"localized": len(owner) - 2, "band-localized": 0, "broadband": 0, "zero": 2}
    for fit in spectral.projective_linearity(W):
        assert fit.error <= 1e-10 and fit.r_squared >= 1 - 1e-10 and fit.localization >= 1 - 1e-10
        assert fit.slope * fit.eigenvalue == pytest.approx(1, abs=1e-10)


NOT_A_FIGURE = {
    "random": torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    "a prism turned by 30 degrees": square_antiprism(30.0),
    "a simplex with one vector turned round": simplex(4) * torch.tensor([1, 1, 1, 1, -1]),
    "a pentagon's corner missing": polygon(5)[:, 1:],
    "a pentagon with one vector longer": polygon(5) * torch.tensor([1, 1, 1, 1, 1.01]),
    "a cone over a pentagon": torch.cat([polygon(5), torch.ones(1, 5, dtype=torch.float64)]),
    "zero": torch.zeros(3, 4, dtype=torch.float64),
    "a triangle with a zero feature": torch.cat([simplex(2), torch.zeros(2, 1, dtype=torch.float64)], 1),
    "a triangle beside something else": union(simplex(2), polygon(5)[:, 1:]),
    "two triangles at 20 degrees": torch.cat([polygon(18)[:, ::6], polygon(18)[:, 1::6]], 1),
}


@pytest.mark.parametrize("name", list(NOT_A_FIGURE))
def test_other_clusters_have_no_name(name: str) -> None:
    assert spectral.identify_geometry(NOT_A_FIGURE[name]) is None


def test_different_figures_of_one_eigenvalue_are_both_named() -> None:
    W = union(simplex(2), math.sqrt(0.75) * simplex(1))
    (frame,) = spectral.tight_frames(W)
    assert spectral.identify_geometry(frame) == "digon + triangle"
    assert [c.features.tolist() for c in spectral.identify_components(frame)] == [[0, 1, 2], [3, 4]]


def test_a_noisy_figure_needs_a_tolerance() -> None:
    W = figures.cube() + 1e-3 * torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert spectral.identify_geometry(W) is None
    assert spectral.identify_geometry(W, tol=0.02) == "cube"


def test_figures_of_equal_spectrum_have_different_schemes() -> None:
    turned = 2**0.5 / 3
    for build, valencies, values, dimensions in (
        (figures.cube, [1, 3, 3, 1], [1, 1 / 3, -1 / 3, -1], [1, 1, 3, 3]),
        (square_antiprism, [1, 2, 2, 1, 2], [1, 1 / 3, turned - 1 / 3, -1 / 3, -turned - 1 / 3], [1, 1, 2, 2, 2]),
    ):
        M = build().T @ build()
        scheme = spectral.association_scheme(4 * M)
        assert scheme is not None and scheme.valencies.tolist() == valencies
        torch.testing.assert_close(scheme.values, 4 * torch.tensor(values, dtype=torch.float64))
        assert scheme.dimensions[0] == 1 and sorted(scheme.dimensions.tolist()) == dimensions
        # Lemma A.6: trivial characters, orthogonality, and the Gram matrix's eigenvalues on the strata.
        torch.testing.assert_close(scheme.characters[0], torch.ones(len(values), dtype=torch.float64))
        torch.testing.assert_close(scheme.characters[:, 0], scheme.valencies.double())
        weighted = (scheme.characters * scheme.dimensions) @ scheme.characters.T
        torch.testing.assert_close(weighted, 8 * scheme.valencies.double().diag(), rtol=1e-9, atol=1e-9)
        repeated = scheme.gram_eigenvalues.repeat_interleave(scheme.dimensions).sort().values
        torch.testing.assert_close(repeated, torch.linalg.eigvalsh(4 * M), rtol=1e-9, atol=1e-9)
        # Products of adjacency matrices, eq. A.5.
        A = torch.stack([(scheme.relation == r).double() for r in range(len(values))])
        products = torch.einsum("rij,tjk->rtik", A, A)
        torch.testing.assert_close(products, torch.einsum("rtu,uij->rtij", scheme.intersections.double(), A))


def test_a_simplex_has_the_papers_scheme() -> None:
    for p in (2, 3, 7):
        scheme = spectral.association_scheme(simplex(p - 1).T @ simplex(p - 1))
        assert scheme is not None
        assert scheme.intersections[1, 1].tolist() == [p - 1, p - 2]
        torch.testing.assert_close(scheme.characters, torch.tensor([[1, 1], [p - 1, -1]], dtype=torch.float64))
        torch.testing.assert_close(
            scheme.gram_eigenvalues, torch.tensor([0, p / (p - 1)], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_no_scheme() -> None:
    assert spectral.association_scheme(polygon(5)[:, 1:].T @ polygon(5)[:, 1:]) is None
    assert spectral.association_scheme(torch.diag(torch.tensor([1.0, 2.0]))) is None
    W = square_antiprism(30.0)
    assert spectral.association_scheme(W.T @ W) is None
    path = torch.eye(4) + 0.5 * torch.diag(torch.ones(3), 1) + 0.5 * torch.diag(torch.ones(3), -1)
    assert spectral.association_scheme(path) is None
    path[0, 3] = path[3, 0] = 0.5  # a cycle of four: a scheme; the edges of a prism are of two kinds, which it tells
    assert spectral.association_scheme(path) is not None
    prism = torch.eye(6) + 0.1 * torch.block_diag(1 - torch.eye(3), 1 - torch.eye(3))
    prism[:3, 3:] = prism[3:, :3] = 0.1 * torch.eye(3)
    scheme = spectral.association_scheme(prism)
    assert scheme is not None and scheme.valencies.tolist() == [1, 1, 2, 2]


def test_features_spread_over_eigenspaces_belong_to_no_frame() -> None:
    W = union(simplex(2), 2 * simplex(1))
    mixed = torch.cat([W, 1e-2 * torch.ones(3, 1, dtype=torch.float64)], 1)
    frames = spectral.tight_frames(mixed, rtol=1e-3, localization=1e-3)
    assert sorted(i for frame in frames for i in frame.features.tolist()) == [0, 1, 2, 3, 4]
    assert 1e-6 < max(frame.residual for frame in frames) < 1e-2


def test_band_localized_and_broadband_features() -> None:
    values = torch.tensor([1.0, 1.05, 4.0], dtype=torch.float64).sqrt()
    rows = torch.tensor([[2, 1, 0, 1, 1], [1, -2, 0, 0, 0], [0, 0, 3, 1, -1]], dtype=torch.float64)
    W = values[:, None] * figures.unit(rows.T).T
    classes = spectral.classify_features(W)
    measures, (eigenvalues, weights, _) = classes.measures, spectral.spectral_measure(W)
    assert len(classes) == 5 and sum(classes.counts.values()) == 5
    for index, name in enumerate(classes):
        support = eigenvalues[weights[index] > 1e-9]
        width = float((support.max() - support.min()) / (support.max() + support.min()))
        expected = "localized" if len(support) == 1 else "band-localized" if width <= 0.1 else "broadband"
        assert name == classes[index] == expected
        assert float(measures.half_width[index]) == pytest.approx(width, abs=1e-9)
    assert {"band-localized", "broadband"} <= set(classes)
    assert spectral.classify_features(W, band=0.0).counts["band-localized"] == 0
    assert spectral.classify_features(W, localized=0.9).counts["localized"] == 5


@pytest.mark.parametrize("squared", [1e-3, 1e-4, 0.3])
def test_a_band_bounds_the_slack(squared: float) -> None:
    """σ ≤ ω² + mass (Theorem 11), also where the dropped eigenvalues are far off and their 1/λ is large."""
    far = math.sqrt(squared) * torch.tensor([[0.0, 0.9998, 0.9998], [0.0, 0.02, -0.02]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -4, 12, dtype=torch.float64)[:, None]
    matrices = [
        far + torch.tensor([[1.0, 0, 0], [0, 0, 0]], dtype=torch.float64),
        *(spread * torch.randn(12, 40, generator=generator, dtype=torch.float64) for _ in range(3)),
        torch.randn(8, 30, generator=generator, dtype=torch.float64),
    ]
    held = 0
    for W in matrices:
        for mass in (0.0, 1e-3, 0.1, 0.4):
            for band in (0.1, 0.5, 0.9):
                classes = spectral.classify_features(W, band=band, mass=mass)
                slack = classes.measures.slack
                assert float((slack - classes.band_half_width.square() - mass).max()) <= 1e-11
                inside = classes.codes == 1
                held += int(inside.sum())
                assert not inside.any() or float(slack[inside].max()) <= band**2 + mass + 1e-11
    assert held > 100


def test_the_budget_of_the_classes() -> None:
    W = torch.randn(8, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    classes = spectral.classify_features(W)
    assert sum(classes.leverage_shares.values()) == pytest.approx(1, abs=1e-12)
    assert sum(classes.shares.values()) == pytest.approx(1)
    assert classes.defect == pytest.approx(8 - float(spectral.fractional_dimensionality(W).sum()), abs=1e-9)
    assert 1 - classes.epsilon == pytest.approx(spectral.saturation(W), abs=1e-12)
    for tau in (0.05, 0.2, 0.5, 0.9):
        held, bound = classes.residue(tau)
        expected = float(spectral.leverage(W)[spectral.slack(W) >= tau].sum()) / 8
        assert held == pytest.approx(expected, abs=1e-12) and held <= bound


def test_the_empirical_spectral_density() -> None:
    W = torch.randn(6, 30, dtype=torch.float32, generator=torch.Generator().manual_seed(3))
    density = spectral.empirical_spectral_density(W)
    squares = torch.linalg.svdvals(W.double()).square()
    torch.testing.assert_close(density.eigenvalues, squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(spectral.empirical_spectral_density(W.T, normalize=True).eigenvalues, squares / 30)
    assert density.stable_rank == pytest.approx(float(squares.sum() / squares[0]))
    q = squares / squares.sum()
    assert density.effective_rank == pytest.approx(math.exp(-float((q * q.log()).sum())))
    for log in (False, True):
        heights, edges = density.histogram(7, log=log)
        assert float((heights * edges.diff()).sum()) == pytest.approx(1)
    assert spectral.empirical_spectral_density(torch.eye(5, 9)).effective_rank == pytest.approx(5)
    zero = spectral.empirical_spectral_density(torch.zeros(2, 3))
    assert (zero.rank, zero.stable_rank, zero.effective_rank) == (0, 0, 0)
    with pytest.raises(ValueError, match="histogram: eigenvalues must hold a positive one"):
        zero.histogram()
    with pytest.raises(ValueError, match="histogram: bins must be at least 1"):
        density.histogram(0)
