"""A patch as lines of text: where it comes from, and how large and how well fitted its parts are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import Fit, SitePatch

_HEADS = ("‖Δ‖", "‖v‖", "residual", "condition", "best λ", "anisotropy", "d/tr Z")
_TOLD = ("instruction", "without", "model", "pairing", "estimator", "normalization", "scale", "ridge", "factor")
_MOST_LINES = 12  # of single blocks; a real model's sites are summed up, one line each
_LONGEST = 200  # characters of a provenance's value: an instruction may be a whole document

_Numbers = tuple[float | None, ...]


def summary(patch: PatchData, *, whole: bool = False) -> Iterator[str]:
    """The lines below a patch's headline.

    Args:
        patch: the patch.
        whole: a line for each block and site, however many there are. Otherwise more than twelve are summed up by
            site, each figure as its least and its largest.
    """
    for name in _TOLD:
        if patch.provenance.get(name) is not None:
            yield f"  {name}: {_shortened(str(patch.provenance[name]), whole)}"
    if "written_inputs" in patch.provenance:
        written = len(patch.provenance["written_inputs"])
        yield f"  fitted on: {patch.provenance.get('examples')} examples and {written} inputs that the model wrote"
    rows = {key: _numbers(entry) for key, entry in patch.entries.items()}
    if whole or len(rows) <= _MOST_LINES:
        yield from _single(patch, rows)
    else:
        yield from _by_site(patch, rows)
    yield from _remarks(patch)


def _single(patch: PatchData, rows: dict[tuple[int, str], _Numbers]) -> Iterator[str]:
    """A line for each block and site."""
    yield f"  {'block':>5}  {'site':<9}  {'rank':>5}  " + "  ".join(f"{head:>{_width(head)}}" for head in _HEADS)
    for (layer, site), numbers in rows.items():
        shown = ("–" if number is None else format(number, ".3g") for number in numbers)
        cells = "  ".join(f"{cell:>{_width(head)}}" for head, cell in zip(_HEADS, shown, strict=True))
        yield f"  {layer:>5}  {site:<9}  {_rank(patch.entries[layer, site]):>5}  {cells}"


def _by_site(patch: PatchData, rows: dict[tuple[int, str], _Numbers]) -> Iterator[str]:
    """A line for each site: the figures' extremes among its blocks, in columns as wide as they need."""
    table = [["site", "blocks", "rank", *_HEADS]]
    for site in patch.sites:
        keys = [key for key in rows if key[1] == site]
        columns = zip(*(rows[key] for key in keys), strict=True)
        ranks = list(dict.fromkeys(_rank(patch.entries[key]) for key in keys))
        numbers = [int(rank) for rank in ranks if rank.isdecimal()]
        rank = f"{min(numbers)}–{max(numbers)}" if len(numbers) == len(ranks) > 1 else ", ".join(ranks)
        table.append([site, blocks([layer for layer, _ in keys]), rank, *map(_extremes, columns)])
    kept = [column for column in zip(*table, strict=True) if any(cell != "–" for cell in column[1:])]
    widths = [max(map(len, column)) for column in kept]
    for line in zip(*kept, strict=True):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    yield f"  least–largest among the blocks of a site; print(patch.table()) shows all {len(rows)}"


def blocks(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0–2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _extremes(column: Sequence[float | None]) -> str:
    numbers = [number for number in column if number is not None]
    if not numbers:
        return "–"
    low, high = (format(number, ".3g") for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low}–{high}"


def _numbers(entry: SitePatch) -> _Numbers:
    """A site's figures in the order of their heads."""
    vector = None if entry.vector is None else float(torch.linalg.vector_norm(entry.vector.double()))
    fit = entry.fit or Fit(0)
    return (
        entry.norm() if _has_matrix(entry) else None, vector, fit.residual, fit.condition, fit.best_scale,
        fit.anisotropy, fit.spherical_scale,
    )  # fmt: skip


def _has_matrix(entry: SitePatch) -> bool:
    return entry.matrix is not None or entry.factors is not None


def _rank(entry: SitePatch) -> str:
    return str(entry.rank or "full") if _has_matrix(entry) else "–"


def _remarks(patch: PatchData) -> Iterator[str]:
    """What the columns mean, where they are filled."""
    if any(entry.fit and entry.fit.anisotropy is not None for entry in patch.entries.values()):
        yield "  residual: the share of the differences left on the fitted rows; what it is worth only answers say"
        yield "  best λ: the scale that leaves the least residual"
        yield "  anisotropy 0: Z is a multiple of 1, the rows are spherical, and best for 'mean' is d/tr Z"
    if any(entry.fit and entry.fit.condition == math.inf for entry in patch.entries.values()):
        yield "  condition inf: Z is singular, as is usual: fewer independent rows than the site has inputs"


def _shortened(text: str, whole: bool) -> str:
    return text if whole or len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def _width(head: str) -> int:
    return max(9, len(head))
