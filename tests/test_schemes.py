"""Association schemes of Gram matrices: strata by construction, coherent closures, clusters that have no name."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from figures import orthogonal, polygon, simplex, square_antiprism, union
from tolerances import largest
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.scheme import AssociationScheme

CLOSE = 1e-9  # characters come from eigenvectors of small, well separated matrices


def gram_of(relation: Tensor) -> Tensor:
    """A matrix whose entries tell the relations apart: 1 on the diagonal, smaller and smaller ones after it."""
    return 1 - relation.double() / (int(relation.max()) + 1)


def polygon_relation(p: int) -> Tensor:
    step = (torch.arange(p)[:, None] - torch.arange(p)).abs()
    return torch.minimum(step, p - step)


def johnson(v: int, k: int) -> Tensor:
    sets = [frozenset(chosen) for chosen in itertools.combinations(range(v), k)]
    return torch.tensor([[k - len(a & b) for b in sets] for a in sets])


def hamming(d: int, q: int) -> Tensor:
    words = list(itertools.product(range(q), repeat=d))
    return torch.tensor([[sum(x != y for x, y in zip(a, b, strict=True)) for b in words] for a in words])


def product(first: Tensor, second: Tensor) -> Tensor:
    """The direct product: pairs of relations, one a relation."""
    both = first[:, None, :, None] * (int(second.max()) + 1) + second[None, :, None, :]
    return both.reshape(len(first) * len(second), -1)


def check(scheme: AssociationScheme | None, dimensions: list[int]) -> AssociationScheme:
    """Every identity of Lemmas A.5 and A.6, and eq. 2.1; returns the scheme."""
    assert scheme is not None
    p, count = len(scheme.relation), len(scheme.values)
    C, D, a, d = scheme.characters, scheme.duals, scheme.valencies.double(), scheme.dimensions
    assert C.shape == D.shape == (count, count) and sorted(d.tolist()) == sorted(dimensions)
    assert int(d.sum()) == int(scheme.valencies.sum()) == p and d[0] == 1
    identity = torch.eye(count, dtype=torch.float64)
    assert largest(C @ D - identity) <= CLOSE * p and largest(D @ C - identity) <= CLOSE * p
    assert largest(C[0] - 1) <= CLOSE * p and largest(C[:, 0] - a) <= CLOSE * p
    assert largest(D[:, 0] - d.double() / p) <= CLOSE * p
    assert largest((C * d) @ C.T - p * a.diag()) <= CLOSE * p * p
    A = [(scheme.relation == r).double() for r in range(count)]
    S = [scheme.projector(e) for e in range(count)]
    assert largest(S[0] - 1 / p) <= CLOSE * p
    assert largest(sum(S) - torch.eye(p)) <= CLOSE * p
    for e in range(count):
        assert largest(S[e] @ S[e] - S[e]) <= CLOSE * p
    for r in range(count):
        assert largest(A[r] - sum(C[r, e] * S[e] for e in range(count))) <= CLOSE * p
    r, t = count - 1, count // 2
    expected = sum(scheme.intersections[r, t, u] * A[u] for u in range(count))
    assert largest(A[r] @ A[t] - expected) == 0
    return scheme


@pytest.mark.parametrize("p", range(3, 65))
def test_every_polygon_has_as_many_strata_as_relations(p: int) -> None:
    W = polygon(p)
    scheme = check(spectral.association_scheme(W.T @ W), [1] + [2] * ((p - 1) // 2) + [1] * (p % 2 == 0))
    rows, columns = torch.meshgrid(torch.arange(p // 2 + 1), torch.arange(p // 2 + 1), indexing="ij")
    expected = 2 * torch.cos(2 * math.pi * rows.double() * columns / p)
    expected[0] = 1
    if p % 2 == 0:
        expected[-1] /= 2
    order = scheme.characters[1].argsort(descending=True)
    assert largest(scheme.characters[:, order] - expected) <= CLOSE * p


@pytest.mark.parametrize("v, k", [(5, 2), (7, 2), (6, 3), (8, 3), (8, 4)])
def test_johnson_schemes(v: int, k: int) -> None:
    dimensions = [1] + [math.comb(v, i) - math.comb(v, i - 1) for i in range(1, k + 1)]
    check(spectral.association_scheme(gram_of(johnson(v, k))), dimensions)


@pytest.mark.parametrize("d, q", [(2, 3), (3, 2), (3, 3), (4, 2), (6, 2), (2, 7)])
def test_hamming_schemes(d: int, q: int) -> None:
    dimensions = [math.comb(d, i) * (q - 1) ** i for i in range(d + 1)]
    check(spectral.association_scheme(gram_of(hamming(d, q))), dimensions)


@pytest.mark.parametrize("first, second", [(3, 2), (4, 4), (5, 8), (10, 6), (12, 7), (15, 4)])
def test_products_of_polygons(first: int, second: int) -> None:
    def sizes(p: int) -> list[int]:
        return [1] if p == 1 else [1] + [2] * ((p - 1) // 2) + [1] * (p % 2 == 0)

    relation = product(polygon_relation(first), polygon_relation(second))
    dimensions = [a * b for a in sizes(first) for b in sizes(second)]
    check(spectral.association_scheme(gram_of(relation)), dimensions)


def test_relations_that_share_an_inner_product_come_apart() -> None:
    """The decagon's scheme, of which two strata make a tight frame whose Gram matrix has too few values."""
    decagon = spectral.association_scheme(polygon(10).T @ polygon(10))
    assert decagon is not None
    order = decagon.characters[1].argsort(descending=True).tolist()
    M = 2.5 * (decagon.projector(order[1]) + decagon.projector(order[2]))
    assert len(M[0].mul(1e6).round().unique()) == 5
    found = check(spectral.association_scheme(M), [1, 2, 2, 2, 2, 1])
    assert torch.equal(found.relation.unique(), torch.arange(6))
    assert largest(found.values[found.relation] - M) <= 1e-12
    assert sorted(found.gram_eigenvalues.abs().mul(10).round().tolist()) == [0, 0, 0, 0, 25, 25]
    W = torch.linalg.svd(M)[0][:, :4].T
    assert spectral.identify_geometry(W) == "scheme (10, 4; 2, 1, 2, 2, 2)"


@pytest.mark.parametrize("p", [*range(3, 12), *(pytest.param(p, marks=pytest.mark.slow) for p in range(12, 17))])
def test_every_real_harmonic_frame_has_a_scheme(p: int) -> None:
    """p points on a circle, seen in any set of frequencies: Gram matrices in the polygon's algebra (§A.2)."""
    angle = 2 * math.pi * polygon_relation(p).double() / p
    waves = [(1 if 2 * j in (0, p) else 2) * torch.cos(j * angle) for j in range(p // 2 + 1)]
    for size in range(1, len(waves) + 1):
        for chosen in itertools.combinations(waves, size):
            M = sum(chosen)
            scheme = spectral.association_scheme(M / M[0, 0])
            assert scheme is not None
            d = scheme.dimensions[scheme.gram_eigenvalues > 1e-9]
            assert int(d.sum()) == round(float(M[0, 0]))


def test_what_has_no_scheme() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(6, 20, generator=generator, dtype=torch.float64), dim=0)
    assert spectral.association_scheme(W.T @ W) is None
    path = torch.eye(5) + 0.5 * torch.diag(torch.ones(4), 1) + 0.5 * torch.diag(torch.ones(4), -1)
    assert spectral.association_scheme(path) is None
    turned = square_antiprism(30.0)  # its closure is the group D4 itself, which does not commute
    assert spectral.association_scheme(turned.T @ turned) is None
    # Regular, but with two kinds of points: a hexagon and a triangular prism side by side.
    prism = torch.block_diag(1 - torch.eye(3), 1 - torch.eye(3)) + torch.eye(6).roll(3, 0)
    hexagon = torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0) + torch.eye(6).roll(3, 0)
    assert spectral.association_scheme(torch.eye(12) + 0.1 * torch.block_diag(prism, hexagon)) is None


def tight_prism() -> Tensor:
    """Triangles at ±1/√3: a tight frame of six unit vectors in three dimensions."""
    flat = math.sqrt(2 / 3) * torch.cat([simplex(2), simplex(2)], 1)
    return torch.cat([flat, torch.tensor([[1.0] * 3 + [-1.0] * 3], dtype=torch.float64) / math.sqrt(3)])


def test_a_tight_frame_without_a_name_is_told_by_its_parameters() -> None:
    W = tight_prism()
    assert largest(W @ W.T - 2 * torch.eye(3)) <= 1e-12
    assert spectral.identify_geometry(W) == "scheme (6, 3; 1, 2, 2)"
    noisy = W + 1e-3 * torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert spectral.identify_geometry(noisy) is None
    assert spectral.identify_geometry(noisy, tol=0.02) == "scheme (6, 3; 1, 2, 2)"
    assert spectral.identify_geometry(union(W, W)) == "scheme (6, 3; 1, 2, 2) union"


@pytest.mark.parametrize("d", range(1, 41))
def test_a_simplex_keeps_its_name_whatever_its_size_and_the_tolerance(d: int) -> None:
    name = {1: "digon", 2: "triangle", 3: "tetrahedron"}.get(d, "simplex")
    for tol in (1e-5, 0.01, 0.05, 0.09):
        assert spectral.identify_geometry(simplex(d), tol=tol) == name
    both = union(simplex(d), torch.eye(3, dtype=torch.float64))
    assert spectral.identify_geometry(both, tol=0.05) == " + ".join(sorted([name, "orthonormal basis"]))
    assert spectral.identify_geometry(torch.eye(d + 1, dtype=torch.float64), tol=0.05) == "orthonormal basis"


@pytest.mark.parametrize("tol", [1e-5, 0.01, 0.05, 0.09])
@pytest.mark.parametrize("m, n", [(64, 128), (2, 128), (30, 31), (128, 100)])
def test_random_vectors_are_no_figure_at_any_tolerance(m: int, n: int, tol: float) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    W = torch.nn.functional.normalize(W, dim=0)
    assert spectral.identify_geometry(W, tol=tol) is None


@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_figures_of_16_bits_are_found_at_wider_tolerances(dtype: torch.dtype, tol: float) -> None:
    """The values that the page on spectra names."""
    W = torch.block_diag(polygon(5), 1.5 * polygon(3)).to(dtype)
    assert [len(frame.features) for frame in spectral.tight_frames(W)] != [3, 5]
    frames = spectral.tight_frames(W, rtol=tol)
    assert [spectral.identify_geometry(frame, tol=tol) for frame in frames] == ["triangle", "pentagon"]


def test_vectors_of_one_direction_are_no_digon() -> None:
    W = torch.ones(3, 4, dtype=torch.float64)
    assert spectral.identify_geometry(W) == spectral.identify_geometry(W[:, :2]) == "repeated vector"
    assert spectral.identify_geometry(torch.ones(3, 3000)) == "repeated vector"
    assert spectral.identify_geometry(W[:, :2] * torch.tensor([1, -1])) == "digon"
    # Of both signs: a tight frame of one dimension whose relations are a scheme, or are none.
    assert spectral.identify_geometry(W * torch.tensor([1, 1, -1, -1])) == "scheme (4, 1; 1, 2)"
    assert spectral.identify_geometry(W * torch.tensor([1, 1, 1, -1])) is None


def test_a_noisy_union_of_many_digons_is_one() -> None:
    """As trained models have it: 64 digons, all inner products off by about 0.01."""
    generator = torch.Generator().manual_seed(3)
    axes = orthogonal(64, generator)
    W = torch.cat([axes, -axes], 1) + 0.01 / 8 * torch.randn(64, 128, generator=generator, dtype=torch.float64)
    W = torch.nn.functional.normalize(W, dim=0)
    assert spectral.identify_geometry(W, tol=0.05) == "digon union"
