"""How exact the difference that a prefix makes is, for bfloat16 and float16 inputs, as the prefix's share shrinks.

python benchmarks/measure/bench_delta.py      no timing; the figures hold on a busy machine too, and take under a minute

On a CPU Triton's kernels are interpreted, which rounds as a GPU's tensor cores do. Every figure is a relative error in
the norm of all entries, against float64 on the same rounded inputs.
"""

from __future__ import annotations

import argparse
import os

import harness  # puts tests/ on the path
import torch
from dense_attention import deltas_from_outputs, deltas_from_rows, norm_error, of_mass
from torch import Tensor

SHARES = [(0.0, 1e-1), (0.0, 1e-2), (0.0, 1e-3), (0.0, 1e-4), (0.9, 1e-3)]  # of the header and of the instruction


def interpret_triton() -> None:
    """Lets Triton's kernels run on this CPU; before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()


def deltas(header: float, instruction: float, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The difference by name of how it is computed, and the true one."""
    import thought_kernels as tk

    arguments = of_mass(instruction, header, dtype)
    truth = deltas_from_outputs(arguments, torch.float64)
    moved = {
        name: argument.to(device) if torch.is_tensor(argument) else argument and tuple(p.to(device) for p in argument)
        for name, argument in arguments.items()
    }
    found = {}
    for backend, reason in tk.available_backends("paired_attention", device).items():
        if reason is None:
            name = "triton, interpreted" if backend == "triton" and device == "cpu" else backend
            found[f"paired_attention ({name})"] = tk.paired_attention(**moved, backend=backend)[1].cpu()
            found[f"shared_prefix_attention, float32 output ({name})"] = deltas_from_rows(moved, backend).cpu()
    narrow = str(dtype).removeprefix("torch.")
    found[f"paired_attention (reference), rounded to {narrow}"] = found["paired_attention (reference)"].to(dtype)
    found["difference of two float32 outputs"] = deltas_from_outputs(arguments, torch.float32)
    found[f"difference of two {narrow} outputs"] = deltas_from_outputs(arguments, dtype)
    return found, truth


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interpret_triton()
    rows = []
    for header, instruction in SHARES:
        for dtype in (torch.bfloat16, torch.float16):
            found, truth = deltas(header, instruction, dtype, device)
            text = f"header {header:g}, instruction {instruction:g} of the mass"
            case = harness.Case("paired_attention", text, "2x4/1 T64 P16 D64", str(dtype).removeprefix("torch."))
            for name, delta in found.items():
                error = 100 * norm_error(delta, truth)
                rows.append(harness.row(case, name, "relative error of delta", error, "%", device))
    harness.record(rows, device)


if __name__ == "__main__":
    main()
