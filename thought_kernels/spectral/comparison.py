"""Two models of the same shapes, matrix by matrix: how far their weights, spectra and features are apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.ops.library import message
from thought_kernels.spectral.density import SpectralDensity
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.inspect import features_side
from thought_kernels.spectral.measure import features_of, nonzero_spectrum, rank_zero
from thought_kernels.spectral.nulls import spectral_distance
from thought_kernels.spectral.spectrum import RTOL
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices

TOP = 0.1  # of the dimensions, those of the largest eigenvalues
_AT_ONCE = 8192  # vectors of a difference


@dataclass(frozen=True)
class Change:
    """What became of one matrix W, W' being the other model's; figures are None where ``note`` says why.

    Attributes:
        name, rows, columns: of the matrix.
        change: ‖W' − W‖_F / ‖W‖_F.
        stable_rank: of W' − W: how many directions the change is in.
        top_share: of ‖W' − W‖_F², what lies in the tenth of the features' space where F has its largest eigenvalues;
            0.1 for a change that knows nothing of W.
        spectral_distance: Kolmogorov-Smirnov, between the two spectra.
        dimensionality_change: mean |D'_i − D_i| / mean D_i.
        saturation, other_saturation: Σ D_i / rank of W and of W'.
        note: why figures are missing.
    """

    name: str
    rows: int
    columns: int
    change: float | None = None
    stable_rank: float | None = None
    top_share: float | None = None
    spectral_distance: float | None = None
    dimensionality_change: float | None = None
    saturation: float | None = None
    other_saturation: float | None = None
    note: str = ""


def compare_matrices(W: Tensor, other: Tensor, *, features: str = "longer") -> dict[str, float]:
    """The figures of Change for two matrices of one shape.

    Args:
        W, other: ``[rows, columns]``, finite and not all zero.
        features: as inspect_matrix takes it.

    Raises:
        TypeError, ValueError: no such matrices, or of different shapes.

    Source: ours, from SS eq. 2.2 and 3.1.
    """
    for name, matrix in (("W", W), ("other", other)):
        if check_matrix("compare_matrices", matrix, name) == 0:
            raise ValueError(rank_zero("compare_matrices", name))
    if W.shape != other.shape:
        raise ValueError(message("compare_matrices", "other", f"be {list(W.shape)}", list(other.shape)))
    if features_side(W.shape, features) == "rows":
        W, other = W.T, other.T
    spectrum, changed = (nonzero_spectrum("compare_matrices", matrix, RTOL, None) for matrix in (W, other))
    own = spectrum.exponent
    common = max(own, changed.exponent)  # else eigenvalues, and the step's, may leave float64's range
    before, after = (one.all_eigenvalues * 4.0 ** (one.exponent - common) for one in (spectrum, changed))
    top = spectrum.frame_basis[:, : max(1, round(TOP * min(W.shape)))]
    values, inside = _step(W, other, common, top)
    total = float(values.sum())
    D, E = (features_of(one).dimensionality for one in (spectrum, changed))
    return {
        "change": float(torch.ldexp((total / spectrum.all_eigenvalues.sum()).sqrt(), torch.tensor(common - own))),
        "stable_rank": SpectralDensity(values, len(values) if total else 0).stable_rank,
        "top_share": inside / total if total else 0.0,
        "spectral_distance": spectral_distance(before, after, min(W.shape)),
        "dimensionality_change": float((E - D).abs().mean() / D.mean()),
        "saturation": float(D.sum()) / spectrum.rank,
        "other_saturation": float(E.sum()) / changed.rank,
    }


def _step(W: Tensor, other: Tensor, exponent: int, top: Tensor) -> tuple[Tensor, float]:
    """Eigenvalues of (W' − W)(W' − W)ᵀ, largest first, and how much of their sum lies in the span of ``top``.

    In blocks of the longer side, so that neither matrix is held in float64 as a whole, and in units of 2^exponent.
    """
    longer = int(W.shape[1] >= W.shape[0])
    scale = torch.tensor(-exponent, device=W.device)
    gram = torch.zeros(W.shape[1 - longer], W.shape[1 - longer], dtype=torch.float64, device=W.device)
    parts: list[Tensor] = []
    for start in range(0, W.shape[longer], _AT_ONCE):
        length = min(_AT_ONCE, W.shape[longer] - start)
        one, two = (torch.ldexp(matrix.narrow(longer, start, length).double(), scale) for matrix in (W, other))
        step = two - one
        gram += step @ step.T if longer else step.T @ step
        parts.append((top.T @ step).square().sum() if longer else top[start : start + length].T @ step)
    inside = torch.stack(parts).sum() if longer else torch.stack(parts).sum(0).square().sum()
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0), float(inside)


def compare_models(
    model: str | Path | list[StoredMatrix],
    other: str | Path | list[StoredMatrix],
    *,
    features: str = "longer",
    progress: bool = False,
) -> Iterator[Change]:
    """Walks the matrices of a model and those of the same names in another, such as a fine-tune or a patched export.

    Args:
        model, other: as stored_matrices takes them, or what it returned.
        features: as inspect_matrix takes it.
        progress: show a progress bar on stderr.

    Yields:
        A Change for each matrix of ``model``; one without a counterpart or that cannot be measured says so in its note.

    Raises:
        ValueError: as stored_matrices does; no name is in both.
    """
    ours = model if isinstance(model, list) else stored_matrices(model)
    theirs = {matrix.name: matrix for matrix in (other if isinstance(other, list) else stored_matrices(other))}
    if not any(matrix.name in theirs for matrix in ours):
        names = f"{ours[0].name!r} here, {next(iter(theirs), None)!r} there" if ours else "none"
        raise ValueError(message("compare_models", "other", "have a matrix of the same name", names))
    for matrix in tqdm(ours, desc="compare", disable=not progress, leave=False):
        yield _change(matrix, theirs.get(matrix.name), features)


def _change(matrix: StoredMatrix, other: StoredMatrix | None, features: str) -> Change:
    start = (matrix.name, *matrix.shape)
    if other is None or other.shape != matrix.shape:
        there = "nothing" if other is None else f"{other.shape[0]} x {other.shape[1]}"
        return Change(*start, note=f"{there} of this name in the other model")
    if not (matrix.is_readable and other.is_readable):
        return Change(*start, note="quantised")
    try:
        figures: dict[str, Any] = {**compare_matrices(matrix.read(), other.read(), features=features)}
        return Change(*start, **figures)
    except ValueError as error:
        if not str(error).startswith("compare_matrices: "):
            raise
        return Change(*start, note=str(error).rpartition("got ")[2])
