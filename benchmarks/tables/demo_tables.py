"""The tables of docs/demo.md, from what `thought-kernels demo --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from markdown_table import markdown

RESULT = Path(__file__).resolve().parents[1] / "results" / "demo.json"
LOST, KEPT = 0.1, 0.85  # shares of the prompted accuracy
FEW = 0.98  # recovered effect over values below this is named


def results() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def demo() -> str:
    """Accuracy and recovered effect of every instruction."""
    head = ("instruction", "bare", "prompted", "patched", "recovered", "of values", "outside: prompted", "patched")
    return markdown(
        head,
        [
            (
                task["instruction"] + (r" \*" if task["reserved"] else ""),
                *(f"{task[key]:.3f}" for key in ("base", "prompted", "patched")),
                f"{task['recovered']:.4f}",
                f"{task['recovered_values']:.3f}",
                *(f"{task[key]:.3f}" for key in ("prompted_outside", "patched_outside")),
            )
            for task in results()
        ],
    )


def losses() -> str:
    """Where patches fall short, in sentences."""
    tasks = results()
    kept = {task["name"]: task["patched_outside"] / task["prompted_outside"] for task in tasks}
    few = [task["name"] for task in tasks if task["recovered_values"] < FEW]
    lost = [name for name, share in kept.items() if share < LOST]
    most = sum(share >= KEPT for share in kept.values())
    return "\n".join([
        f"- Over values alone these recover less than {FEW}: {names(few)}.",
        f"- Outside the examples' range a patch keeps {mean(kept.values()):.2f} of the prompted accuracy on average; "
        f"{most} of {len(tasks)} instructions keep {KEPT} or more; less than {LOST} keep {names(lost)}.",
        f"- The exact replay's worst error is {max(task['replay_error'] for task in tasks):.0e} in "
        f"{tasks[0]['replay_dtype']}.",
    ])  # fmt: skip


def names(found: list[str]) -> str:
    return ", ".join(f"*{name}*" for name in found) or "none"


DEMO: dict[str, Callable[[], str]] = {"demo": demo, "demo losses": losses}
