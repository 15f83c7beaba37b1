"""A picture of a whole model's spectra, by kind of matrix over the blocks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thought_kernels.spectral.inspect import MatrixRow, StoredMatrix

_PANELS = (  # title, the figure of a row
    ("tail exponent α", lambda row: row.alpha),
    ("effective rank / smaller side", lambda row: row.effective_rank / min(row.rows, row.columns)),
    ("saturation Σ D / rank", lambda row: row.saturation),
    ("share of broadband features", lambda row: row.broadband),
)


def draw(rows: Sequence[MatrixRow], path: Path, title: str = "") -> None:
    """Draws α, relative effective rank, saturation and the broadband share, one curve per kind of matrix.

    Matrices outside of blocks (embeddings) stand left of block 0; experts of one block share its place.

    Args:
        rows: at least one.
        path: of the picture, .png or what else matplotlib writes.
        title: above it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, MatrixRow]]] = {}
    for row in rows:
        stored = StoredMatrix(row.name, path, row.name, None, (row.rows, row.columns), row.dtype)
        if row.rank is not None:
            kinds.setdefault(stored.kind, []).append((-1 if stored.block is None else stored.block, row))
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    colours = [colormaps["tab20"](index) for index in range(20)]
    for axis, (name, figure_of) in zip(axes.flat, _PANELS, strict=True):
        for index, (kind, found) in enumerate(sorted(kinds.items())):
            points: list[tuple[int, Any]] = [(block, row) for block, row in found if figure_of(row) is not None]
            places, values = [block for block, _ in points], [figure_of(row) for _, row in points]
            style = {"color": colours[index % len(colours)], "marker": ".", "label": kind}
            if name.startswith("tail"):
                errors = [row.alpha_high - row.alpha for _, row in points]
                axis.errorbar(places, values, yerr=errors, elinewidth=0.5, linewidth=1, **style)
            else:
                axis.plot(places, values, linewidth=1, **style)
        axis.set_title(name)
        axis.set_xlabel("block, 0-based (−1: outside of blocks)")
        axis.grid(alpha=0.3)
        if name.startswith("share"):
            axis.set_ylim(-0.05, 1.05)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
