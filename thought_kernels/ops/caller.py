"""Warnings that name the line that called the package, so that each such line is told once."""

from __future__ import annotations

import sys
import warnings

# Whose decorators and forwards stand between its own frames.
_INSIDE = {"thought_kernels", "torch", "transformers", "contextlib", "functools"}


def warn(sentence: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither the package's nor of the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, category, stacklevel=level)
