"""The tables of kernels and runs timed on a CPU, from the results file that the benchmarks write."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from markdown_table import markdown

LINEAR = ("256 x 640 to 2048", "256 x 1152 to 6912")
CPU = Path(__file__).resolve().parents[1] / "results" / "amd-epyc-2-cores.csv"

Row = dict[str, str]


def results() -> list[Row]:
    with CPU.open(newline="") as file:
        return list(csv.DictReader(file))


def found(rows: Iterable[Row], **fields: str) -> list[Row]:
    """The rows whose fields begin with the given texts; a text that ends with a full stop must be the whole."""

    def matches(value: str, wanted: str) -> bool:
        return value == wanted[:-1] if wanted.endswith(".") else value.startswith(wanted)

    return [row for row in rows if all(matches(row[key], wanted) for key, wanted in fields.items())]


def one(rows: Iterable[Row], **fields: str) -> Row:
    chosen = found(rows, **fields)
    if len(chosen) != 1:
        raise SystemExit(f"tables: {len(chosen)} rows have {fields}, not one")
    return chosen[0]


def speed() -> str:
    """What this project's kernels take beside others on a CPU."""
    rows = results()
    lines: list[tuple[str, str, str]] = []

    def accumulate(provider: str, rows_and_width: str, **fields: str) -> float:
        return float(
            one(rows, op="accumulate", provider=provider, shape=rows_and_width, measure="time", **fields)["ratio"]
        )

    widths = (640, 1152)
    full = {"case": "cross + gram + sums", "dtype": "float32"}
    ratios = [accumulate("accumulate (cpp).", f"16384 x {d}.", threads="2.", **full) for d in widths]
    what = "`accumulate`: cross, Gram, sums, weights and norms of 16,384 rows, d = 640 and 1152"
    lines.append((what, "two bare `addmm_` on scaled inputs", both(ratios, "{:.2f} x their time")))
    for provider, text in (
        ("equal work per token, H +=", "the same work per token, `H += w * outer(delta, a) / norm`, one thread"),
        ("equal work per token, weights", "the same with the weight in the vector, `H += outer(w / norm * delta, a)`"),
    ):
        ratios = [accumulate(provider, f"16384 x {d}.", threads="1.", **full) for d in widths]
        lines.append((what, text, both(ratios, "{:.0f} x faster")))
    ratios = [
        accumulate("H += outer(delta, a) per token", f"16384 x {d}.", threads="1.", case="cross alone") for d in widths
    ]
    lines.append(
        ("its cross product alone", "`H += outer(delta, a)` per token, one thread", both(ratios, "{:.0f} x faster"))
    )

    attention = found(rows, op="paired_attention", measure="time.", provider="paired_attention (cpp)")
    ratios = [float(row["ratio"]) for row in attention]
    text = f"{statistics.median(ratios):.2f} x its time (median of {len(ratios)}; worst {max(ratios):.2f})"
    lines.append(("`paired_attention`: both outputs", "torch's flash attention for one of them", text))

    linear = found(rows, op="linear", measure="time.", provider="oneDNN")
    ratios = [1 / float(one(linear, shape=shape)["ratio"]) for shape in LINEAR]
    what = "linear modules of the model's own forward, 256 rows, 640 x 2048 and 1152 x 6912"
    lines.append((what, "torch's own choice of BLAS", both(ratios, "{:.1f} x faster")))

    heads = found(rows, op="linear", measure="time.", provider="rows together")
    ratios = [1 / float(one(heads, dtype=dtype)["ratio"]) for dtype in ("float32.", "bfloat16.")]
    what = "a head of 262,144 tokens, without gradients, at the ends of 8 rows, float32 and bfloat16"
    lines.append((what, "the same by torch, which multiplies them one by one", both(ratios, "{:.0f} x faster")))

    width = one(
        rows,
        op="spectral",
        measure="time.",
        provider="fractional_dimensionality",
        shape="1152 x 262144",
        case="fractional dimensionality.",
    )
    lines.append(
        (
            "`fractional_dimensionality`, 262,144 features x 1152",
            "one Gram product",
            f"{float(width['ratio']):.2f} x its time",
        )
    )
    return markdown(("what", "against", "result"), lines)


def runs() -> str:
    """A whole `transmute` beside hooks on transformers' own forwards."""
    rows = found(results(), op="transmute", measure="time per example")
    shapes = {"270M, P = 32": "270m P32", "270M, P = 256": "270m P256", "1B, P = 32": "1b P32"}
    peers = {
        "hooks on two forwards per example": "two forwards, hooks, one by one",
        "the same in batches of 8": "two forwards, hooks, batches",
        "prefixes cached, no head, hooks": "prefix cached and repeated, no head, hooks.",
        "the same with oneDNN's products, as ours": "prefix cached and repeated, no head, hooks, oneDNN",
        "`sequential`": "sequential",
        "`two_pass`": "two_pass",
        "one forward of the examples over a cached prefix": "one forward",
    }
    lines = []
    for text, provider in peers.items():
        cells = [found(rows, shape=shape, provider=provider) for shape in shapes.values()]
        if any(len(cell) > 1 for cell in cells):
            raise SystemExit(f"tables: several rows are of {provider!r} at one shape, not one")
        lines.append((text, *(f"{float(cell[0]['ratio']):.2f}" if cell else "–" for cell in cells)))
    return markdown(("times as long as `layerwise` takes", *shapes), lines)


def both(ratios: Sequence[float], text: str) -> str:
    number = re.search(r"\{.*?\}", text)
    assert number is not None
    return text.replace(number[0], " and ".join(number[0].format(ratio) for ratio in ratios))


def toy_speed() -> str:
    """Ten steps of 32 toy models."""
    rows = results()
    lines = []
    for m in (16, 64):
        of = {
            key: float(one(rows, op="toy", measure="time.", provider=key, shape=f"32 x {m} ")["value"])
            for key in ("one by one, autograd", "one by one, closed form", "all at once")
        }
        autograd, closed, batch = of.values()
        lines.append(
            (
                f"m = {m}",
                f"{autograd:.1f} ms",
                f"{closed:.1f} ms",
                f"{batch:.1f} ms",
                f"{autograd / batch:.1f}",
                f"{closed / batch:.1f}",
            )
        )
    head = (
        "32 models",
        "one by one, autograd",
        "one by one, closed form",
        "all at once",
        "times the first",
        "times the second",
    )
    return markdown(head, lines)


def delta() -> str:
    """Relative error of delta for bfloat16 inputs, by the instruction's share of the softmax."""
    rows = found(results(), measure="relative error of delta", dtype="bfloat16.")
    masses = ("0.1", "0.01", "0.001", "0.0001")
    providers = {
        "difference of two bfloat16 outputs": "difference of two bfloat16",
        "δ rounded to bfloat16": "paired_attention (reference), rounded",
        "difference of two float32 outputs": "difference of two float32",
        "`paired_attention`, C++": "paired_attention (cpp).",
        "`paired_attention`, Triton (interpreted)": "paired_attention (triton",
    }
    lines = [
        (
            text,
            *(
                percentage(float(one(rows, provider=name, case=f"header 0, instruction {mass} of")["value"]))
                for mass in masses
            ),
        )
        for text, name in providers.items()
    ]
    return markdown(("share of the softmax", *masses), lines)


def percentage(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def serve() -> str:
    """What patches cost a model that writes."""
    rows = found(results(), op="serve.", threads="2.")
    order = sorted(rows, key=lambda row: float(row["ratio"] or 1))
    return markdown(
        ("patches", "seconds of a batch", "times as long as without"),
        [(row["provider"], f"{float(row['value']) / 1e3:.1f}", f"{float(row['ratio'] or 1):.2f}") for row in order],
    )


CPU_TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "runs": runs,
    "delta": delta,
    "toy speed": toy_speed,
    "many patches": serve,
}
