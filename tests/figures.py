"""Unit vectors of regular figures, in columns, and their disguises: rotation, scale, order, more dimensions."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def polygon(corners: int) -> Tensor:
    angles = torch.arange(corners, dtype=torch.float64) * (2 * math.pi / corners)
    return torch.stack([angles.cos(), angles.sin()])


def simplex(dimension: int) -> Tensor:
    """``[dimension, dimension + 1]``: the unit vectors, centred, in coordinates of the hyperplane they lie in."""
    points = dimension + 1
    centred = torch.eye(points, dtype=torch.float64) - 1 / points
    basis = torch.linalg.svd(centred)[0][:, :dimension]
    return unit(basis.T @ centred)


def cube() -> Tensor:
    return unit(torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64).T)


def square_antiprism(turn: float = 45.0) -> Tensor:
    """Two squares at height ±1/√3, one turned; by 0 or 90 degrees it is the cube."""
    corners = []
    for height, start in ((1, turn), (-1, 0)):
        for corner in range(4):
            angle = math.radians(90 * corner + start)
            corners.append((math.sqrt(2) * math.cos(angle), math.sqrt(2) * math.sin(angle), height))
    return unit(torch.tensor(corners, dtype=torch.float64).T)


def icosahedron() -> Tensor:
    golden = (1 + math.sqrt(5)) / 2
    corners = [point for a in (1, -1) for b in (golden, -golden) for point in ((0, a, b), (a, b, 0), (b, 0, a))]
    return unit(torch.tensor(corners, dtype=torch.float64).T)


def dodecahedron() -> Tensor:
    golden = (1 + math.sqrt(5)) / 2
    corners = list(itertools.product((-1.0, 1.0), repeat=3))
    for a in (1 / golden, -1 / golden):
        corners += [point for b in (golden, -golden) for point in ((0, a, b), (a, b, 0), (b, 0, a))]
    return unit(torch.tensor(corners, dtype=torch.float64).T)


def orthoplex(dimension: int) -> Tensor:
    identity = torch.eye(dimension, dtype=torch.float64)
    return torch.cat([identity, -identity], 1)


def unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def disguise(figure: Tensor, seed: int, *, extra: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The figure rotated in ``extra`` more dimensions, scaled and in another order; and that order."""
    generator = torch.Generator().manual_seed(seed)
    m, n = figure.shape
    order = torch.randperm(n, generator=generator)
    padded = torch.cat([figure, torch.zeros(extra, n, dtype=figure.dtype)])
    return scale * (orthogonal(m + extra, generator) @ padded)[:, order], order


def union(*figures: Tensor) -> Tensor:
    """Figures side by side, each in dimensions of its own."""
    return torch.block_diag(*figures)


# name -> unit vectors, dimension; D = dimension / number of features.
FIGURES = {
    "orthonormal basis": (torch.eye(4, dtype=torch.float64), 4),
    "digon": (simplex(1), 1),
    "triangle": (simplex(2), 2),
    "tetrahedron": (simplex(3), 3),
    "simplex": (simplex(6), 6),
    "pentagon": (polygon(5), 2),
    "hexagon": (polygon(6), 2),
    "heptagon": (polygon(7), 2),
    "octagon": (polygon(8), 2),
    "13-gon": (polygon(13), 2),
    "cube": (cube(), 3),
    "square antiprism": (square_antiprism(), 3),
    "icosahedron": (icosahedron(), 3),
    "dodecahedron": (dodecahedron(), 3),
    "digon union": (orthoplex(3), 3),
    "triangle union": (union(simplex(2), simplex(2)), 4),
}
