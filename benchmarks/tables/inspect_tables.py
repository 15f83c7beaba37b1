"""The tables of docs/spectral_models.md: a pretrained model's weights by kind of matrix, and its tokens."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_table import markdown

from thought_kernels.spectral.inspect import row_of
from thought_kernels.spectral.inspect_summary import summarise

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHOWN = 6


def kinds() -> str:
    """A line for each kind of matrix of SmolLM2, and one for the model."""
    with (RESULTS / "inspect_smollm2.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len({line["source"] for line in found}) == 1, "inspect_smollm2.csv: rows of several files or features"
    rows = [row_of(line) for line in found]
    lines = [
        (
            one.kind.removeprefix("model.layers."), str(one.matrices), pair(one.saturation, one.saturation_null),
            f"{100 * one.above:.0f} %", pair(one.half_width, one.half_width_null),
            pair(one.residual, one.residual_null),
            f"{share(one.spike_share)} ({share(one.spike_share_null)})", str(one.without_bulk),
            pair(one.bulk_distance, one.bulk_distance_null, ".3f"), f"{one.shuffle_distance:.2f}",
            pair(one.alpha, one.alpha_null, ".1f"), f"{one.alpha_weighted:.1f}", f"{one.log_norm:.2f}",
        )
        for one in summarise(rows)
    ]  # fmt: skip
    head = ("kind", "matrices", "saturation", "above null", "half-width ω", "CV", "in spikes", "without a bulk",
            "bulk to its law", "distance to shuffled", "α", "mean α log₁₀ λ", "mean log₁₀ norm²")  # fmt: skip
    return markdown(head, lines)


def pair(value: float | None, null: float | None, digits: str = ".2f") -> str:
    return "–" if value is None or null is None else f"{value:{digits}} ({null:{digits}})"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def tokens() -> str:
    """The tokens and neurons of SmolLM2 that share most and least, and the clusters."""
    found = json.loads((RESULTS / "neighbours_smollm2.json").read_text(encoding="utf-8"))
    lines = []
    for name, one in found.items():
        short = name.removeprefix("model.").removesuffix(".weight")
        null = one["null"]
        ends = (f"{told(one[end])} ({null[end]['dimensionality']:.2g})" for end in ("most_shared", "least_shared"))
        groups = "; ".join(cluster(group["names"]) for group in one["clusters"][:SHOWN])
        lines.append((short, f"{one['mean_dimensionality']:.2g} ({null['mean_dimensionality']:.2g})",
                      f"{100 * one['common']:.0f} %", *ends, f"{one['clustered']} ({null['clustered']})",
                      groups))  # fmt: skip
    head = ("matrix", "mean D", "common", "most shared: D", "least shared: D", "features in clusters", "clusters")
    return markdown(head, lines)


def told(features: list[dict[str, Any]]) -> str:
    return ", ".join(f"{code(one['name'])} {one['dimensionality']:.2g}" for one in features[:SHOWN])


def cluster(names: list[str]) -> str:
    more = "" if len(names) <= SHOWN else f" … {len(names)}"
    return " ".join(code(name) for name in names[:SHOWN]) + more


def code(name: str) -> str:
    return f"`{name}`".replace("|", "\\|") if "`" not in name else "a backtick"


INSPECT: dict[str, Callable[[], str]] = {"inspect smollm2": kinds, "neighbours smollm2": tokens}
