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
BASIS, REPEATED = "orthonormal basis", "repeated vector"

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
_LARGEST_SCHEME = 256  # points of a frame without a name whose scheme is looked for
_TIE = 1e-6
_ROUNDING = 1e-13
_POWERS = 30  # steps of the power method: enough for a norm to within some per cent
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
    other cross-polytope one of d. Single vectors are an "orthonormal basis" (up to scale), several of one direction a
    "repeated vector", different figures "... + ...". Any other tight frame of up to 256 vectors whose Gram matrix lies
    in the algebra of an association scheme is told by the scheme's parameters, "scheme (p, d; valencies)", those of the
    relations from the largest inner product to the smallest: a tight triangular prism is a "scheme (6, 3; 1, 2, 2)".

    Args:
        cluster: a TightFrame, or its vectors W_C ``[m, p]`` in columns.
        tol: how far inner products, for unit vectors, may be off.

    Returns:
        The name, or None where any part is none of these: no tight frame of equal norms, or of no scheme.

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

    Parts are the connected components of |cos(w_i, w_j)| > tol, or of a smaller one where the many smaller cosines
    between such parts would together be half of a part's eigenvalue.

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
    """Parts of unit vectors that are orthogonal to one another, as sorted indices.

    Parts are linked by |cos| > tol. Many inner products below tol may still bend the spectrum, as the 1/d of a large
    simplex do: while they do, links are sought below tol.
    """
    parts = _linked(unit, tol)
    while len(parts) > 1 and tol > _ROUNDING and not _apart(unit, parts):
        tol /= 2
        parts = _linked(unit, tol)
    return parts


def _linked(unit: Tensor, tol: float) -> list[Tensor]:
    """Connected components of |unitᵀ unit| > tol; the Gram matrix is never held as a whole."""
    tol *= 1 - _TIE  # inner products that are tol but for rounding are all of them above it, and not some
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


def _apart(unit: Tensor, parts: list[Tensor]) -> bool:
    """Whether what lies between the parts, ‖M − ⊕ M_part‖₂, is below half of every part's mean eigenvalue."""
    inside = [unit[:, part] @ unit[:, part].T if len(part) > 1 else None for part in parts]
    squares = [1.0 if F is None else float(F.square().sum()) for F in inside]
    allowed = 0.5 * min(square / len(part) for square, part in zip(squares, parts, strict=True))
    between = float((unit @ unit.T).square().sum()) - sum(squares)
    if between <= allowed**2:
        return True  # by the Frobenius norm already
    large = [part for part in parts if len(part) > 1]
    alone = torch.cat([part for part in parts if len(part) == 1] or [parts[0][:0]])
    x = torch.randn(unit.shape[1], generator=torch.Generator().manual_seed(0), dtype=unit.dtype).to(unit.device)
    norm = 0.0
    for _ in range(_POWERS):
        x = x / torch.linalg.vector_norm(x).clamp(min=1e-300)
        y = unit.T @ (unit @ x)
        y[alone] -= x[alone]
        for part in large:
            y[part] -= unit[:, part].T @ (unit[:, part] @ x[part])
        x, norm = y, float(torch.linalg.vector_norm(y))
    return norm <= allowed


def _name(unit: Tensor, tol: float) -> str | None:
    """The figure of one component of unit vectors ``[m, p]``."""
    m, p = unit.shape
    if p == 1:
        return BASIS
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T if m <= p else unit.T @ unit).flip(0)
    d, residual = _tightness(eigenvalues, p)
    if residual > min(tol * d**0.5, 0.5) or d >= p:
        return None
    if d == 1 and float((unit[:, :1].T @ unit).min()) >= 1 - tol:
        return REPEATED  # of any number: no relations have to be told apart
    polygon = d == 2 and p <= _LARGEST_POLYGON
    if not (p == d + 1 or polygon or p <= _LARGEST_SCHEME):
        return None
    M = unit.T @ unit
    grouped = relations(M, tol)
    if grouped is None:
        return None
    relation, values = grouped
    degrees = valencies(relation, len(values))
    if degrees is None:
        return None
    actual = dict(zip(values[1:].tolist(), degrees[1:].tolist(), strict=True))
    if p == d + 1 and _match(actual, {-1 / d: d}, tol):
        return SIMPLICES.get(p, "simplex")
    if polygon:
        expected = {math.cos(2 * math.pi * k / p): 1 if 2 * k == p else 2 for k in range(1, p // 2 + 1)}
        if _match(actual, expected, tol):
            return POLYGONS.get(p, f"{p}-gon")
    return _by_scheme(M, d, actual, tol) if p <= _LARGEST_SCHEME else None


def _by_scheme(M: Tensor, d: int, actual: dict[float, int], tol: float) -> str | None:
    """The figure with this scheme, or the scheme's parameters where it has no name."""
    scheme, p = association_scheme(M, tol=tol), len(M)
    if scheme is None:
        return None
    for name, (points, dimension, expected) in _FIGURES.items():
        if (points, dimension) == (p, d) and _match(actual, expected, tol):
            return name
    # The tight frame of the strata that M fills must be M, to the tolerance.
    filled = scheme.gram_eigenvalues > p / d / 2
    tight = p / d * scheme.duals[filled].sum(0)
    if int(scheme.dimensions[filled].sum()) != d or float((tight - scheme.values).abs().max()) > tol:
        return None
    return f"scheme ({p}, {d}; {', '.join(map(str, scheme.valencies[1:].tolist()))})"


def _tightness(eigenvalues: Tensor, p: int) -> tuple[int, float]:
    """The d for which p unit vectors are nearest to a tight frame, and ‖F − (p/d) P‖_F / ((p/d) √d).

    Inner products that are off by at most tol move that by at most tol √d (Hoffman and Wielandt).
    """
    d = torch.arange(1, len(eigenvalues) + 1, dtype=eigenvalues.dtype, device=eigenvalues.device)
    # Σ_{k≤d} (λ_k − p/d)² + Σ_{k>d} λ_k², without the difference that would cancel.
    target = p / d[:, None] * (d <= d[:, None])
    residuals = (eigenvalues - target).square().sum(1).sqrt() / (p / d.sqrt())
    best = int(residuals.argmin())
    return best + 1, float(residuals[best])


def _match(actual: dict[float, int], expected: dict[float, int], tol: float) -> bool:
    """Whether two tables of inner product and valency agree."""
    pairs = zip(sorted(actual.items()), sorted(expected.items()), strict=True)
    return len(actual) == len(expected) and all(abs(a[0] - b[0]) <= tol and a[1] == b[1] for a, b in pairs)
