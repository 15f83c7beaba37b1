"""The report as one page that needs no network: a template filled with tables and inline plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.figures.headings import HEADINGS
from thought_kernels.evaluation.figures.report import Report
from thought_kernels.evaluation.figures.section import Figure, Section
from thought_kernels.evaluation.figures.verdict import RULES, summary
from thought_kernels.evaluation.pages.drawing import need_installed
from thought_kernels.evaluation.pages.plots import plot

TEMPLATE = Path(__file__).with_name("template.html.jinja")

FOLDED = 16  # rows of a table; one that has more is opened by who wants it
# Quantities that are shares, shown in per cent.
SHARES = {
    "accuracy", "accuracy left", "bare", "prompted", "same token", "harmed", "accuracy, patch off",
    "accuracy, patch on", "answers as bare",
}  # fmt: skip
# Quantities that are read block by block or token by token off the plot; their rows are in the JSON and the CSV.
PLOTTED_ONLY = {
    ("effect", "same token"),
    ("effect", "KL to prompted"),
    ("patch", "norm"),
    ("patch", "residual"),
    ("replay", "block error"),
    ("side_effects", "KL of a passage"),
    ("diagnosis", "singular value"),
    ("diagnosis", "written"),
    ("diagnosis", "read"),
}


def check_page() -> None:
    """Raises ValueError where a page cannot be made here."""
    need_installed("evaluate", "write the report's page", "jinja2", "matplotlib")


def render(report: Report) -> str:
    """The page's HTML text."""
    check_page()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sections = [
        {
            "name": name,
            "title": section.title,
            "reading": HEADINGS[name].reading if name in HEADINGS else "",
            "error": section.error,
            "plot": plot(section),
            "tables": tables(section),
            "inputs": _inputs(section),
            "samples": section.samples,
            "notes": section.notes,
            "cost": _cost(section),
        }
        for name, section in report.sections.items()
    ]
    settings = report.settings
    return template.render(
        FOLDED=FOLDED,
        title=_title(settings.get("instruction", "a patch")),
        summary=summary(report.verdict), verdict=report.verdict, rules=RULES, warnings=report.warnings,
        sections=sections, seconds=f"{report.seconds:.0f}",
        settings={name.replace("_", " "): _shown_setting(value) for name, value in settings.items()},
        settings_line=_settings_line(settings),
    )  # fmt: skip


def tables(section: Section) -> list[dict[str, Any]]:
    """Subjects by quantities, subjects that share no quantity apart.

    Returns:
        {"columns": [(quantity, whether any cell has an interval)], "rows": [(name, [cell, ...])]} each, a cell being
        (text, interval).
    """
    shown = _tabled(section)
    made = []
    for quantities in _together(shown):
        figures = [f for f in shown if f.quantity in quantities]
        columns = list(dict.fromkeys(f.quantity for f in figures))
        cells = {(f.subject, f.x, f.quantity): _cell(f) for f in figures}
        rows = [
            (_label(section.name, subject, x), [cells.get((subject, x, column), ("", "")) for column in columns])
            for subject, x in dict.fromkeys((f.subject, f.x) for f in figures)
        ]
        wide = [any(row[index][1] for _, row in rows) for index in range(len(columns))]
        names = [_HEADINGS.get(section.name, {}).get(column, column) for column in columns]
        made.append({"columns": list(zip(names, wide, strict=True)), "rows": rows})
    return made


def _tabled(section: Section) -> list[Figure]:
    """Figures that the tables show; of the effect those at single answer positions are in the plot."""
    return [
        f
        for f in section.figures
        if (section.name, f.quantity) not in PLOTTED_ONLY and (section.name != "effect" or f.x is None)
    ]


def _together(figures: list[Figure]) -> list[set[str]]:
    """Quantities in groups such that no subject has figures in two."""
    groups: list[set[str]] = []
    for subject in dict.fromkeys(f.subject for f in figures):
        own = {f.quantity for f in figures if f.subject == subject}
        apart = [group for group in groups if not group & own]
        joined = own.union(*(group for group in groups if group & own))
        place = next((index for index, group in enumerate(groups) if group & own), len(groups))
        groups = [*apart[:place], joined, *apart[place:]]
    return groups


# What a column is called where its quantity's name would mislead, or is too long for a table.
_HEADINGS = {
    "generalisation": {"accuracy": "patched"},
    "patch": {"seconds to make": "seconds", "peak memory while made": "peak MiB"},
    "baselines": {"seconds to make": "seconds", "peak memory while made": "peak MiB"},
    "data": {"seconds to make": "seconds", "peak memory while made": "peak MiB"},
    "diagnosis": {
        "stable rank": "stable", "effective rank": "effective", "write gain": "write", "read gain": "read",
        "largest |ΔD|": "largest", "read overlap": "read", "write overlap": "write",
        "accuracy, patch off": "patch off", "accuracy, patch on": "patch on",
    },
}  # fmt: skip
_SWEPT = {"scale": "scale", "data": "examples", "diagnosis": "block"}


def _label(section: str, subject: str, x: float | None) -> str:
    return subject if x is None else f"{subject}, {_SWEPT.get(section, '')} {x:g}"


def _inputs(section: Section) -> str:
    counts = sorted({f.inputs for f in _tabled(section) if f.inputs})
    return "" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _cell(figure: Figure) -> tuple[str, str]:
    if math.isnan(figure.value):
        return "–", ""
    share = figure.quantity in SHARES
    interval = "" if math.isnan(figure.low) else f"{number(figure.low, share)} to {number(figure.high, share)}"
    return number(figure.value, share) + (" %" if share else ""), interval


def number(value: float, share: bool = False) -> str:
    """A number as the tables show it: per cent with one decimal for shares, three digits otherwise."""
    if share:
        return f"{100 * value:.1f}"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1.5 else f"{value:.3g}"


def _cost(section: Section) -> str:
    expected = "" if section.expected_seconds is None else f" ({section.expected_seconds:.0f} expected)"
    parts = [f"{section.seconds:.1f} s{expected}"]
    if section.peak_memory_mib is not None:
        parts.append(f"peak memory {section.peak_memory_mib:.0f} MiB")
    if section.device_memory_mib is not None:
        parts.append(f"on the device {section.device_memory_mib:.0f} MiB")
    return ", ".join(parts)


def _settings_line(settings: dict[str, Any]) -> str:
    model = str(settings.get("model", "")).rstrip("/").rpartition("/")[2]
    return (
        f"{model} ({settings.get('parameters', 0):,} parameters, {settings.get('dtype', '')}), "
        f"{settings.get('examples', 0)} examples, {settings.get('held_out', 0)} held-out inputs, "
        f"scorer {settings.get('scorer', '')}, {settings.get('date', '')}"
    )


def _title(instruction: Any) -> str:
    """The instruction in a line: a text, a system message, or demonstrations by their number and the first of them."""
    if isinstance(instruction, str):
        return f"“{_cut(instruction)}”"
    system = [turn["content"] for turn in instruction if turn["role"] == "system"]
    asked = [turn["content"] for turn in instruction if turn["role"] == "user"]
    answered = [turn["content"] for turn in instruction if turn["role"] == "assistant"]
    if not answered:
        return f"“{_cut(' '.join([*system, *asked]))}”"
    shown = f"{len(answered)} demonstrations: {_cut(asked[0], 30)} → {_cut(answered[0], 30)}, …"
    return f"“{_cut(system[0])}” with {shown}" if system else shown


def _cut(text: str, most: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _shown_setting(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if value != value.strip() else value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)
