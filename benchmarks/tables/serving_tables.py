"""The tables of docs/serving.md, from the rows of real/serving.py and real/quantised.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from markdown_table import markdown
from real_tables import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results"


def llama_cpp() -> str:
    """Each adapter in both engines."""
    rows = _rows("serving.csv")
    heads = [
        "model, task", "rank", "MiB", "recovered, transformers", "recovered, llama.cpp", "KL between the two, bare",
        "the same, patched", "what the patch does",
    ]  # fmt: skip
    return markdown(heads, [_cells(row) for row in rows])


def _cells(row: dict[str, str]) -> list[str]:
    rank = row["rank"] if row["rank"] != "full" else f"full, at most {row['largest_rank']}"
    recovered = [f"{float(row[name]):.3f}" for name in ("recovered", "recovered_llama_cpp")]
    divergences = [f"{float(row[name]):.4f}" for name in ("kl_bare", "kl_patched", "kl_effect")]
    return [f"{MODELS[row['model']]}, {row['task']}", rank, row["mib"], *recovered, *divergences]


def quantised() -> str:
    """Each kind of weights, with the patch that was fitted beside them and with the float32 weights' own."""
    heads = ["model, task", "weights", "recovered", "recovered by the float32 patch", "KL of quantising alone"]
    cells = [
        [
            f"{MODELS[row['model']]}, {row['task']}", row["weights"], f"{float(row['recovered']):.3f}",
            f"{float(row['recovered_float32_patch']):.3f}", f"{float(row['kl_quantised']):.4f}",
        ]
        for row in _rows("quantised.csv")
    ]  # fmt: skip
    return markdown(heads, cells)


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


SERVING: dict[str, Callable[[], str]] = {"llama cpp": llama_cpp, "quantised": quantised}
