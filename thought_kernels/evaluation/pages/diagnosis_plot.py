"""The diagnosis as a plot: Δ's spectrum, its place in W, the features it moves, and whom it disturbs."""

from __future__ import annotations

import math
from typing import Any

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.pages.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    block_axis,
    dot,
    lattice,
    legend,
    name_rows,
    percent,
)

_SITE_COLOURS = (BLUE, ORANGE, GREEN)


def draw_diagnosis(section: Section, canvas: Any) -> bool:
    """Draws the section on a matplotlib figure; False where there is nothing to draw."""
    sites = [name for name in section.subjects("transport") if section.series(name, "transport")]
    if not sites:
        return False
    others = section.subjects("caused")
    below = 0.9 + 0.34 * len(others) if others else 0
    canvas.set_size_inches(9.6, 3.1 + below)
    top, *rest = canvas.subfigures(2, 1, height_ratios=(3.1, below)) if others else (canvas,)
    spectra, spaces, features = top.subplots(1, 3)
    for site, colour in zip(sites, _SITE_COLOURS, strict=False):
        blocks = [name for name in section.subjects("singular value") if name.startswith(f"{site}, ")]
        _spectra(spectra, section, site, blocks, colour)
        _spaces(spaces, section, blocks, colour)
        _features(features, section, site, colour)
    _finish(spectra, spaces, features)
    if others:
        predicted, measured = rest[0].subplots(1, 2)
        _disturbance(predicted, measured, section, others)
    return True


def _spectra(axes: Any, section: Section, site: str, blocks: list[str], colour: str) -> None:
    for index, name in enumerate(blocks):
        values = [figure for figure in section.series(name, "singular value") if figure.value > 0]
        axes.plot(
            [figure.x for figure in values], [figure.value for figure in values], color=colour, linewidth=1.2,
            alpha=0.65, label=site if index == 0 else None,
        )  # fmt: skip


def _spaces(axes: Any, section: Section, blocks: list[str], colour: str) -> None:
    """The share of Δ in W's strongest directions, the mean over a site's blocks."""
    for quantity, style in (("written", "-"), ("read", "--")):
        series = [section.series(name, quantity) for name in blocks]
        means = [sum(figure.value for figure in column) / len(column) for column in zip(*series, strict=True)]
        shares = [figure.x for figure in series[0]]
        axes.plot([0, *shares], [0, *means], style, color=colour)


def _features(axes: Any, section: Section, site: str, colour: str) -> None:
    for quantity, style in (("|ΔD|", "-"), ("transport", "--")):
        figures = section.series(site, quantity)
        axes.plot(
            [figure.x for figure in figures], [figure.value for figure in figures], style, color=colour, marker="o",
            markersize=4,
        )  # fmt: skip


def _finish(spectra: Any, spaces: Any, features: Any) -> None:
    """Scales, titles and legends."""
    for axes, names in ((spaces, ("written", "read")), (features, ("|ΔD|", "transport"))):
        for name, style in zip(names, ("-", "--"), strict=True):
            axes.plot([], [], style, color=INK, label=name)
    spectra.set_xscale("log", base=2)
    spectra.xaxis.set_major_formatter("{x:g}")
    spectra.set_yscale("log")
    spectra.set_xlabel("number")
    spectra.set_title("singular values of Δ")
    spaces.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    spaces.set_xlabel("W's strongest directions, share of all")
    spaces.set_title("share of Δ in them")
    percent(spaces.xaxis)
    percent(spaces.yaxis)
    block_axis(features)
    features.set_ylim(0, 1.35 * features.get_ylim()[1])  # the legend stands above the lines
    features.set_title("change of W's features, mean")
    lattice(spectra, spaces, features)
    for axes, place in ((spectra, "lower left"), (spaces, "lower right"), (features, "upper left")):
        legend(axes, place)


def _disturbance(predicted: Any, measured: Any, section: Section, others: list[str]) -> None:
    """A row for each other instruction: what the patch should do to it, and what it did."""
    for axes, quantities in (
        (predicted, {"caused": ORANGE}), (measured, {"accuracy, patch off": INK, "accuracy, patch on": BLUE})
    ):  # fmt: skip
        for quantity, colour in quantities.items():
            for row, name in enumerate(others):
                found = section.get(name, quantity)
                if found is not None and not math.isnan(found.value):
                    dot(axes, row, found, colour)
            axes.plot([], [], "o", color=colour, label=quantity.removeprefix("accuracy, "))
        name_rows(axes, others if axes is predicted else [""] * len(others))
    predicted.set_xlim(0, None)
    predicted.set_title("disturbance, predicted")
    measured.set_xlim(-0.02, 1.03)
    percent(measured.xaxis)
    measured.set_title("accuracy, measured")
    measured.legend(loc="upper left", bbox_to_anchor=(1, 1))
