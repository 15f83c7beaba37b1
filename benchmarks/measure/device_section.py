"""What the timed sections of a GPU round share: the time left, and providers that may fail without ending the rest.

A section asks a Section for the time, for rows and for where they go, so that predict.py can have the same rows
predicted by giving it another one.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import harness  # puts tests/ on the path
import torch
from harness import Case, Provider
from torch import Tensor

import thought_kernels as tk


class Section:
    """One section's time, sizes and refusals.

    Attributes:
        device: "cuda" or "cpu".
        tiny: whether sizes are cut so that a CPU runs through all the code in seconds.
        wrong: providers that failed or were wrong so far.
        warm, rounds: how often whole runs are made before they are measured, and measured.
    """

    def __init__(self, device: str, tiny: bool, seconds: float) -> None:
        self.device, self.tiny, self.wrong = device, tiny, 0
        self.warm, self.rounds = 1, 1 if tiny else 4
        self.end = time.monotonic() + seconds

    def cases(self, sizes: list, small: list) -> Iterator[Any]:
        """The sizes that time is left for, the most telling first."""
        for size in small if self.tiny else sizes:
            if time.monotonic() > self.end:
                print(f"no time left for {size} and what follows it", flush=True)
                return
            yield size

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def record(self, rows: list[dict]) -> None:
        """Prints rows and keeps them."""
        harness.record(rows, self.device)

    def passes(self, what: str, check: Callable[[], Any]) -> bool:
        """Whether a check does not raise."""
        return self.attempt(what, lambda: (check(), True)) is not None

    def backends(self, operator: str) -> list[str]:
        """All but the reference, and Triton's interpreter."""
        found = tk.available_backends(operator, self.device)
        skipped = ("reference", *(["triton"] if self.device == "cpu" else []))
        return [name for name, reason in found.items() if reason is None and name not in skipped]

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """call(), or None if it raises, which is reported and counted."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # harness.check exits
            self.wrong += 1
            print(f"{what}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            return None

    def measure(
        self, case: Case, candidates: list[Provider], truth: dict[str, Tensor], plain: dict[str, Tensor]
    ) -> list[dict]:
        """Rows of those candidates that are right; their time on a GPU is that of a CUDA graph where one holds them."""
        right = []
        for candidate in candidates:
            check = lambda candidate=candidate: harness.check(case, [candidate], truth, plain) or True  # noqa: E731
            if self.attempt(f"{case.op} {case.shape} {case.dtype}, {candidate.name}", check):
                right.append(self.captured(candidate))
        if not right:
            return []
        seconds, rounds = (0.02, (2, 2)) if self.tiny else (0.7, (8, 40))
        return harness.measure(case, right, {}, {}, device=self.device, seconds=seconds, rounds=rounds)

    def captured(self, provider: Provider) -> Provider:
        """The provider as a CUDA graph, which leaves its launches out of account; eager where it cannot be captured."""
        if self.device == "cpu":
            return provider._replace(result=dict)
        try:
            for _ in range(3):
                provider.run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                provider.run()
        except RuntimeError as error:
            print(f"{provider.name}: not captured, so timed with its launches: {error}", flush=True)
            torch.cuda.synchronize()
            return provider._replace(name=f"{provider.name}, eager", result=dict)
        return provider._replace(run=graph.replay, result=dict)
