"""What it costs to make what the report compares: seconds and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.memory import MemoryPeak


@contextlib.contextmanager
def cost(section: Section, subject: str, device: torch.device, *, x: float | None = None) -> Iterator[None]:
    """Appends the seconds and the peak memory of what is made within to a section, unless it raises."""
    started = time.monotonic()
    with MemoryPeak(device) as peak:
        yield
    section.add(subject, "seconds to make", time.monotonic() - started, x=x)
    section.add(subject, "peak memory while made", peak.host_mib, x=x)
    if peak.device_mib is not None:
        section.add(subject, "peak device memory while made", peak.device_mib, x=x)
