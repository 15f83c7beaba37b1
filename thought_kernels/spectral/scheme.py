"""Association schemes: the smallest algebra of symmetric matrices with constant relations that holds a Gram matrix."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix

GRAM_TOLERANCE = 1e-5  # of entries of a Gram matrix with unit diagonal: above float32's rounding, below any real gap
_COLOURS = 1 << 20  # products of two of these, summed over up to 8,192 points, are exact in float64
_COMBINATIONS = 8


@dataclass(frozen=True, eq=False)
class AssociationScheme:
    """A symmetric association scheme with s classes on p points; relation 0 is equality, stratum 0 the constants.

    Attributes:
        relation: which relation each pair is in ``[p, p]``, int64, 0 to s.
        values: the Gram entry of each relation ``[s + 1]``, the others after the first from large to small. Several may
            be equal: relations differ by what lies between their points too.
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

    @functools.cached_property
    def duals(self) -> Tensor:
        """D[e, r] = d_e C[r, e] / (p a_r), the inverse of C ``[s + 1, s + 1]``: S_e = Σ_r D[e, r] A_r (eq. 2.1)."""
        return (self.characters * self.dimensions).T / (len(self.relation) * self.valencies)

    def projector(self, stratum: int) -> Tensor:
        """S_e, the orthogonal projector ``[p, p]`` on a stratum (Lemma A.5)."""
        return self.duals[stratum][self.relation]


def association_scheme(M: Tensor, *, tol: float = GRAM_TOLERANCE) -> AssociationScheme | None:
    """The smallest association scheme whose algebra holds a Gram matrix, if there is one.

    A_r A_t = Σ_u c[r, t, u] A_u,  A_r = Σ_e C[r, e] S_e,  M = Σ_r θ_r A_r

    Pairs of equal entries are told apart by how many points stand in which relations to both, again and again until
    nothing changes: that is M's coherent closure (two-dimensional Weisfeiler-Leman). M lies in a scheme's algebra
    exactly if the closure has one kind of points and only symmetric relations, and then the closure is the smallest.

    Args:
        M: ``[p, p]`` symmetric, p up to 8,192.
        tol: how far entries, in units of the mean diagonal entry, may be from their relation's value.

    Returns:
        An AssociationScheme, or None where the closure is none.

    Raises:
        TypeError, ValueError: M is not a finite, square, symmetric floating matrix with a positive diagonal.

    Source: Spectral superposition, Lemmas A.5 and A.6, eq. A.5 and A.6, Theorem 4; the closure is Weisfeiler and
        Leman's, "The reduction of a graph to canonical form", 1968.
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
    grouped = relations(M / unit, tol)
    if grouped is None:
        return None
    closed = _closure(grouped[0])
    if closed is None:
        return None
    relation, origin = closed
    return scheme_of(relation, grouped[1][origin] * unit)


def scheme_of(relation: Tensor, values: Tensor) -> AssociationScheme:
    """The scheme of relations that are known to be one ``[p, p]``, with a value for each ``[s + 1]``."""
    degrees = torch.bincount(relation[0])
    intersections = _intersections(relation, len(degrees))
    characters, dimensions = _strata(intersections, degrees)
    return AssociationScheme(relation, values, degrees, intersections, characters, dimensions)


def relations(M: Tensor, tol: float) -> tuple[Tensor, Tensor] | None:
    """Pairs of equal entries of a matrix with unit diagonal.

    Returns:
        The class of each pair ``[p, p]``, 0 on the diagonal, and each class's mean entry, from large to small; None
        where entries run together: a class is more than 2 tol wide, so that they are not within tol of values apart.
    """
    apart = ~torch.eye(len(M), dtype=torch.bool, device=M.device)
    entries, order = M[apart].sort(descending=True)
    starts = torch.zeros(len(entries), dtype=torch.int64, device=M.device)
    starts[1:] = entries.diff().abs() > tol
    groups = starts.cumsum(0)
    counts = torch.bincount(groups)
    last = counts.cumsum(0) - 1
    if bool((entries[last - counts + 1] - entries[last] > 2 * tol).any()):
        return None
    relation = torch.zeros_like(M, dtype=torch.int64)
    relation[apart] = torch.empty_like(groups).index_copy_(0, order, 1 + groups)
    means = torch.zeros(len(counts), dtype=M.dtype, device=M.device).index_add_(0, groups, entries) / counts
    return relation, torch.cat([M.new_ones(1), means])


def valencies(relation: Tensor, count: int) -> Tensor | None:
    """How many points are in each of ``count`` relations to a given one ``[count]``; None if points differ in that."""
    degrees = torch.zeros(len(relation), count, dtype=torch.int64, device=relation.device)
    degrees.scatter_add_(1, relation, torch.ones_like(relation))
    return degrees[0] if bool((degrees == degrees[0]).all()) else None


def _closure(relation: Tensor) -> tuple[Tensor, Tensor] | None:
    """The coherent closure of symmetric relations ``[p, p]``, and which of them each new one is a part of.

    None unless all points are of one kind and all relations symmetric. Of the pairs (i, j) the multisets of
    {(relation of i and k, relation of k and j)} are compared by two sums Σ_k x y with random whole numbers for the
    relations, which differ for different multisets but with a probability of 1e-11.
    """
    p, generator = len(relation), torch.Generator().manual_seed(0)
    origin, count = relation, int(relation.max()) + 1
    while True:
        if count > p:  # a relation of points of one kind has at least p pairs
            return None
        drawn = torch.randint(_COLOURS, (4, count), generator=generator).double().to(relation.device)
        refined = relation
        for left, right in ((drawn[0], drawn[1]), (drawn[2], drawn[3])):
            sums = torch.unique(left[relation] @ right[relation], return_inverse=True)[1]
            refined = torch.unique(refined * (int(sums.max()) + 1) + sums, return_inverse=True)[1]
        found = int(refined.max()) + 1
        if bool((refined.diagonal() != refined[0, 0]).any()) or not torch.equal(refined, refined.T):
            return None
        if found == count:
            break
        relation, count = refined, found
    parents = torch.empty(count, dtype=torch.int64, device=relation.device)
    parents[relation.flatten()] = origin.flatten()
    # Of relations that share an inner product the small ones come first, so that equal frames are told alike.
    order = sorted(range(count), key=lambda r: (int(parents[r]), int((relation[0] == r).sum())))
    chosen = torch.tensor(order, device=relation.device)
    return torch.argsort(chosen)[relation], parents[chosen]


def _intersections(relation: Tensor, count: int) -> Tensor:
    """c[r, t, u] of coherent relations, from one pair of each."""
    numbers = torch.empty(count, count, count, dtype=torch.int64, device=relation.device)
    for u in range(count):
        j = int((relation[0] == u).nonzero()[0, 0])
        pairs = relation[0] * count + relation[:, j]
        numbers[:, :, u] = torch.bincount(pairs, minlength=count * count).view(count, count)
    return numbers


def _strata(intersections: Tensor, degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Characters C[r, e] and dimensions d_e, as many as relations, the constants first.

    A_r acts on the algebra itself, in the orthonormal basis A_t / √(p a_t), by the symmetric matrix
    L_r[t, u] = c[r, t, u] √(a_u / a_t) of s + 1 rows. All commute, and their common eigenvectors are the strata: one
    for each relation. A random combination has them too; of a few the one is taken whose eigenvalues are furthest
    apart. Dimensions follow from Lemma A.6(iii), p / d_e = Σ_r C[r, e]² / a_r.
    """
    sizes = degrees.double()
    acts = intersections * (sizes / sizes[:, None]).sqrt()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_COMBINATIONS, len(sizes), generator=generator, dtype=torch.float64).to(acts.device)
    values, vectors = torch.linalg.eigh(torch.einsum("kr,rtu->ktu", drawn / sizes.sqrt(), acts))
    basis = vectors[int(values.diff(dim=1).amin(1).argmax()) if len(sizes) > 1 else 0]
    characters = torch.einsum("te,rtu,ue->re", basis, acts, basis)
    # The constants' vector is √a; the others from the largest eigenvalue of relation 1 to the smallest.
    constants = int((sizes.sqrt() @ basis).abs().argmax())
    order = characters[min(1, len(sizes) - 1)].argsort(descending=True)
    order = torch.cat([order.new_tensor([constants]), order[order != constants]])
    characters = characters[:, order]
    dimensions = sizes.sum() / (characters.square() / sizes[:, None]).sum(0)
    return characters, dimensions.round().long()
