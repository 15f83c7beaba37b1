"""A whole model's weights, one matrix in memory at a time, each figure beside what the same entries shuffled give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.ops.library import message
from thought_kernels.spectral.density import SpectralDensity
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.measure import nonzero_spectrum
from thought_kernels.spectral.nulls import (
    bulk_half_width,
    marchenko_pastur,
    shuffled_figures,
    spectral_distance,
)
from thought_kernels.spectral.spectrum import RTOL
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices
from thought_kernels.spectral.tails import Tail, power_law_tail
from thought_kernels.spectral.taxonomy import classes_of

SIDES = ("longer", "rows", "columns")
Row = TypeVar("Row")


@dataclass(frozen=True)
class MatrixRow:
    """What was found in one matrix; a figure is None where there is none, and ``note`` says why.

    A figure's ``_null`` is the same of the matrix with its entries shuffled, but for half_width_null.

    Attributes:
        name, rows, columns, dtype: of the stored matrix.
        features: "rows" or "columns": what the features are.
        zero_features: features that are zero; they have D = 0.
        rank: singular values above max(rows, columns) · eps of the largest.
        stable_rank: Σ λ / λ_max.
        effective_rank: exp of the entropy of λ / Σ λ.
        saturation: Σ D_i / rank.
        localized, band_localized, broadband: shares of the features by weighted bands, as classify_features; zero
            features are part of the whole.
        half_width: median over the features of ω, the relative half-width of that band.
        half_width_null: ω of the Marchenko-Pastur law, 2 √(mn) / (m + n), which features of noise fill.
        residual: median over the features of CV.
        spikes: eigenvalues above the Marchenko-Pastur law of the spectrum's bulk; None where no such law fits it.
        spike_share: of Σ λ that these hold.
        bulk_distance: Kolmogorov-Smirnov distance of the rest to the law.
        shuffle_distance: the same between the spectrum and that of the shuffled entries.
        alpha: exponent of the spectral density's tail.
        alpha_low, alpha_high: its 95 % interval.
        distance: Kolmogorov-Smirnov distance of the tail to its law.
        tail: eigenvalues in the tail.
        log_norm, log_spectral_norm: log10 of Σ λ and of λ_max.
        alpha_weighted: α log10 λ_max.
        log_alpha_norm: log10 Σ λ^α.
        note: why figures are missing.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    features: str
    zero_features: int | None = None
    rank: int | None = None
    stable_rank: float | None = None
    stable_rank_null: float | None = None
    effective_rank: float | None = None
    effective_rank_null: float | None = None
    saturation: float | None = None
    saturation_null: float | None = None
    localized: float | None = None
    band_localized: float | None = None
    broadband: float | None = None
    half_width: float | None = None
    half_width_null: float | None = None
    residual: float | None = None
    residual_null: float | None = None
    spikes: int | None = None
    spikes_null: int | None = None
    spike_share: float | None = None
    spike_share_null: float | None = None
    bulk_distance: float | None = None
    bulk_distance_null: float | None = None
    shuffle_distance: float | None = None
    alpha: float | None = None
    alpha_null: float | None = None
    alpha_low: float | None = None
    alpha_high: float | None = None
    distance: float | None = None
    tail: int | None = None
    log_norm: float | None = None
    log_spectral_norm: float | None = None
    alpha_weighted: float | None = None
    log_alpha_norm: float | None = None
    note: str = ""


def row_of(line: Mapping[str, str], kind: type[Row] = MatrixRow) -> Row:  # type: ignore[assignment]
    """A row from its figures as text, as a CSV has them; other columns are left out.

    Args:
        line: text by column.
        kind: MatrixRow, or another dataclass of texts and numbers.

    Raises:
        ValueError: a text that is no number where one is due.
        KeyError: a column that is missing.
    """
    convert: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        text = line[field.name]
        missing = text == "" and field.name != "note"
        values[field.name] = None if missing else convert[str(field.type).split(" ")[0]](text)
    return kind(**values)


def inspect_matrix(W: Tensor, *, features: str = "longer") -> dict[str, Any]:
    """The figures of one matrix, by MatrixRow's names, and those of its shuffled entries.

    Args:
        W: ``[rows, columns]``; float64, float32, bfloat16 or float16.
        features: "rows", "columns", or "longer": the side with more vectors than they have dimensions, the one in
            superposition (tokens of an embedding, neurons of an MLP); columns of a square matrix.

    Returns:
        A dict of MatrixRow's figures.

    Raises:
        TypeError, ValueError: W is not a finite, nonzero matrix, or ``features`` is unknown.

    Source: Spectral superposition, §3 and Theorem 12; for the tail, see power_law_tail; log norms and weighted alpha as
        in Martin, Peng and Mahoney, "Predicting trends in the quality of state-of-the-art neural networks", 2021.
    """
    check_matrix("inspect_matrix", W)
    if features_side(W.shape, features) == "rows":
        W = W.T
    m, n = W.shape
    spectrum = nonzero_spectrum("inspect_matrix", W, RTOL, None)
    # Scaled by a power of 4 where W's squares leave float64's range; only the log norms depend on it.
    eigenvalues, scale = spectrum.all_eigenvalues, spectrum.exponent * math.log10(4)
    density = SpectralDensity(eigenvalues, spectrum.rank)
    classes = classes_of(spectrum)
    present = classes.measures.eigenspace >= 0
    tail, bulk = power_law_tail(eigenvalues), marchenko_pastur(eigenvalues, m, n)
    null = shuffled_figures(spectrum.matrix)
    noise, chance = SpectralDensity(null.eigenvalues, len(null.eigenvalues)), power_law_tail(null.eigenvalues)
    flat = marchenko_pastur(null.eigenvalues, m, n)
    return {
        "zero_features": classes.counts["zero"],
        "rank": spectrum.rank,
        "stable_rank": density.stable_rank,
        "stable_rank_null": noise.stable_rank,
        "effective_rank": density.effective_rank,
        "effective_rank_null": noise.effective_rank,
        "saturation": float(classes.measures.dimensionality.sum()) / spectrum.rank,
        "saturation_null": null.saturation,
        "localized": classes.shares["localized"],
        "band_localized": classes.shares["band-localized"],
        "broadband": classes.shares["broadband"],
        "half_width": float(classes.band_half_width[present].median()),
        "half_width_null": bulk_half_width(m, n),
        "residual": float(classes.measures.residual[present].median()),
        "residual_null": null.residual,
        "spikes": bulk.spikes,
        "spikes_null": flat.spikes,
        "spike_share": bulk.share,
        "spike_share_null": flat.share,
        "bulk_distance": bulk.distance,
        "bulk_distance_null": flat.distance,
        "shuffle_distance": spectral_distance(eigenvalues, null.eigenvalues, min(m, n)),
        "alpha_null": chance and chance.alpha,
        "log_norm": float(eigenvalues.sum().log10()) + scale,
        "log_spectral_norm": float(eigenvalues[0].log10()) + scale,
        **_tail_figures(tail, eigenvalues, scale),
        "note": "" if tail else "too few eigenvalues for a tail",
    }


def _tail_figures(tail: Tail | None, eigenvalues: Tensor, scale: float) -> dict[str, Any]:
    if tail is None:
        return dict.fromkeys(("alpha", "alpha_low", "alpha_high", "distance", "tail", "alpha_weighted",
                              "log_alpha_norm"))  # fmt: skip
    logs = eigenvalues.log() + scale * math.log(10)
    return {
        "alpha": tail.alpha,
        "alpha_low": tail.low,
        "alpha_high": tail.high,
        "distance": tail.distance,
        "tail": tail.length,
        "alpha_weighted": tail.alpha * float(logs[0]) / math.log(10),
        "log_alpha_norm": float(torch.logsumexp(tail.alpha * logs, 0)) / math.log(10),
    }


def inspect_model(
    model: str | Path | list[StoredMatrix], *, features: str = "longer", progress: bool = False
) -> Iterator[MatrixRow]:
    """Walks the weight matrices of a model, one in memory at a time, and yields a row for each as it is done.

    Args:
        model: as stored_matrices takes it, or what it returned, or a part of that.
        features: as inspect_matrix takes it.
        progress: show a progress bar on stderr, by the number of weights.

    Yields:
        A MatrixRow for each; one that cannot be measured (quantised, not finite, all zero) says so in its note.

    Raises:
        ValueError: as stored_matrices does, or ``features`` is unknown.
    """
    features_side((2, 2), features)
    matrices = model if isinstance(model, list) else stored_matrices(model)
    total = sum(rows * columns for rows, columns in (matrix.shape for matrix in matrices))
    with tqdm(total=total, desc="inspect", unit="weight", unit_scale=True, disable=not progress, leave=False) as bar:
        for matrix in matrices:
            bar.set_postfix_str(matrix.name[-40:], refresh=False)
            yield _row(matrix, features)
            bar.update(matrix.shape[0] * matrix.shape[1])


def features_side(shape: tuple[int, ...], features: str) -> str:
    """ "rows" or "columns": which are the features of a stored matrix of this shape."""
    if features not in SIDES:
        raise ValueError(message("inspect_matrix", "features", f"be one of {', '.join(SIDES)}", repr(features)))
    if features != "longer":
        return features
    return "rows" if len(shape) == 2 and shape[0] > shape[1] else "columns"


def _row(matrix: StoredMatrix, features: str) -> MatrixRow:
    start = (matrix.name, *matrix.shape, matrix.dtype, features_side(matrix.shape, features))
    if not matrix.is_readable:
        return MatrixRow(*start, note=f"quantised ({matrix.dtype})")
    try:
        return MatrixRow(*start, **inspect_matrix(matrix.read(), features=features))
    except ValueError as error:
        if not str(error).startswith("inspect_matrix: W"):
            raise
        return MatrixRow(*start, note=str(error).rpartition("got ")[2])
