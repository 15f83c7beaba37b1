"""The report's plots, one function a section, as inline SVG that needs no network and no fonts of its own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

from thought_kernels.evaluation.figures.section import Figure, Section
from thought_kernels.evaluation.pages.diagnosis_plot import draw_diagnosis
from thought_kernels.evaluation.pages.drawing import (
    BLUE,
    COLOURS,
    FLOOR,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    block_axis,
    dot,
    lattice,
    legend,
    line,
    logarithmic,
    name_rows,
    percent,
)

SMALLEST_KL = 1e-7  # drawn for anything below, which is rounding
_STYLE = {
    "font.size": 10.5, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#8a9099", "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "thought_kernels",
    "axes.grid": False, "grid.color": "#e3e6ea",
}  # fmt: skip


def plot(section: Section) -> str | None:
    """The section's plot as an <svg> element; None for a section that has none, or nothing to draw."""
    draw = PLOTS.get(section.name)
    if draw is None or not section.figures:
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(layout="constrained")
        FigureCanvasAgg(canvas)  # not pyplot: no global state is left behind
        if not draw(section, canvas):
            return None
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), section.name)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone: no prologue, no metadata with its addresses, ids that no other plot has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _dots(section: Section, canvas: Any) -> bool:
    """Accuracy and recovered effect of every subject, a row each, with intervals."""
    names = [name for name in section.subjects() if any(section.get(name, q) for q in ("accuracy", "recovered"))]
    if not names:
        return False
    canvas.set_size_inches(9.6, 0.9 + 0.34 * len(names))
    left, right = canvas.subplots(1, 2, sharey=True)
    for axes, quantity, title in ((left, "accuracy", "accuracy"), (right, "recovered", "recovered effect")):
        for row, name in enumerate(names):
            figure = section.get(name, quantity)
            if figure is not None and not math.isnan(figure.value):
                dot(axes, row, figure, COLOURS.get(name, ORANGE))
        axes.set_title(title)
        name_rows(axes, names)
        patched = section.get("patched", quantity)
        if patched is not None and not math.isnan(patched.value):
            axes.axvline(patched.value, color=BLUE, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    left.set_xlim(-0.02, 1.03)
    right.set_xlim(FLOOR - 0.05, 1.06)
    percent(left.xaxis)
    return True


def _effect(section: Section, canvas: Any) -> bool:
    canvas.set_size_inches(9.6, 2.9)
    bars, tokens, effects = canvas.subplots(1, 3, width_ratios=(1, 1.05, 1.05))
    for place, name in enumerate(("bare", "prompted", "patched")):
        figure = section.get(name, "accuracy")
        if figure is None or math.isnan(figure.value):
            continue
        bars.bar(place, figure.value, 0.7, color=COLOURS[name])
        _whisker(bars, place, figure)
    bars.set_xticks(range(3), ["bare", "prompted", "patched"])
    bars.set_title("accuracy")
    bars.set_ylim(0, 1.05)
    percent(bars.yaxis)
    for name in ("bare", "patched"):
        line(tokens, section.series(name, "same token"), COLOURS[name], name)
    tokens.set_title("same next token as prompted")
    tokens.set_ylim(-0.02, 1.05)
    percent(tokens.yaxis)
    legend(tokens, "lower right")
    for name in ("bare", "patched"):
        line(effects, section.series(name, "KL to prompted"), COLOURS[name], name, floor=SMALLEST_KL)
    effects.set_title("KL to prompted, nats")
    logarithmic(effects.yaxis)
    for axes in (tokens, effects):
        axes.set_xlabel("answer position (token)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    lattice(bars, tokens, effects)
    return True


def _whisker(axes: Any, place: float, figure: Figure) -> None:
    if not math.isnan(figure.low):
        axes.plot([place, place], [figure.low, figure.high], color="#000000", linewidth=1.2)


def _side_effects(section: Section, canvas: Any) -> bool:
    names, kinds = section.subjects("accuracy, patch on"), section.subjects("KL of a passage")
    if not names and not kinds:
        return False
    canvas.set_size_inches(9.6, 1.1 + max(0.3 * len(kinds), 0.42 * len(names)))
    panels = list(canvas.subplots(1, bool(names) + bool(kinds), squeeze=False)[0])
    if kinds:
        _passages(panels.pop(0), section, kinds)
    if names:
        _others(panels.pop(0), section, names)
    return True


def _passages(axes: Any, section: Section, kinds: list[str]) -> None:
    """Drift by kind of text, with that of all of it and that on unrelated prompts."""
    found = [section.get(kind, "KL of a passage") for kind in kinds]
    for row, figure in enumerate(found):
        if figure is not None and not math.isnan(figure.value):
            axes.plot([max(figure.value, SMALLEST_KL)], [row], "o", markersize=6, color=BLUE)
    for quantity, name, colour in (("text KL", "all text", BLUE), ("unrelated KL", "unrelated prompts", ORANGE)):
        figure = section.get("patched", quantity)
        if figure is not None and figure.value > 0:
            axes.axvline(figure.value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=name)
    logarithmic(axes.xaxis)
    name_rows(axes, kinds)
    axes.set_title("drift by kind of text, nats a token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


def _others(axes: Any, section: Section, names: list[str]) -> None:
    for shift, (quantity, colour) in enumerate((("accuracy, patch off", INK), ("accuracy, patch on", BLUE))):
        for row, name in enumerate(names):
            figure = section.get(name, quantity)
            if figure is not None and not math.isnan(figure.value):
                axes.barh(
                    row + (shift - 0.5) * 0.38, figure.value, 0.36, color=colour,
                    label=quantity.removeprefix("accuracy, ") if row == 0 else None,
                )  # fmt: skip
    name_rows(axes, names)
    axes.set_xlim(0, 1.02)
    percent(axes.xaxis)
    axes.set_title("accuracy on other instructions")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


def _scale(section: Section, canvas: Any) -> bool:
    recovered = section.series("patched", "recovered")
    if not recovered:
        return False
    canvas.set_size_inches(9.6, 3.1)
    left, right = canvas.subplots(1, 2)
    line(left, section.series("patched", "accuracy"), BLUE, "accuracy")
    line(left, recovered, GREEN, "recovered effect", floor=FLOOR)
    left.set_xlabel("scale")
    left.set_ylim(FLOOR, 1.08)
    left.set_title("against scale")
    legend(left, "lower center")
    for quantity, name, colour in (("unrelated KL", "unrelated prompts", BLUE), ("text KL", "ordinary text", ORANGE)):
        _by_scale(right, recovered, section.series("patched", quantity), name, colour)
    logarithmic(right.xaxis)
    right.set_ylim(FLOOR, 1.15)
    right.set_xlabel("KL to the bare model, nats a token")
    right.set_ylabel("recovered effect")
    right.set_title("effect against side effect, by scale")
    legend(right, "lower right")
    lattice(left, right, axis="both")
    return True


def _by_scale(axes: Any, effects: list[Figure], beside: list[Figure], name: str, colour: str) -> None:
    """Effect against a side effect, a point a scale."""
    drift = {figure.x: figure.value for figure in beside if figure.value > 0}
    pairs = [(drift[figure.x], figure) for figure in effects if figure.value > FLOOR and figure.x in drift]
    places = [(value, figure.value) for value, figure in pairs]
    if not places:
        return
    axes.plot(*zip(*places, strict=True), color=colour, marker="o", markersize=4.5, label=name)
    for index, (place, (_, figure)) in enumerate(zip(places, pairs, strict=True)):
        axes.annotate(
            f"{figure.x:g}", place, xytext=(0, 7 if index % 2 else -14), textcoords="offset points", fontsize=9,
            ha="center", color=colour,
        )  # fmt: skip


def _data(section: Section, canvas: Any) -> bool:
    if not section.series("patched", "recovered"):
        return False
    canvas.set_size_inches(9.6, 3.0)
    left, right = canvas.subplots(1, 2)
    line(left, section.series("patched", "accuracy"), BLUE, "patched")
    line(right, section.series("patched", "recovered"), BLUE, "patched", floor=FLOOR)
    prompted = section.get("prompted", "accuracy")
    if prompted is not None and not math.isnan(prompted.value):
        left.axhline(prompted.value, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="prompted")
    legend(left, "lower right")
    counts = [figure.x for figure in section.series("patched", "recovered")]
    for axes, title in ((left, "accuracy"), (right, "recovered effect")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.set_xlabel("examples")
        axes.set_title(title)
        axes.set_ylim(FLOOR if axes is right else 0, 1.06)
    lattice(left, right)
    percent(left.yaxis)
    return True


def _generalisation(section: Section, canvas: Any) -> bool:
    names = section.subjects("prompted")
    if not names:
        return False
    canvas.set_size_inches(9.6, 1.0 + 0.34 * len(names))
    axes = canvas.subplots()
    for row, name in enumerate(names):
        for quantity, label in (("bare", "bare"), ("prompted", "prompted"), ("accuracy", "patched")):
            figure = section.get(name, quantity)
            if figure is not None and not math.isnan(figure.value):
                dot(axes, row, figure, COLOURS[label])
    for label in ("bare", "prompted", "patched"):
        axes.plot([], [], "o", color=COLOURS[label], label=label)
    name_rows(axes, names)
    axes.set_xlim(-0.02, 1.03)
    percent(axes.xaxis)
    axes.set_title("accuracy")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return True


def _replay(section: Section, canvas: Any) -> bool:
    blocks = section.series("replayed", "block error")
    control = section.get("unpatched control", "logit error")
    if not blocks:
        return False
    canvas.set_size_inches(9.6, 2.5)
    axes = canvas.subplots()
    # A block that is exact to the last bit is drawn where a logarithm can be taken.
    axes.plot(
        [figure.x for figure in blocks], [max(figure.value, 1e-17) for figure in blocks], color=BLUE, marker="o",
        markersize=4.5, label="replayed, after each block",
    )  # fmt: skip
    if control is not None and control.value > 0:
        axes.axhline(control.value, color=RED, linewidth=1.2, linestyle=(0, (4, 3)), label="logits, no patch")
    logarithmic(axes.yaxis)
    block_axis(axes)
    axes.set_title("relative error")
    lattice(axes)
    axes.legend(loc="center right")
    return True


def _patch(section: Section, canvas: Any) -> bool:
    norms = [name for name in section.subjects("norm") if section.series(name, "norm")]
    if not norms:
        return False
    canvas.set_size_inches(9.6, 2.5)
    left, right = canvas.subplots(1, 2)
    for name, colour in zip(norms, (BLUE, ORANGE, GREEN, RED, GREY), strict=False):
        line(left, section.series(name, "norm"), colour, name)
    for name, colour in zip(section.subjects("residual"), (BLUE, ORANGE, GREEN), strict=False):
        line(right, section.series(name, "residual"), colour, name)
    for axes, title in ((left, "size, Frobenius norm"), (right, "share of the examples' difference left")):
        axes.set_title(title)
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # the legend stands above the lines
        block_axis(axes)
        lattice(axes)
        legend(axes, "upper left")
    return True


def _combination(section: Section, canvas: Any) -> bool:
    """What was foretold of patches together, and what was measured, a row each."""
    rows = [
        (name, measured, section.get(name, f"{quantity}, foretold"))
        for quantity in ("recovered", "undone")
        for name in section.subjects(f"{quantity}, foretold")
        if (measured := section.get(name, quantity)) is not None
    ]
    if not rows:
        return False
    canvas.set_size_inches(9.6, 1.2 + 0.42 * len(rows))
    axes = canvas.subplots()
    for row, (_, *figures) in enumerate(rows):
        for shift, figure, colour in zip((-0.12, 0.12), figures, (BLUE, ORANGE), strict=True):
            if figure is not None and not math.isnan(figure.value):
                dot(axes, row + shift, figure, colour)
    for name, colour in (("measured", BLUE), ("foretold from each alone", ORANGE)):
        axes.plot([], [], "o", color=colour, label=name)
    name_rows(axes, [name for name, *_ in rows])
    axes.set_xlim(FLOOR - 0.05, 1.06)
    axes.set_title("recovered, or undone")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return True


PLOTS: dict[str, Callable[[Section, Any], bool]] = {
    "patch": _patch, "effect": _effect, "controls": _dots, "parts": _dots, "baselines": _dots,
    "side_effects": _side_effects, "scale": _scale, "data": _data, "generalisation": _generalisation, "replay": _replay,
    "combination": _combination, "diagnosis": draw_diagnosis,
}  # fmt: skip
