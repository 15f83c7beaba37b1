"""What it costs to make what the report compares: seconds and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.memory import MemoryPeak

# What a Making is called in a section's figures, by its attributes.
QUANTITIES = {
    "seconds": "seconds to make", "host_mib": "peak memory while made", "device_mib": "peak device memory while made"
}  # fmt: skip


class Making:
    """Seconds and peak memory of what is made within, as a context manager; set on leaving.

    Args:
        device: the model's.

    Attributes:
        seconds: wall-clock time.
        host_mib, device_mib: as MemoryPeak's.
    """

    def __init__(self, device: torch.device) -> None:
        self._peak = MemoryPeak(device)
        self.seconds, self.host_mib = float("nan"), float("nan")
        self.device_mib: float | None = None

    def __enter__(self) -> Making:
        self._started = time.monotonic()
        self._peak.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._peak.__exit__(None, None, None)
        self.seconds = time.monotonic() - self._started
        self.host_mib, self.device_mib = self._peak.host_mib, self._peak.device_mib

    def report(self, section: Section, subject: str, *, x: float | None = None) -> None:
        """Appends what it took to a section."""
        for name, quantity in QUANTITIES.items():
            value = getattr(self, name)
            if value is not None:
                section.add(subject, quantity, value, x=x)

    @classmethod
    def read(cls, section: Section, subject: str, device: torch.device) -> Making | None:
        """What `report` appended; None where it did not."""
        found = cls(device)
        for name, quantity in QUANTITIES.items():
            figure = section.get(subject, quantity)
            if figure is not None:
                setattr(found, name, figure.value)
        return None if found.seconds != found.seconds else found


@contextlib.contextmanager
def cost(section: Section, subject: str, device: torch.device, *, x: float | None = None) -> Iterator[None]:
    """Appends the seconds and the peak memory of what is made within to a section, unless it raises."""
    with Making(device) as making:
        yield
    making.report(section, subject, x=x)
