"""How a rival's settings are chosen: by the KL to the prompted model on the rows it is made from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from thought_kernels.evaluation.rivals.rows import Rows

# Of the rows that a rival is made from its settings are chosen by these; a choice needs no more. Every candidate is
# tried on a few, the best of them on all.
CHOICE_ROWS, FEW_ROWS, FINALISTS = 16, 4, 6
MAX_LAYERS = 8  # tried by the rivals that act on one block


class Intervention(Protocol):
    """Anything that can be put to work in a model and taken out again."""

    def applied(self, model: Any) -> Any:
        """A context manager; the model is as it was after it."""
        ...


class Fitted(NamedTuple):
    """A rival, made and ready.

    Attributes:
        change: what it does to a model.
        settings: what was chosen, in words.
        choosing: seconds of the choice, part of those of making it.
    """

    change: Intervention
    settings: str
    choosing: float


def choose(model: Any, choice: Rows, candidates: Iterable[tuple[str, Intervention]]) -> Fitted:
    """The candidate that leaves the least KL; no label and no other input is looked at.

    Args:
        model: unpatched.
        choice: rows that are read.
        candidates: settings in words, with what they do.

    Raises:
        ValueError: none leaves a finite divergence.
    """
    started = time.monotonic()
    left = list(candidates)
    if len(left) > FINALISTS and len(choice) > FEW_ROWS:
        left = _ranked(model, choice.first(FEW_ROWS), left)[:FINALISTS]
    settings, change = _ranked(model, choice, left)[0]
    return Fitted(change, settings, time.monotonic() - started)


def _ranked(model: Any, rows: Rows, candidates: Sequence[tuple[str, Intervention]]) -> list[tuple[str, Intervention]]:
    found = []
    for settings, candidate in candidates:
        with candidate.applied(model):
            left = rows.divergence(model)
        if math.isfinite(left):
            found.append((left, settings, candidate))
    if not found:
        raise ValueError("choose: candidates must leave a finite KL on the examples, got none that does")
    return [(settings, candidate) for _, settings, candidate in sorted(found, key=lambda one: one[0])]


def spread(blocks: int) -> list[int]:
    """Block indices to try, evenly spread over the depth."""
    tried = min(blocks, MAX_LAYERS)
    return sorted({round((index + 0.5) * blocks / tried - 0.5) for index in range(tried)})
