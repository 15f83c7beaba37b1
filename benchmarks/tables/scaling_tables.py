"""The tables of docs/real_models.md on how effect and cost grow, from the rows of real/scaling.py."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markdown_table import markdown
from real_tables import MODELS

from thought_kernels.fitting.recipe import Recipe

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scaling.csv"
Row = dict[str, str]


@dataclass(frozen=True)
class Shape:
    """A model's blocks: their number, and widths of the stream, of o_proj's input, of keys and values, of the MLP."""

    blocks: int
    hidden: int
    heads: int
    keys: int
    mlp: int

    @property
    def parameters(self) -> int:
        """Of the linear layers of all blocks: q, o; k, v; gate, up, down."""
        return self.blocks * self.hidden * (2 * self.heads + 2 * self.keys + 3 * self.mlp)

    def solving(self, tokens: int) -> float:
        """Multiplications and additions of the normal equations of both sites, on their smaller side, in float64."""
        total = 0.0
        for width, out in ((self.heads, self.heads), (self.mlp, self.hidden)):
            side = min(width, tokens)
            gram = 0 if side == width else tokens**2 * width + 2 * tokens * out * width  # the rows' own, and Δ from it
            total += gram + side**3 / 3 + 2 * out * side**2
        return self.blocks * total

    @property
    def patch(self) -> int:
        """Numbers of a dense patch: Δ between heads, and that of down_proj."""
        return self.blocks * (self.heads**2 + self.hidden * self.mlp)


MEASURED = {
    "smol": Shape(30, 576, 576, 192, 1536), "gemma": Shape(18, 640, 1024, 256, 2048),
    "qwen": Shape(24, 896, 896, 128, 4864),
}  # fmt: skip
LARGER = {
    "Gemma 3 1B": Shape(26, 1152, 1024, 256, 6912), "Gemma 3 4B": Shape(34, 2560, 2048, 1024, 10240),
    "Gemma 3 12B": Shape(48, 3840, 4096, 2048, 15360), "Gemma 3 27B": Shape(62, 5376, 4096, 2048, 21504),
}  # fmt: skip
INPUTS = 32
ROW_TOKENS = 50  # of a fitted row, about


def read() -> list[Row]:
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def fitted_rows(inputs: int) -> int:
    """Prompts that a fit of so many inputs reads: completions, and inputs that the model wrote."""
    return Recipe.completions * inputs + Recipe.written_inputs


def inputs() -> str:
    """A row for each number of inputs: what each model's patch recovers, and what it takes."""
    rows = {(row["model"], int(row["inputs"])): row for row in read()}
    models = [model for model in MODELS if any(model == key[0] for key in rows)]
    head = ["inputs"]
    for model in models:
        head += [f"{MODELS[model]}: recovered", "seconds", "writing", "peak MiB"]
    lines = []
    for count in sorted({key[1] for key in rows}):
        line = [str(count)]
        for model in models:
            row = rows.get((model, count))
            line += ["–"] * 4 if row is None else [
                f"{float(row['recovered']):.3f}", f"{float(row['seconds']):.0f}", f"{float(row['generation']):.0f}",
                row["peak_mib"],
            ]  # fmt: skip
        lines.append(line)
    return markdown(head, lines)


def rate(model: str) -> float:
    """Seconds for each row and each 1e9 parameters of the blocks: the slope of seconds over rows, by least squares."""
    rows = [row for row in read() if row["model"] == model]
    counts = np.array([fitted_rows(int(row["inputs"])) for row in rows], dtype=float)
    seconds = np.array([float(row["seconds"]) for row in rows])
    # Relative errors are alike: each equation is divided by its seconds.
    slope, _ = np.linalg.lstsq(np.stack([counts, np.ones_like(counts)], 1) / seconds[:, None], np.ones_like(seconds))[0]
    return float(slope) / (MEASURED[model].parameters / 1e9)


def sizes() -> str:
    """What a fit of 32 inputs takes: measured on each model, and from its rate on larger ones, which nobody has run.

    The rate is that of rows; solving, which grows faster with a model's widths, is counted beside it in products.
    """
    found = {row["model"]: row for row in read() if int(row["inputs"]) == INPUTS}
    lines, tokens = [], fitted_rows(INPUTS) * ROW_TOKENS
    for model, row in found.items():
        shape = MEASURED[model]
        lines.append((
            MODELS[model], millions(shape.parameters), f"{rate(model):.2f}", f"{float(row['seconds']):.0f}",
            f"{shape.solving(tokens) / 1e12:.1f}",
            f"{shape.patch * 4 / 2**20:,.0f}",
        ))  # fmt: skip
    rates = sorted(rate(model) for model in found)
    for name, shape in LARGER.items():
        ends = (rates[0], rates[-1])  # of the shortest rows and the longest
        seconds = (float(f"{fitted_rows(INPUTS) * each * shape.parameters / 1e9:.2g}") for each in ends)
        spread = " to ".join(dict.fromkeys(f"{each:,.0f}" for each in seconds))
        lines.append((
            f"{name} (not run)", millions(shape.parameters), "–", f"rows alone: {spread}",
            f"{shape.solving(tokens) / 1e12:,.1f}", f"{shape.patch * 4 / 2**20:,.0f}",
        ))  # fmt: skip
    head = (
        "model",
        "parameters in blocks",
        "seconds a row and 1e9 parameters",
        "fit of 32 inputs, s",
        "solving, 1e12 products",
        "patch, MiB",
    )
    return markdown(head, lines)


# Of one GPU, multiplications and additions a second: the forwards and the sums (both bfloat16 on tensor cores, the sums
# by tiles that scale each row), the solve (float64); guessed shares of an H200's published peaks. Nothing is measured.
FORWARD, SUMS, SOLVE = 0.4 * 989e12, 0.3 * 989e12, 0.4 * 67e12
BANDWIDTH = {1: math.inf, 8: 300e9, 64: 40e9}  # bytes a second of a ring within a machine, and between machines
LATENCY = 1e-4  # seconds of one all-reduce
FORWARDS = 2.4  # of the rows' tokens: two streams, and each block's patches, as bench_fit.py counts them
ROWS, TOKENS = 32_768, 64


def predicted(shape: Shape, gpus: int) -> dict[str, float]:
    """Seconds of a sequential fit's parts on so many GPUs: rows are shared, sums added, and every GPU solves."""
    tokens = ROWS * TOKENS / gpus
    sites = ((shape.heads, shape.heads), (shape.mlp, shape.hidden))  # widths of a and δ
    sums = shape.blocks * sum(a * (a + 2 * d) for a, d in sites)  # of one token; half of Z, which is symmetric, and C
    numbers = shape.blocks * sum(a * (a + d) for a, d in sites)
    return {
        "forwards": FORWARDS * 2 * shape.parameters * tokens / FORWARD,
        "sums": sums * tokens / SUMS,
        "all-reduce": 0.0 if gpus == 1 else
        2 * (gpus - 1) / gpus * 4 * numbers / BANDWIDTH[gpus] + 2 * shape.blocks * LATENCY,
        "solve": shape.blocks * sum(a**3 / 3 + 2 * d * a**2 for a, d in sites) / SOLVE,
    }  # fmt: skip


def processes() -> str:
    """Predicted seconds of a fit of many rows on one, eight and 64 GPUs."""
    lines = []
    for name, shape in LARGER.items():
        alone = sum(predicted(shape, 1).values())
        for gpus in BANDWIDTH:
            parts = predicted(shape, gpus)
            lines.append((
                name, str(gpus), *(f"{seconds:.1f}" for seconds in parts.values()), f"{sum(parts.values()):.1f}",
                f"{alone / sum(parts.values()):.1f}",
            ))  # fmt: skip
    return markdown(("model", "GPUs", "forwards", "sums", "all-reduce", "solve", "all", "times faster"), lines)


def millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M"


SCALING: dict[str, Callable[[], str]] = {
    "scaling inputs": inputs,
    "scaling sizes": sizes,
    "scaling processes": processes,
}
