"""The algebra of a given group of permutations: orbitals, centralizer, association scheme."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.scheme import AssociationScheme, scheme_of


def orbitals(generators: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Which orbital each pair of points is in, under the group that permutations generate.

    O_r = {(γ(i), γ(j)) : γ ∈ Γ},  (A_r)_ij = 1 if (i, j) ∈ O_r;  the A_r are a basis of the centralizer

    Args:
        generators: permutations of 0 to p − 1, γ(i) in place i, ``[g, p]``; the group is never listed.

    Returns:
        ``[p, p]`` int64, orbitals numbered from 0 in the order of their first pair; those of the diagonal are the
        orbits of points, one of them if the group is transitive.

    Raises:
        ValueError: no permutations, or others than of 0 to p − 1.
        TypeError: no integers, or rows of different length.

    Source: Spectral superposition, eq. A.1 and A.3, Lemmas A.2 and A.3.
    """
    try:
        chosen = torch.as_tensor(generators)
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, or rows of different length
        raise TypeError(message("orbitals", "generators", "be integers [g, p]", type(generators).__name__)) from error
    if chosen.dim() != 2 or not chosen.numel():
        raise ValueError(message("orbitals", "generators", "be permutations [g, p]", list(chosen.shape)))
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(message("orbitals", "generators", "be integers [g, p]", chosen.dtype))
    p = chosen.shape[1]
    if not torch.equal(chosen.long().sort(1).values, torch.arange(p).expand_as(chosen)):
        raise ValueError(message("orbitals", "generators", f"permute 0 to {p - 1}", "others"))
    steps = [order for row in chosen.long() for order in (row, row.argsort())]
    labels = torch.arange(p * p).view(p, p)
    while True:
        old = labels
        for order in steps:
            labels = torch.minimum(labels, labels[order][:, order])
        labels = labels.flatten()[labels]  # the label of a pair's label: chains halve
        if torch.equal(labels, old):
            break
    return torch.unique(labels, return_inverse=True)[1]


def centralizer_part(M: Tensor, relation: Tensor) -> Tensor:
    """The part of a matrix that commutes with a group: its mean over each orbital.

    (1/|Γ|) Σ_γ P_γ M P_γᵀ = Σ_r A_r ⟨A_r, M⟩ / ⟨A_r, A_r⟩,  which is M exactly if P_γ M = M P_γ for every γ

    Args:
        M: ``[p, p]``.
        relation: orbitals, or any relation, ``[p, p]``.

    Returns:
        ``[p, p]`` float64.

    Raises:
        TypeError, ValueError: M is no finite matrix of relation's shape.

    Source: Spectral superposition, eq. A.2, Lemma A.2.
    """
    _check_shape("centralizer_part", M, relation)
    return _mean_over(M, relation)


def _check_shape(function: str, M: Tensor, relation: Tensor) -> None:
    check_matrix(function, M, "M")
    if M.shape != relation.shape:
        raise ValueError(message(function, "M", f"be {list(relation.shape)}", list(M.shape)))


def _mean_over(M: Tensor, relation: Tensor) -> Tensor:
    flat, values = relation.flatten(), M.detach().double().flatten()
    sums = torch.zeros(int(flat.max()) + 1, dtype=torch.float64, device=M.device).index_add_(0, flat, values)
    return (sums / torch.bincount(flat))[relation]


def orbital_scheme(generators: Tensor | Sequence[Sequence[int]], M: Tensor | None = None) -> AssociationScheme | None:
    """The association scheme of a group's orbitals: strata, characters, and M's coefficients in it.

    Args:
        generators: as in orbitals.
        M: a matrix of the centralizer ``[p, p]``, whose entries become the scheme's ``values``; zeros if not given.

    Returns:
        The AssociationScheme, relations in the order of their first pair; None where the group is not transitive, or an
        orbital not symmetric.

    Raises:
        TypeError, ValueError: as orbitals does; M is not constant on the orbitals.

    Source: Spectral superposition, §A.1 to A.3.
    """
    relation = orbitals(generators)
    values = torch.zeros(int(relation.max()) + 1, dtype=torch.float64)
    if M is not None:
        _check_shape("orbital_scheme", M, relation)
        part = _mean_over(M, relation)
        size = float(M.abs().max())
        if float((part - M.double()).abs().max()) > 1e-5 * size:
            rule = "commute with the group"
            raise ValueError(message("orbital_scheme", "M", rule, float((part - M.double()).abs().max())))
        values[relation] = part
    diagonal = relation.diagonal()
    if bool((diagonal != diagonal[0]).any()) or not torch.equal(relation, relation.T):
        return None
    return scheme_of(relation, values)
