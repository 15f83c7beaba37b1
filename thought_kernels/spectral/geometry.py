"""The name of a cluster's geometry, told by the relation classes of its Gram matrix."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.clusters import TightFrame
from thought_kernels.spectral.frames import check_matrix, in_range
from thought_kernels.spectral.scheme import GRAM_TOLERANCE, association_scheme, relations, valencies

SIMPLICES = {2: "digon", 3: "triangle", 4: "tetrahedron"}
POLYGONS = {5: "pentagon", 6: "hexagon", 7: "heptagon", 8: "octagon"}
BASIS = "orthonormal basis"

# Points and dimension, then the inner product of each relation of unit vectors and how many points are in it to a given
# one. The cube and the square antiprism have the same first two and the same Gram spectrum. In a tight antiprism the
# squares lie at height ±1/√3 like a cube's faces, one of them turned by 45°.
_TURNED = math.sqrt(2) / 3
_FIGURES: dict[str, tuple[int, int, dict[float, int]]] = {
    "cube": (8, 3, {1 / 3: 3, -1 / 3: 3, -1.0: 1}),
    "square antiprism": (8, 3, {1 / 3: 2, _TURNED - 1 / 3: 2, -1 / 3: 1, -_TURNED - 1 / 3: 2}),
    "icosahedron": (12, 3, {5**-0.5: 5, -(5**-0.5): 5, -1.0: 1}),
    "dodecahedron": (20, 3, {5**0.5 / 3: 3, 1 / 3: 6, -1 / 3: 6, -(5**0.5) / 3: 3, -1.0: 1}),
}
_LARGEST_POLYGON = 1024  # of more corners the inner products of neighbours are equal to the tolerance
_BLOCK = 1024


class Component(NamedTuple):
    """Features of a cluster that are not orthogonal to one another, and the figure they form.

    Attributes:
        features: column indices in W for a TightFrame, in W_C for a matrix ``[p]``, int64.
        geometry: its name, or None.
    """

    features: Tensor
    geometry: str | None


def identify_geometry(cluster: TightFrame | Tensor, *, tol: float = GRAM_TOLERANCE) -> str | None:
    """The name of the figure that a cluster's features form, whatever its rotation, scale and order.

    Features that are orthogonal to one another are first taken apart; each part of p vectors spanning d dimensions must
    be a tight frame of equal norms whose Gram matrix has the figure's inner products, each the right number of times::

        digon (2, 1)   triangle (3, 2)   tetrahedron (4, 3)   simplex (d + 1, d)   pentagon (5, 2), hexagon, ..., p-gon
        cube (8, 3)    square antiprism (8, 3)    icosahedron (12, 3)    dodecahedron (20, 3)

    Equal figures in orthogonal subspaces are a "... union": a square is a "digon union" of two, an octahedron and every
    other cross-polytope one of d. Single vectors are an "orthonormal basis" (up to scale), different figures
    "... + ...".

    Args:
        cluster: a TightFrame, or its vectors W_C ``[m, p]`` in columns.
        tol: how far inner products, for unit vectors, may be off.

    Returns:
        The name, or None where any part is none of these.

    Raises:
        TypeError, ValueError: W_C is not a finite floating matrix; ``tol`` is not a positive number below 0.1.

    Source: Spectral superposition, Theorem 4, Corollary 5, §A.3, §A.4.
    """
    counts = Counter(component.geometry for component in _identify("identify_geometry", cluster, tol))
    parts = []
    for name, count in sorted(counts.items(), key=lambda item: str(item[0])):
        if name is None:
            return None
        parts.append(f"{name} union" if count > 1 and name != BASIS else name)
    return " + ".join(parts)


def identify_components(cluster: TightFrame | Tensor, *, tol: float = GRAM_TOLERANCE) -> list[Component]:
    """The parts of a cluster that are orthogonal to one another, each with its figure.

    Parts are the connected components of |cos(w_i, w_j)| > tol.

    Args:
        cluster, tol: as in identify_geometry.

    Returns:
        A Component for each part, ordered by its first feature.

    Raises:
        TypeError, ValueError: as identify_geometry does.

    Source: Spectral superposition, Theorem 4.
    """
    return _identify("identify_components", cluster, tol)


def _identify(function: str, cluster: TightFrame | Tensor, tol: float) -> list[Component]:
    vectors = cluster.vectors if isinstance(cluster, TightFrame) else cluster
    largest = check_matrix(function, vectors, "cluster")
    check_number(function, "tol", tol, positive=True)
    if tol >= 0.1:
        raise ValueError(message(function, "tol", "be less than 0.1", tol))
    vectors = in_range(vectors.detach(), largest, torch.float64)[0].double()
    norms = torch.linalg.vector_norm(vectors, dim=0)
    found = []
    for part in _components(vectors / torch.where(norms > 0, norms, 1), tol):
        name = None
        if float(norms[part].max() - norms[part].min()) <= tol * float(norms[part].max()) > 0:
            name = _name(vectors[:, part] / norms[part], tol)
        found.append(Component(cluster.features[part] if isinstance(cluster, TightFrame) else part, name))
    return found


def _components(unit: Tensor, tol: float) -> list[Tensor]:
    """Connected components of |unitᵀ unit| > tol, as sorted indices; the Gram matrix is never held as a whole."""
    left = torch.arange(unit.shape[1], device=unit.device)
    found = []
    while len(left):
        part, frontier, left = [left[:1]], left[:1], left[1:]
        while len(frontier) and len(left):
            current, waiting = frontier[:_BLOCK], frontier[_BLOCK:]
            reached = torch.zeros(len(left), dtype=torch.bool, device=unit.device)
            for start in range(0, len(left), _BLOCK):
                chunk = slice(start, start + _BLOCK)
                reached[chunk] = ((unit[:, current].T @ unit[:, left[chunk]]).abs() > tol).any(0)
            part.append(left[reached])
            frontier, left = torch.cat([waiting, left[reached]]), left[~reached]
        found.append(torch.cat(part).sort().values)
    return found


def _name(unit: Tensor, tol: float) -> str | None:
    """The figure of one component of unit vectors ``[m, p]``."""
    m, p = unit.shape
    if p == 1:
        return BASIS
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T if m <= p else unit.T @ unit)
    positive = eigenvalues[eigenvalues > p * tol]
    d = len(positive)
    if float((positive - p / d).abs().max()) > p * tol:
        return None  # not tight
    polygon = d == 2 and p <= _LARGEST_POLYGON
    if not (p == d + 1 or polygon or any((p, d) == figure[:2] for figure in _FIGURES.values())):
        return None
    M = unit.T @ unit
    relation, values = relations(M, tol)
    degrees = valencies(relation, len(values))
    if degrees is None:
        return None
    actual = dict(zip(values[1:].tolist(), degrees[1:].tolist(), strict=True))
    if p == d + 1:
        return SIMPLICES.get(p, "simplex") if _match(actual, {-1 / d: d}, tol) else None
    if polygon:
        expected = {math.cos(2 * math.pi * k / p): 1 if 2 * k == p else 2 for k in range(1, p // 2 + 1)}
        return POLYGONS.get(p, f"{p}-gon") if _match(actual, expected, tol) else None
    for name, (points, dimension, expected) in _FIGURES.items():
        if (points, dimension) == (p, d) and _match(actual, expected, tol):
            return name if association_scheme(M, tol=tol) is not None else None
    return None


def _match(actual: dict[float, int], expected: dict[float, int], tol: float) -> bool:
    """Whether two tables of inner product and valency agree."""
    pairs = zip(sorted(actual.items()), sorted(expected.items()), strict=True)
    return len(actual) == len(expected) and all(abs(a[0] - b[0]) <= tol and a[1] == b[1] for a, b in pairs)
