"""Association schemes: the algebra behind a Gram matrix whose entries take few values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.spectrum import group_values

GRAM_TOLERANCE = 1e-5  # of entries of a Gram matrix with unit diagonal: above float32's rounding, below any real gap


@dataclass(frozen=True, eq=False)
class AssociationScheme:
    """A symmetric association scheme with s classes on p points; relation 0 is equality, stratum 0 the constants.

    Attributes:
        relation: which relation each pair is in ``[p, p]``, int64, 0 to s.
        values: the Gram entry of each relation ``[s + 1]``, the others after the first from large to small.
        valencies: a_r, how many points are in relation r to a given one ``[s + 1]``, int64.
        intersections: c[r, t, u], how many k have (i, k) in r and (k, j) in t, for any (i, j) in u; int64.
        characters: C[r, e], the eigenvalue of adjacency matrix A_r on stratum e ``[s + 1, s + 1]``.
        dimensions: of the strata ``[s + 1]``, int64.
    """

    relation: Tensor
    values: Tensor
    valencies: Tensor
    intersections: Tensor
    characters: Tensor
    dimensions: Tensor

    @property
    def gram_eigenvalues(self) -> Tensor:
        """θ_e with M = Σ_e θ_e S_e: the Gram matrix's eigenvalue on each stratum ``[s + 1]``."""
        return self.values @ self.characters


def association_scheme(M: Tensor, *, tol: float = GRAM_TOLERANCE) -> AssociationScheme | None:
    """The association scheme whose algebra a Gram matrix generates by the values of its entries, if there is one.

    A_r = [M_ij is the r-th value],  A_r A_t = Σ_u c[r, t, u] A_u,  A_r = Σ_e C[r, e] S_e

    Args:
        M: ``[p, p]`` symmetric.
        tol: entries, sorted, whose neighbours differ by at most ``tol`` times the mean diagonal entry count as equal.

    Returns:
        An AssociationScheme, or None where the pairs with equal entries do not form one.

    Raises:
        TypeError, ValueError: M is not a finite, square, symmetric floating matrix with a positive diagonal.

    Source: Spectral superposition, Lemmas A.5 and A.6, eq. A.5 and A.6, Theorem 4.
    """
    check_matrix("association_scheme", M, "M")
    check_number("association_scheme", "tol", tol, positive=True)
    M = M.detach().double()
    if M.shape[0] != M.shape[1]:
        raise ValueError(message("association_scheme", "M", "be square", list(M.shape)))
    unit = float(M.diagonal().mean())
    if unit <= 0:
        raise ValueError(message("association_scheme", "M", "have a positive diagonal", unit))
    if float((M - M.T).abs().max()) > tol * unit:
        raise ValueError(message("association_scheme", "M", "be symmetric", float((M - M.T).abs().max())))
    if float((M.diagonal() - unit).abs().max()) > tol * unit:
        return None
    relation, values = relations(M / unit, tol)
    degrees = valencies(relation, len(values))
    if degrees is None:
        return None
    adjacency = torch.stack([(relation == r).double() for r in range(len(values))])
    intersections = _intersections(adjacency, relation)
    if intersections is None:
        return None
    characters, dimensions = _strata(adjacency)
    return AssociationScheme(relation, values * unit, degrees, intersections, characters, dimensions)


def relations(M: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Relation of each pair ``[p, p]``, 0 on the unit diagonal, and each relation's mean entry, from large to small."""
    apart = ~torch.eye(len(M), dtype=torch.bool, device=M.device)
    entries, order = M[apart].sort(descending=True)
    groups = group_values(entries, tol)
    relation = torch.zeros_like(M, dtype=torch.int64)
    relation[apart] = torch.empty_like(groups).index_copy_(0, order, 1 + groups)
    counts = torch.bincount(groups)
    means = torch.zeros(len(counts), dtype=M.dtype, device=M.device).index_add_(0, groups, entries) / counts
    return relation, torch.cat([M.new_ones(1), means])


def valencies(relation: Tensor, count: int) -> Tensor | None:
    """How many points are in each of ``count`` relations to a given one ``[count]``; None if points differ in that."""
    degrees = torch.zeros(len(relation), count, dtype=torch.int64, device=relation.device)
    degrees.scatter_add_(1, relation, torch.ones_like(relation))
    return degrees[0] if bool((degrees == degrees[0]).all()) else None


def _intersections(adjacency: Tensor, relation: Tensor) -> Tensor | None:
    """c[r, t, u], or None where a product of adjacency matrices is not constant on some relation."""
    count = len(adjacency)
    numbers = torch.zeros(count, count, count, dtype=torch.int64, device=adjacency.device)
    flat = relation.flatten()
    for r in range(count):
        for t in range(r, count):
            product = (adjacency[r] @ adjacency[t]).flatten()
            first = torch.zeros(count, dtype=product.dtype, device=product.device)
            first[flat] = product  # any one pair of each relation; all must agree with it
            if bool((product != first[flat]).any()):
                return None
            numbers[r, t] = numbers[t, r] = first.long()
    return numbers


def _strata(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """Characters and dimensions: the common eigenspaces of all adjacency matrices, the constants first."""
    count, p, _ = adjacency.shape
    # A combination with incommensurable weights tells all strata apart; the golden ratio's multiples are.
    weights = torch.arange(1, count + 1, dtype=torch.float64, device=adjacency.device).mul(1.618033988749895).frac()
    _, basis = torch.linalg.eigh(torch.einsum("r,rij->ij", weights, adjacency))
    on_basis = torch.einsum("ik,rij,jk->kr", basis, adjacency, basis)
    strata: list[Tensor] = [adjacency.sum(2)[:, 0]]  # of the constants: the valencies
    dimensions = [0]
    for row in on_basis:
        for index, known in enumerate(strata):
            if float((row - known).abs().max()) < 1e-6 * p:
                dimensions[index] += 1
                break
        else:
            strata.append(row)
            dimensions.append(1)
    return torch.stack(strata, 1), torch.tensor(dimensions, device=adjacency.device)
