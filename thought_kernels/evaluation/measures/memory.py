"""The largest memory that the process held while something ran."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryPeak:
    """Peak memory between entering and leaving, as a context manager.

    Linux resets the kernel's own high-water mark, so the peak is that of the span. Elsewhere it is the largest since
    the process started, which a later span cannot lower. Spans may lie within each other.

    Args:
        device: an accelerator to watch as well.

    Attributes:
        host_mib: resident memory of the process, MiB, set on leaving.
        device_mib: memory that torch had allocated on the device, MiB; None for a CPU.
    """

    _entered: ClassVar[list[MemoryPeak]] = []  # every new span resets the marks: those around it keep what they saw

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host_mib = float("nan")
        self.device_mib: float | None = None

    def __enter__(self) -> MemoryPeak:
        for around in self._entered:
            around._look()
        with contextlib.suppress(OSError):  # no Linux, or not permitted
            _CLEAR.write_text("5")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for span in self._entered:
            span._look()
        self._entered.remove(self)

    def _look(self) -> None:
        # max(nan, x) is nan, max(x, nan) is x
        self.host_mib = max(_high_water_mib(), self.host_mib)
        if self._device.type == "cuda":
            self.device_mib = max(torch.cuda.max_memory_allocated(self._device) / 2**20, self.device_mib or 0.0)


def _high_water_mib() -> float:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
