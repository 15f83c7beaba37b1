"""The algebra of a given group, and the flow inside it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from figures import polygon, simplex
from tolerances import largest
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.permutations import centralizer_part, orbital_scheme, orbitals

CLOSE = 1e-12


def dihedral(p: int) -> list[list[int]]:
    return [[(i + 1) % p for i in range(p)], [-i % p for i in range(p)]]


def group(generators: list[list[int]]) -> list[tuple[int, ...]]:
    """All its elements, by multiplication."""
    found, new = set(), {tuple(range(len(generators[0])))}
    while new:
        found |= new
        new = {tuple(g[i] for i in element) for element in new for g in generators} - found
    return sorted(found)


def symmetric(p: int) -> list[list[int]]:
    return [[1, 0, *range(2, p)], [*range(1, p), 0]]


GROUPS = {
    "dihedral": dihedral(7), "even dihedral": dihedral(8), "cyclic": dihedral(5)[:1], "symmetric": symmetric(5),
    "two orbits": [[1, 0, 2, 4, 3]], "cube": [[i ^ 1 for i in range(8)], [(i >> 1) | (i & 1) << 2 for i in range(8)]],
}  # fmt: skip


@pytest.mark.parametrize("name", list(GROUPS))
def test_orbitals_are_a_basis_of_the_centralizer(name: str) -> None:
    generators = GROUPS[name]
    relation, elements = orbitals(generators), group(generators)
    p = len(generators[0])
    for i, j in ((0, 0), (0, 1), (1, 3)):
        reached = {(g[i], g[j]) for g in elements}
        for pair in itertools.product(range(p), repeat=2):
            assert bool(relation[i, j] == relation[pair]) == (pair in reached)
    M = torch.randn(p, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.zeros_like(M)
    for element in elements:
        P = torch.zeros(p, p, dtype=torch.float64)
        P[list(element), range(p)] = 1  # (P_γ)_ij = [i = γ(j)], eq. A.1
        mean += P @ M @ P.T / len(elements)
    part = centralizer_part(M, relation)
    assert largest(part - mean) <= CLOSE
    for generator in generators:
        assert largest(part[generator][:, generator] - part) <= CLOSE
    # Burnside: as many orbitals as pairs that an element fixes, on average.
    fixed = sum(sum(element[i] == i for i in range(p)) ** 2 for element in elements) / len(elements)
    assert int(relation.max()) + 1 == round(fixed)


def test_the_scheme_of_a_group_is_that_of_its_figures_gram_matrix() -> None:
    for W, generators in ((polygon(9), dihedral(9)), (simplex(4), symmetric(5))):
        M = W.T @ W
        scheme, by_gram = orbital_scheme(generators, M), spectral.association_scheme(M)
        assert scheme is not None and by_gram is not None
        assert scheme.characters.shape == by_gram.characters.shape
        assert largest(scheme.values[scheme.relation] - M) <= CLOSE
        found, expected = (sorted(one.gram_eigenvalues.tolist()) for one in (scheme, by_gram))
        assert found == pytest.approx(expected, abs=1e-9)
    assert orbital_scheme(GROUPS["two orbits"]) is None  # not transitive
    assert orbital_scheme(GROUPS["cyclic"]) is None  # i → i + 1 is not symmetric
    with pytest.raises(ValueError, match="orbital_scheme: M must commute with the group"):
        orbital_scheme(dihedral(5), torch.arange(25.0).view(5, 5))
    with pytest.raises(ValueError, match=r"orbital_scheme: M must be \[5, 5\], got \[4, 4\]"):
        orbital_scheme(dihedral(5), torch.eye(4))
    for wrong in ([[0, 0, 1]], [[1, 2, 3]], [], [0, 1]):
        with pytest.raises(ValueError, match="orbitals: generators must"):
            orbitals(wrong)
    for wrong in (None, [["a", "b"]], [[0, 1], [1, 0, 2]], torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])):
        with pytest.raises(TypeError, match=r"orbitals: generators must be integers \[g, p\], got"):
            orbitals(wrong)


def invariant_toy(p: int) -> tuple[Tensor, Tensor, Tensor]:
    """A polygon, its bias, and inputs that the dihedral group maps to themselves."""
    W = 1.1 * polygon(p)
    x = torch.rand(20, p, generator=torch.Generator().manual_seed(p), dtype=torch.float64)
    x = torch.cat([x[:, list(element)] for element in group(dihedral(p))])
    return W, torch.full((p,), -0.1, dtype=torch.float64), x


@pytest.mark.parametrize("p", [3, 5, 6])
def test_angles_flow_inside_the_algebra(p: int) -> None:
    """Eq. F.6 against the whole matrix's flow, and Lemma F.3: Φ lies in the centralizer where the loss is invariant."""
    W, bias, x = invariant_toy(p)
    kernel = spectral.gradient_kernel(W, bias, x)
    relation = orbitals(dihedral(p))
    assert largest(centralizer_part(kernel, relation) - kernel) <= CLOSE
    flow = spectral.GramFlow(W, kernel)
    scheme = orbital_scheme(dihedral(p), flow.gram)
    assert scheme is not None
    first = [int((scheme.relation[0] == r).nonzero()[0]) for r in range(len(scheme.values))]
    velocity = spectral.angle_velocity(scheme, scheme.values, kernel[0, first])
    assert largest(velocity) > 1e-3
    assert largest(velocity[scheme.relation] - flow.gram_velocity()) <= CLOSE
    assert largest(flow.fixed_point_residual()) <= 1e-9  # Corollary 17: no eigenspace turns
    with pytest.raises(ValueError, match="angle_velocity: kernel must be"):
        spectral.angle_velocity(scheme, scheme.values, torch.zeros(1))


def test_the_papers_triangle() -> None:
    """§2.1: C, D and M = 3/2 S_1 of the triangle."""
    scheme = orbital_scheme([[1, 2, 0], [1, 0, 2]], polygon(3).T @ polygon(3))
    assert scheme is not None
    table = torch.tensor([[1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    assert largest(scheme.characters - table) <= CLOSE and largest(scheme.duals - table / 3) <= CLOSE
    assert largest(1.5 * scheme.projector(1) - polygon(3).T @ polygon(3)) <= CLOSE
    assert math.isclose(float(scheme.projector(0).trace()), 1)
