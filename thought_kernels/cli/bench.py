"""`thought-kernels bench`: the kernels on this machine against torch, each checked before it is timed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table
from torch import Tensor

import thought_kernels as tk
from thought_kernels.cli import options
from thought_kernels.models.load import usable_device

Results = tuple[Tensor, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Allowed beside twice plain PyTorch's own error in the same dtype, relative to the largest value. Differences carry
# the rounding of scores of size 10 or so in an exponent; tensor cores read softmax weights in the inputs' dtype.
_OF_RESULTS, _OF_INPUTS = 100, 0.5
_ROUNDS = (5, 200)


class Case(NamedTuple):
    """One operator at one shape.

    Attributes:
        op, shape: as shown.
        peer: what one would write in torch; not checked, since its differences may be worse than the kernel's.
        run: the operator by a backend.
        truth: what it must return, float64.
    """

    op: str
    shape: str
    peer: Callable[[], Results]
    run: Callable[[str], Results]
    truth: Results


def bench(
    seconds: Annotated[float, typer.Option(min=0.01, help="Per operator.")] = 2.0,
    rows: Annotated[int, typer.Option(min=1, help="Tokens at a time.")] = 2048,
    hidden: Annotated[int, typer.Option(min=8, help="Hidden size; Gemma 3 270M's unless given.")] = 640,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: options.Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default torch's own).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time accumulate, paired_attention and rms_norm_pair on this machine against plain torch.

    Every backend is first compared with float64; one that errs too much is not timed, and the command exits with 1.
    Backends take turns, so that whatever else the machine does slows them alike.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options.check_file("--json", json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    usable_device("bench", device)
    found = [
        row for case in _cases(rows, hidden, DTYPES[dtype], device) for row in _measured(case, dtype, device, seconds)
    ]
    options.out.print(_table(found, device, dtype))
    for line in _absences(found):
        options.out.print(line, style="dim", markup=False)
    if json_file is not None:
        from thought_kernels.evaluation.records.files import write_json

        write_json(found, json_file)
        options.out.print(f"figures in {json_file}", markup=False, soft_wrap=True)
    if any(row["wrong"] for row in found):
        options.complain("bench: every backend must agree with float64, got one that does not")
        raise typer.Exit(1)


_Normal = Callable[..., Tensor]  # a shape to standard normal numbers on the device, in the dtype


def _cases(rows: int, hidden: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    yield _accumulate(normal, rows, hidden, sums)
    yield _paired_attention(normal, max(1, rows // 64))
    yield _rms_norm_pair(normal, rows, hidden, sums)


def _accumulate(normal: _Normal, rows: int, hidden: int, sums: torch.dtype) -> Case:
    delta, activation = normal(rows, hidden), normal(rows, hidden)

    def accumulated(backend: str, d: Tensor = delta, a: Tensor = activation, total: torch.dtype = sums) -> Results:
        cross, gram = (torch.zeros(hidden, hidden, dtype=total, device=delta.device) for _ in range(2))
        tk.accumulate(cross, d, a, gram=gram, backend=backend)
        return cross, gram

    def by_products() -> Results:
        wide_delta, wide = delta.to(sums), activation.to(sums)
        return wide_delta.T @ wide, wide.T @ wide

    truth = accumulated("reference", delta.double(), activation.double(), torch.float64)
    return Case("accumulate", f"{rows} x {hidden}", by_products, accumulated, truth)


def _paired_attention(normal: _Normal, batch: int) -> Case:
    heads, length, size, prefix = 4, 64, 128, 32
    q, k, v = normal(batch, heads, length, size), normal(batch, 1, length, size), normal(batch, 1, length, size)
    shared = (normal(1, prefix, size), normal(1, prefix, size))

    def paired(backend: str, wide: bool = False) -> Results:
        query, key, value, *before = (t.double() if wide else t for t in (q, k, v, *shared))
        return tk.paired_attention(query, key, value, (before[0], before[1]), backend=backend)

    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    mask = torch.cat([torch.ones(length, prefix, dtype=torch.bool, device=q.device), causal], dim=1)

    def twice() -> Results:
        attend = torch.nn.functional.scaled_dot_product_attention
        key, value = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
        before = [part[None].expand(batch, heads, -1, -1) for part in shared]
        keys, values = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        plain = attend(q, key, value, is_causal=True)
        return plain, (attend(q, keys, values, attn_mask=mask) - plain).float()

    shape = f"{batch} x {heads} x {length} x {size}, prefix {prefix}"
    return Case("paired_attention", shape, twice, paired, paired("reference", wide=True))


def _rms_norm_pair(normal: _Normal, rows: int, hidden: int, sums: torch.dtype) -> Case:
    x, change, weight = normal(rows, hidden), 0.1 * normal(rows, hidden).to(sums), normal(hidden)

    def normed(backend: str, wide: bool = False) -> Results:
        tensors = [t.double() if wide else t for t in (x, change, weight)]
        return tk.rms_norm_pair(*tensors, eps=1e-6, weight_offset=1.0, backend=backend)

    def norm_twice() -> Results:
        gain = 1.0 + weight.to(sums)
        plain, other = (
            torch.nn.functional.rms_norm(z, (hidden,), gain, 1e-6) for z in (x.to(sums), x.to(sums) + change)
        )
        return plain.to(x.dtype), other - plain

    return Case("rms_norm_pair", f"{rows} x {hidden}", norm_twice, normed, normed("reference", wide=True))


def _measured(case: Case, dtype: str, device: str, seconds: float) -> list[dict[str, Any]]:
    common = {
        "op": case.op, "shape": case.shape, "dtype": dtype, "device": _device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "package": tk.__version__,
    }  # fmt: skip
    plain = case.run("reference")
    runs: dict[str, Callable[[], Results]] = {"torch": case.peer}
    first = {**common, "backend": "torch", "error": None, "wrong": False, "missing": None}
    rows: dict[str, dict[str, Any]] = {"torch": first}
    for backend, missing in tk.available_backends(case.op, device).items():
        if backend == "triton" and missing is None and not device.startswith("cuda"):
            missing = "Triton's interpreter is no kernel to be timed"
        row: dict[str, Any] = {**common, "backend": backend, "error": None, "wrong": False, "missing": missing}
        rows[backend] = row
        if missing is not None:
            continue
        try:
            results = case.run(backend)
        except ValueError as error:  # available, but not for this call
            row["missing"] = str(error)
            continue
        row["error"], row["wrong"] = _error(results, plain, case.truth, DTYPES[dtype])
        if not row["wrong"]:
            runs[backend] = partial(case.run, backend)
    times: dict[str, list[float]] = {name: [] for name in runs}
    warm = sum(_time(run, device) for _ in range(2) for run in runs.values()) / 2
    for _ in range(int(min(max(seconds / max(warm, 1e-9), _ROUNDS[0]), _ROUNDS[1]))):
        for name, run in runs.items():
            times[name].append(_time(run, device))
    for name, taken in times.items():
        rows[name]["ms"] = statistics.median(taken) * 1e3
        rows[name]["speedup"] = statistics.median(times["torch"]) / statistics.median(taken)
    return list(rows.values())


def _error(results: Results, plain: Results, truth: Results, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest error relative to the largest true value, and whether any output errs too much."""
    coarse = _OF_INPUTS * torch.finfo(dtype).eps
    worst, wrong = 0.0, False
    for result, usual, true in zip(results, plain, truth, strict=True):
        size = float(true.abs().max())
        error, usual_error = (float((found.double() - true).abs().max()) for found in (result, usual))
        floor = max(_OF_RESULTS * torch.finfo(result.dtype).eps, coarse)
        wrong |= not error <= 2 * usual_error + floor * size  # also for NaN
        worst = max(worst, error / size)
    return worst, wrong


def _time(run: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )


def _table(rows: list[dict[str, Any]], device: str, dtype: str) -> Table:
    title = f"{_device_name(device)}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("operator", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "x torch", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        first = row["backend"] == "torch"
        if not first and row["missing"] is not None:
            continue
        timed = ("-", "-") if row["wrong"] else (f"{row['ms']:.3g}", f"{row['speedup']:.2f}")
        note = "errs too much, not timed" if row["wrong"] else row["shape"] if first else ""
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        table.add_row(row["op"] if first else "", row["backend"], *timed, error, note)
    return table


def _absences(rows: list[dict[str, Any]]) -> list[str]:
    """Each backend that was not run, and why, with the operators it is about."""
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("missing") is not None:
            why.setdefault((row["backend"], row["missing"]), []).append(row["op"])
    return [f"no {backend} for {', '.join(ops)}: {reason}" for (backend, reason), ops in why.items()]
