"""A picture of a whole model's spectra, by kind of matrix over the blocks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thought_kernels.spectral.inspect import MatrixRow
from thought_kernels.spectral.stored import block_of, kind_of

_HIGHEST = 20  # exponent that is shown: beyond, and of shuffled entries, there is no tail to speak of
_Of = Callable[[MatrixRow], float | None]
_PANELS: tuple[tuple[str, _Of, _Of], ...] = (  # title, a row's figure, the same of its null
    ("saturation Σ D / rank", lambda row: row.saturation, lambda row: row.saturation_null),
    ("effective rank / smaller side", lambda row: _of_side(row, row.effective_rank),
     lambda row: _of_side(row, row.effective_rank_null)),
    ("median CV of features", lambda row: row.residual, lambda row: row.residual_null),
    ("share of Σ λ in spikes above the bulk", lambda row: row.spike_share, lambda row: row.spike_share_null),
    ("distance of the spectrum to the shuffled one", lambda row: row.shuffle_distance, lambda row: 0.0),
    ("tail exponent α", lambda row: row.alpha, lambda row: row.alpha_null),
)  # fmt: skip


def _of_side(row: MatrixRow, value: float | None) -> float | None:
    return None if value is None else value / min(row.rows, row.columns)


def draw(rows: Sequence[MatrixRow], path: Path, title: str = "") -> None:
    """Draws the figures over the blocks, one curve per kind of matrix, dotted what its shuffled entries give.

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
        block = block_of(row.name)
        if row.rank is not None:
            kinds.setdefault(kind_of(row.name), []).append((-1 if block is None else block, row))
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    colours = [colormaps["tab20"](index) for index in range(20)]
    for axis, (name, figure_of, null_of) in zip(axes.flat, _PANELS, strict=True):
        for index, (kind, found) in enumerate(kinds.items()):
            points = [(block, row) for block, row in found if figure_of(row) is not None]
            places: list[Any] = [block for block, _ in points]
            values: list[Any] = [figure_of(row) for _, row in points]
            nulls: list[Any] = [null_of(row) for _, row in points]
            colour = colours[index % len(colours)]
            style: dict[str, Any] = {"color": colour, "linewidth": 1, "marker": ".", "label": kind}
            if name.startswith("tail"):
                axis.set_ylim(0, _HIGHEST)
                errors = [(row.alpha_high or 0) - (row.alpha or 0) for _, row in points]
                axis.errorbar(places, values, yerr=errors, elinewidth=0.5, **style)
            else:
                axis.plot(places, values, **style)
            axis.plot(places, nulls, ":", color=colour, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("block, 0-based (−1: outside of blocks)")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{title}; dotted: entries shuffled" if title else "dotted: entries shuffled")
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
