"""Times providers of one result against each other, and never one whose result is wrong.

Every provider is first held to the rule of the tests (at most twice plain PyTorch's error against float64); then all
run in turn, round after round, in one process, so that a busy machine slows them alike. The ratio is the median over
rounds of a provider's time to its peer's in the same round. Rows go to ``results/<device>.csv``; a row measured
again replaces the older one.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from tolerances import allowed_error, largest

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEY = ("op", "measure", "case", "provider", "shape", "dtype", "threads")
COLUMNS = (*KEY, "value", "p20", "p80", "unit", "peer", "ratio", "device", "torch", "triton", "package", "date", "load")


class Case(NamedTuple):
    """What is measured: the first columns of a row."""

    op: str
    case: str  # such as "cross + gram + sums, weights, norm"
    shape: str  # such as "16384 x 640"
    dtype: str


class Provider(NamedTuple):
    """One way to compute the result.

    Attributes:
        name: as shown.
        run: computes it once; what is timed.
        result: given nothing, runs once from fresh outputs and returns them by name, for the check.
        reset: called before every timed run, untimed.
    """

    name: str
    run: Callable[[], object]
    result: Callable[[], dict[str, Tensor]]
    reset: Callable[[], object] = lambda: None


def device_name(device: str) -> str:
    """The processor's or GPU's marketing name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores"


def check(case: Case, providers: list[Provider], truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Stops the benchmark unless every provider's outputs are right; a provider may leave some outputs out."""
    for provider in providers:
        for name, actual in provider.result().items():
            error = largest(actual.to(truth[name].device).double() - truth[name])
            allowed = allowed_error(truth[name], plain[name], plain[name].dtype)
            if not error <= allowed:  # also for NaN
                raise SystemExit(
                    f"{case.op} {case.shape} {case.dtype}: {provider.name} errs by {error:.3g} in {name}, "
                    f"allowed {allowed:.3g}; nothing is timed"
                )


def time_once(provider: Provider, device: str, flush: Tensor | None) -> float:
    """Milliseconds of one run; on a GPU by events, with the L2 cache overwritten before."""
    provider.reset()
    if flush is None:
        start = time.perf_counter()
        provider.run()
        return (time.perf_counter() - start) * 1e3
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    provider.run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def measure(
    case: Case,
    providers: list[Provider],
    truth: dict[str, Tensor],
    plain: dict[str, Tensor],
    *,
    device: str = "cpu",
    seconds: float = 8.0,
    rounds: tuple[int, int] = (5, 60),
) -> list[dict]:
    """Checks, times and prints all providers; the first is the peer that ratios refer to.

    Args:
        case: names the rows.
        providers: at least one.
        truth: float64 outputs by name.
        plain: the same by plain PyTorch in the outputs' dtype, which sets the allowed error.
        device: "cpu" or "cuda".
        seconds: about how long all rounds together may take, within the numbers of ``rounds``.
        rounds: fewest and most.

    Returns:
        The rows, as written to the results file.
    """
    check(case, providers, truth, plain)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.startswith("cuda") else None
    for _ in range(2):
        warm = sum(time_once(provider, device, flush) for provider in providers)
    count = int(min(max(seconds * 1e3 / warm, rounds[0]), rounds[1]))
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    for index in range(count):
        turn = index % len(providers)  # nobody always follows the same neighbour
        for provider in providers[turn:] + providers[:turn]:
            times[provider.name].append(time_once(provider, device, flush))
    peer = providers[0].name
    rows = []
    for name, values in times.items():
        low, middle, high = (statistics.quantiles(values, n=10, method="inclusive")[index] for index in (1, 4, 7))
        ratio = statistics.median(value / other for value, other in zip(values, times[peer], strict=True))
        rows.append(row(case, name, "time", middle, "ms", device, low=low, high=high, peer=peer, ratio=ratio))
    record(rows, device)
    return rows


def row(
    case: Case,
    provider: str,
    kind: str,
    value: float,
    unit: str,
    device: str,
    *,
    low: float | None = None,
    high: float | None = None,
    peer: str = "",
    ratio: float | None = None,
) -> dict:
    """One line of the results file."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    figures = {"value": value, "p20": low, "p80": high, "ratio": ratio}
    return {
        **case._asdict(),
        "measure": kind,
        "provider": provider,
        "threads": torch.get_num_threads(),
        **{name: "" if figure is None else f"{figure:.4g}" for name, figure in figures.items()},
        "unit": unit,
        "peer": peer,
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "package": version("thought_kernels"),
        "date": datetime.date.today().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: above the number of cores, trust ratios only
    }


def record(rows: list[dict], device: str) -> None:
    """Prints rows and writes them to the device's file in place of older ones of the same key."""
    for line in rows:
        spread = f" ({line['p20']} to {line['p80']})" if line["p20"] else ""
        ratio = f"  {line['ratio']} x {line['peer']}" if line["ratio"] and line["provider"] != line["peer"] else ""
        print(
            f"{line['op']:16} {line['shape']:14} {line['dtype']:9} {line['threads']:2} thr  {line['provider']:42}"
            f" {line['value']:>8} {line['unit']}{spread}{ratio}",
            flush=True,
        )
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".csv")
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(str(line[name]) for name in KEY) for line in rows}
    kept = [line for line in kept if tuple(line[name] for name in KEY) not in new]
    lines = sorted([*kept, *rows], key=lambda line: tuple(str(line[name]) for name in KEY))
    RESULTS.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
