"""A whole model's weights, one matrix in memory at a time: ranks, saturation, kinds of features, tails.

The matrices are read from safetensors files one by one; the model itself is never built. So any folder will do, of
whatever architecture, sharded or not, an adapter's too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.ops.checks import FLOATS
from thought_kernels.ops.library import message
from thought_kernels.spectral.density import SpectralDensity
from thought_kernels.spectral.frames import check_matrix
from thought_kernels.spectral.measure import nonzero_spectrum
from thought_kernels.spectral.spectrum import RTOL
from thought_kernels.spectral.tails import power_law_tail
from thought_kernels.spectral.taxonomy import classes_of

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
SIDES = ("longer", "rows", "columns")

# The element types that safetensors names and the arithmetic reads; 8-bit floats and integers are quantised weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
assert set(_DTYPES.values()) == set(FLOATS)


class StoredMatrix(NamedTuple):
    """Where a weight matrix is kept.

    Attributes:
        name: the tensor's, with [i] for matrix i of a stack of experts.
        file: the safetensors file.
        tensor: the tensor's name in the file.
        part: which matrix of a 3-D tensor, None where the tensor is one matrix.
        shape: rows and columns; of a convolution [out, in · kernel].
        dtype: the element type in safetensors' words, such as BF16.
    """

    name: str
    file: Path
    tensor: str
    part: int | None
    shape: tuple[int, int]
    dtype: str

    @property
    def kind(self) -> str:
        """The name without numbers, the same in every block: "model.layers.self_attn.o_proj"."""
        pieces = [piece for piece in re.sub(r"\[\d+\]", "", self.name).split(".") if not piece.isdecimal()]
        return ".".join(pieces[:-1] if len(pieces) > 1 and pieces[-1] == "weight" else pieces)

    @property
    def block(self) -> int | None:
        """The 0-based block index, the first number in the name; None outside of blocks."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(number[1]) if number else None

    def read(self) -> Tensor:
        """The matrix, from the file.

        Raises:
            ValueError: the file does not hold it.
        """
        try:
            with safetensors.safe_open(self.file, framework="pt") as file:
                if self.part is not None:
                    return file.get_slice(self.tensor)[self.part]
                return file.get_tensor(self.tensor).flatten(1)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(self.file, error) from error


@dataclass(frozen=True)
class MatrixRow:
    """What was found in one matrix; a figure is None where there is none, and ``note`` says why.

    Attributes:
        name, rows, columns, dtype: of the stored matrix.
        features: "rows" or "columns": what the features are.
        zero_features: features that are zero; they have D = 0.
        rank: singular values above max(rows, columns) · eps of the largest.
        stable_rank: Σ λ / λ_max.
        effective_rank: exp of the entropy of λ / Σ λ.
        saturation: Σ D_i / rank.
        localized, band_localized, broadband: shares of the features, zero ones included in the whole.
        alpha: exponent of the spectral density's tail.
        alpha_low, alpha_high: its 95 % interval.
        distance: Kolmogorov-Smirnov distance of the tail to its law.
        tail: eigenvalues in the tail.
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
    effective_rank: float | None = None
    saturation: float | None = None
    localized: float | None = None
    band_localized: float | None = None
    broadband: float | None = None
    alpha: float | None = None
    alpha_low: float | None = None
    alpha_high: float | None = None
    distance: float | None = None
    tail: int | None = None
    note: str = ""


def stored_matrices(model: str | Path) -> list[StoredMatrix]:
    """Every weight matrix of a model folder or safetensors file, in the files' order; only headers are read.

    Two dimensions are a matrix; three are a stack of them, as experts are kept; four or more, of which two are larger
    than 1, are a convolution, a row per output channel. Vectors are none, and neither are matrices of one row or
    column.

    Args:
        model: a folder with .safetensors files, with or without an index, or one such file.

    Returns:
        StoredMatrix for each, quantised ones included.

    Raises:
        ValueError: no such folder, no safetensors files in it, or a file that is missing or damaged.
    """
    found = []
    for path in _files(Path(model)):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    header = file.get_slice(name)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    if len(shape) == 3 and min(shape[1:]) > 1:
                        found += [
                            StoredMatrix(f"{name}[{i}]", path, name, i, shape[1:], dtype) for i in range(shape[0])
                        ]
                        continue
                    if len(shape) > 3:
                        shape = (shape[0], torch.Size(shape[1:]).numel())
                    if len(shape) == 2 and min(shape) > 1:
                        found.append(StoredMatrix(name, path, name, None, shape, dtype))
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(path, error) from error
    return found


def inspect_matrix(W: Tensor, *, features: str = "longer") -> dict[str, Any]:
    """The figures of one matrix, by MatrixRow's names; one decomposition in float64.

    Args:
        W: ``[rows, columns]``; float64, float32, bfloat16 or float16.
        features: "rows", "columns", or "longer": the side with more vectors than they have dimensions, the one in
            superposition (tokens of an embedding, neurons of an MLP); columns of a square matrix.

    Returns:
        A dict of MatrixRow's figures.

    Raises:
        TypeError, ValueError: W is not a finite, nonzero matrix, or ``features`` is unknown.

    Source: Spectral superposition, §3 and Theorem 12; for the tail, see power_law_tail.
    """
    check_matrix("inspect_matrix", W)
    if features_side(W.shape, features) == "rows":
        W = W.T
    spectrum = nonzero_spectrum("inspect_matrix", W, RTOL, None)
    # Scaled by a power of 4 where W's squares leave float64's range; no figure below depends on it.
    density = SpectralDensity(spectrum.all_eigenvalues, spectrum.rank)
    classes = classes_of(spectrum)
    tail = power_law_tail(spectrum.all_eigenvalues)
    return {
        "zero_features": classes.counts["zero"],
        "rank": spectrum.rank,
        "stable_rank": density.stable_rank,
        "effective_rank": density.effective_rank,
        "saturation": float(classes.measures.dimensionality.sum()) / spectrum.rank,
        "localized": classes.shares["localized"],
        "band_localized": classes.shares["band-localized"],
        "broadband": classes.shares["broadband"],
        "alpha": tail and tail.alpha,
        "alpha_low": tail and tail.low,
        "alpha_high": tail and tail.high,
        "distance": tail and tail.distance,
        "tail": tail and tail.length,
        "note": "" if tail else "too few eigenvalues for a tail",
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
    if matrix.dtype not in _DTYPES:
        return MatrixRow(*start, note=f"quantised ({matrix.dtype})")
    try:
        return MatrixRow(*start, **inspect_matrix(matrix.read(), features=features))
    except ValueError as error:
        if not str(error).startswith("inspect_matrix: W"):
            raise
        return MatrixRow(*start, note=str(error).rpartition("got ")[2])


def _files(model: Path) -> list[Path]:
    if model.is_file() and model.suffix == SUFFIX:
        return [model]
    if not model.is_dir():
        raise ValueError(
            message("stored_matrices", "model", f"be a folder or a {SUFFIX} file", repr(str(model)), "nothing is there")
        )
    indices = sorted(model.glob(f"*{INDEX}"))
    if not indices:
        files = sorted(model.glob(f"*{SUFFIX}"))
        if not files:
            what = f"none in {str(model)!r}"
            raise ValueError(message("stored_matrices", "model", f"hold {SUFFIX} files", what, "convert others first"))
        return files
    names: set[str] = set()
    for index in indices:
        try:
            names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _unreadable(index, error) from error
    files = [model / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"{len(missing)} missing, such as {missing[0]!r}"
        raise ValueError(message("stored_matrices", "model", "hold every shard that its index names", what))
    return files


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(message("stored_matrices", str(path), "be a readable, undamaged file", str(error) or repr(error)))
