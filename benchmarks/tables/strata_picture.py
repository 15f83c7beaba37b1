"""The strata of a triangle and of a digon in index space (SS Fig. 4), from the schemes of their Gram matrices.

The example is the paper's own (Fig. 2): rock, paper and scissors in a plane, heads and tails on a line; nothing in it
is trained. Drawings differ from one matplotlib to the next, so the picture carries a digest of this file.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.pages.drawing import BLUE, GREY, INK
from thought_kernels.evaluation.pictures.canvas import pyplot_without_window
from thought_kernels.evaluation.records.files import replace_file
from thought_kernels.spectral import AssociationScheme, association_scheme, gram

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "strata.svg"
HEIGHT = math.sqrt(3) / 2
TRIANGLE, DIGON = torch.tensor([[0.5, 0.5, -1], [HEIGHT, -HEIGHT, 0]]), torch.tensor([[1.0, -1.0]])
CENTROID, DIFFERENCE = "#c0392b", "#e0a100"


def digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def is_current() -> bool:
    return PICTURE.is_file() and digest() in PICTURE.read_text(encoding="utf-8")


def scheme_of(W: Tensor) -> AssociationScheme:
    """Of two strata: the constants, and their complement."""
    found = association_scheme(gram(W.double()))
    assert found is not None and len(found.dimensions) == 2
    return found


def draw() -> None:
    """Writes the picture, replacing the file in one step."""
    with pyplot_without_window() as pyplot, pyplot.rc_context({"svg.hashsalt": "strata"}):
        figure = pyplot.figure(figsize=(8.4, 4.2), layout="constrained")
        space(figure.add_subplot(1, 2, 1, projection="3d", computed_zorder=False), scheme_of(TRIANGLE))
        plane(figure.add_subplot(1, 2, 2), scheme_of(DIGON))
        about = {"Date": None, "Creator": None, "Description": f"drawn from {digest()}"}
        replace_file(PICTURE, lambda path: figure.savefig(path, format="svg", metadata=about))
        pyplot.close(figure)


def space(axes: Any, scheme: AssociationScheme) -> None:
    """R³ of the triangle: a line of constants, a plane of differences, and what each takes of the three indices."""
    constants, differences = scheme.projector(0), scheme.projector(1)
    corners = [(differences @ torch.tensor(corner).double()).tolist() for corner in ((1, -1, 0), (1, 1, -2))]
    first, second = (torch.tensor(corner) / torch.tensor(corner).norm() for corner in corners)
    grid = torch.tensor([[-1.0, 1.0]]) * 1.05
    sheet = [grid * first[axis] + grid.T * second[axis] for axis in range(3)]
    axes.plot_surface(*(side.numpy() for side in sheet), color=DIFFERENCE, alpha=0.3, shade=False)
    end = (constants @ torch.ones(3).double()).tolist()
    axes.quiver(0, 0, 0, *end, color=CENTROID, arrow_length_ratio=0.1, lw=2)
    parts = differences.tolist()
    axes.plot(*zip(*parts, parts[0], strict=True), color=BLUE, lw=1.6)
    for index, part in enumerate(parts):
        basis = [float(index == axis) for axis in range(3)]
        axes.plot(*zip(basis, part, strict=True), color=GREY, lw=0.9, ls="--")
        axes.scatter(*part, color=BLUE, s=22)
        axes.scatter(*basis, color=INK, s=14)
        axes.text(*(1.12 * value for value in basis), f"$e_{index + 1}$", color=INK, fontsize=9)
    axes.set(xticks=[], yticks=[], zticks=[], title=heading("triangle", scheme))
    axes.view_init(elev=14, azim=-8)
    axes.set_box_aspect((1, 1, 1), zoom=1.15)


def plane(axes: Any, scheme: AssociationScheme) -> None:
    """R² of the digon: a line of constants and one of differences."""
    constants, differences = scheme.projector(0), scheme.projector(1)
    far = differences @ torch.tensor([1.0, -1.0]).double()
    axes.plot(*zip((1.1 * far).tolist(), (-1.1 * far).tolist(), strict=True), color=DIFFERENCE, lw=5, alpha=0.4)
    end = (constants @ torch.ones(2).double()).tolist()
    axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "->", "color": CENTROID, "lw": 2})
    parts = differences.tolist()
    axes.plot(*zip(*parts, strict=True), color=BLUE, lw=1.6)
    for index, part in enumerate(parts):
        basis = [float(index == axis) for axis in range(2)]
        axes.plot(*zip(basis, part, strict=True), color=GREY, lw=0.9, ls="--")
        axes.plot(*part, "o", color=BLUE, ms=5)
        axes.plot(*basis, "o", color=INK, ms=4)
        axes.annotate(f"$e_{index + 1}$", basis, xytext=(4, 4), textcoords="offset points", fontsize=9, color=INK)
    axes.set(xlim=(-1.25, 1.4), ylim=(-1.25, 1.4), aspect="equal", xticks=[], yticks=[])
    axes.set_title(heading("digon", scheme))
    for side in axes.spines.values():
        side.set_color(GREY)


def heading(name: str, scheme: AssociationScheme) -> str:
    """The Gram matrix on the strata, M = Σ θ_e S_e."""
    terms = [f"{value:g} $S_{index}$" for index, value in enumerate(scheme.gram_eigenvalues.tolist()) if value > 1e-9]
    return f"{name}: M = {' + '.join(terms)}"
