"""The table of docs/serving.md, from the rows of real/serving.py."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from markdown_table import markdown
from real_tables import MODELS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "serving.csv"


def llama_cpp() -> str:
    """Each adapter in both engines."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
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


SERVING: dict[str, Callable[[], str]] = {"llama cpp": llama_cpp}
