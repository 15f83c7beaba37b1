"""accumulate against two bare matrix products on inputs scaled beforehand, and against the code it replaces.

python benchmarks/measure/bench_accumulate.py                 every case of the CPU
python benchmarks/measure/bench_accumulate.py --device cuda   every case of the GPU
python benchmarks/measure/bench_accumulate.py --only memory   one group: products, naive, halves or memory
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Case, Provider, check, measure, record, row  # puts peers/ on the path
from rank_one_products import (
    Inputs,
    Outputs,
    bare_loop,
    bare_products,
    einsum,
    per_token,
    per_token_as_printed,
    upcast,
)
from shapes import ACCUMULATE, ACCUMULATE_GPU, GEMMA3

import thought_kernels as tk

OUTPUTS = "cross + gram + sums, weights, norm"
MEMORY_ROWS = 100_000
NAIVE_ROWS = 16384


def make_inputs(rows: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    torch.manual_seed(0)
    delta, activation = (torch.empty(rows, d, dtype=dtype, device=device).normal_() for _ in range(2))
    return Inputs(delta, activation, torch.rand(rows, device=device))


def make_outputs(d: int, device: str, dtype: torch.dtype = torch.float32) -> Outputs:
    names = {"cross": (d, d), "gram": (d, d), "delta_sum": (d,), "activation_sum": (d,)}
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in names.items()}


def ours(inputs: Inputs, out: Outputs, backend: str) -> None:
    tk.accumulate(
        out["cross"],
        inputs.delta,
        inputs.activation,
        weights=inputs.weights,
        normalization="norm",
        gram=out["gram"],
        delta_sum=out["delta_sum"],
        activation_sum=out["activation_sum"],
        backend=backend,
    )


def ours_alone(inputs: Inputs, out: Outputs) -> None:
    tk.accumulate(out["cross"], inputs.delta, inputs.activation, backend="cpp")


def provider(name: str, function: Callable[[Inputs, Outputs], None], inputs: Inputs) -> Provider:
    d, device = inputs.activation.shape[1], inputs.delta.device.type
    timed = make_outputs(d, device)

    def result() -> Outputs:
        out = make_outputs(d, device)
        function(inputs, out)
        return out

    return Provider(name, lambda: function(inputs, timed), result)


def two_products(inputs: Inputs) -> Provider:
    """The strongest peer, which computes cross and gram alone."""
    d, device = inputs.activation.shape[1], inputs.delta.device.type
    name, run = bare_products(inputs)
    timed = make_outputs(d, device)

    def result() -> Outputs:
        out = make_outputs(d, device)
        run(out)
        return {"cross": out["cross"], "gram": out["gram"]}

    return Provider(name, lambda: run(timed), result)


def truth_and_plain(inputs: Inputs) -> tuple[Outputs, Outputs]:
    d, device = inputs.activation.shape[1], inputs.delta.device.type
    truth, plain = make_outputs(d, device, torch.float64), make_outputs(d, device)
    upcast(inputs, truth)
    upcast(inputs, plain)
    if device == "cuda" and inputs.delta.dtype != torch.float32:
        plain |= two_products(inputs).result()  # tensor cores: the scaled operand is rounded to the inputs' dtype
    return truth, plain


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bench_products(device: str) -> None:
    """Every backend against the two bare products and the whole-batch code, all threads."""
    backends = [name for name, reason in tk.available_backends("accumulate", device).items() if reason is None]
    for rows, d in ACCUMULATE if device == "cpu" else ACCUMULATE_GPU:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(rows, d, dtype, device)
            providers = [two_products(inputs)]
            for backend in backends:
                providers.append(provider(f"accumulate ({backend})", lambda i, o, b=backend: ours(i, o, b), inputs))
            providers += [provider("x.float().T @ x.float()", upcast, inputs), provider("einsum", einsum, inputs)]
            case = Case("accumulate", OUTPUTS, f"{rows} x {d}", short(dtype))
            measure(case, providers, *truth_and_plain(inputs), device=device)


def bench_naive() -> None:
    """One thread: a token at a time, for equal work and for cross alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("270m", "1b"):
        inputs = make_inputs(NAIVE_ROWS, GEMMA3[name].hidden, torch.float32, "cpu")
        shape = f"{NAIVE_ROWS} x {GEMMA3[name].hidden}"
        everything = provider("accumulate (cpp)", lambda i, o: ours(i, o, "cpp"), inputs)
        equal = [
            everything,
            provider("equal work per token, weights in the vector", per_token, inputs),
            provider("equal work per token, H += w * outer(delta, a) / norm", per_token_as_printed, inputs),
        ]
        # Adding token after token in float32 rounds more than whole-batch products do: the loops set their own measure.
        truth, plain = truth_and_plain(inputs)[0], equal[-1].result()
        measure(Case("accumulate", OUTPUTS, shape, "float32"), equal, truth, plain, rounds=(3, 20))

        def cross_alone(function: Callable[[Inputs, Outputs], None], inputs: Inputs = inputs) -> Provider:
            label = "accumulate (cpp)" if function is ours_alone else "H += outer(delta, a) per token"
            every = provider(label, function, inputs)
            return every._replace(result=lambda: {"cross": every.result()["cross"]})

        alone = [cross_alone(ours_alone), cross_alone(bare_loop)]
        truth = {"cross": inputs.delta.double().T @ inputs.activation.double()}
        # The bare loop does a third of what this call does; checked above against its own truth.
        more = everything._replace(name="accumulate (cpp), with gram, sums, weights and norm", result=dict)
        measure(
            Case("accumulate", "cross alone", shape, "float32"),
            [*alone, more],
            truth,
            alone[-1].result(),
            rounds=(3, 20),
        )
    torch.set_num_threads(threads)


def bench_halves() -> None:
    """Half-precision inputs against the same numbers in float32: fewer bytes to read, more work to widen."""
    for name in ("270m", "1b"):
        halves = make_inputs(16384, GEMMA3[name].hidden, torch.bfloat16, "cpu")
        wide = Inputs(halves.delta.float(), halves.activation.float(), halves.weights)
        alike = Inputs(halves.delta.half(), halves.activation.half(), halves.weights)
        providers = [
            provider(f"accumulate (cpp), {short(inputs.delta.dtype)} inputs", lambda i, o: ours(i, o, "cpp"), inputs)
            for inputs in (wide, halves, alike)
        ]
        truth, plain = truth_and_plain(halves)
        check(Case("accumulate", OUTPUTS, "", ""), providers[:2], truth, plain)
        case = Case("accumulate", OUTPUTS, f"16384 x {GEMMA3[name].hidden}", "half")
        measure(case, providers, truth, plain)


def bench_memory() -> None:
    """The most that resident memory grows by during one call, each in a fresh process."""
    widths, dtypes = (GEMMA3[name].hidden for name in ("270m", "1b")), (torch.float32, torch.bfloat16)
    for d, dtype in itertools.product(widths, dtypes):
        for name in ("cpp", "reference", "upcast"):
            command = [sys.executable, __file__, "--grow", name, short(dtype), str(d)]
            grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            label = "x.float().T @ x.float()" if name == "upcast" else f"accumulate ({name})"
            case = Case("accumulate", OUTPUTS, f"{MEMORY_ROWS} x {d}", short(dtype))
            record([row(case, label, "extra memory", grown, "MiB", "cpu")], "cpu")


def grow(name: str, dtype: str, width: str) -> None:
    """Prints by how many MiB the peak of this process's resident memory rises in one call (Linux)."""
    d = int(width)
    inputs, out = make_inputs(MEMORY_ROWS, d, getattr(torch, dtype), "cpu"), make_outputs(d, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident("VmRSS")
    upcast(inputs, out) if name == "upcast" else ours(inputs, out, name)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory is measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["products", "naive", "halves", "memory"])
    parser.add_argument("--grow", nargs=3, metavar=("NAME", "DTYPE", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        grow(*options.grow)
        return
    groups = {"products": lambda: bench_products(options.device)}
    if options.device == "cpu":
        groups |= {"naive": bench_naive, "halves": bench_halves, "memory": bench_memory}
    for name, bench in groups.items():
        if options.only in (None, name):
            bench()


if __name__ == "__main__":
    main()
