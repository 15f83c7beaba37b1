"""Products of linear modules on a CPU: torch's own choice against that of models/linear.py.

python benchmarks/measure/bench_linear.py

oneDNN adds up each output in one chain, torch's BLAS in several, which errs half as much; so what is checked before
timing is the bound of one chain, and both errors are recorded. Then a language-model head, which takes no gradients, on
the last token of each of some rows, cut from longer ones; in bfloat16 torch takes seconds for it.
"""

from __future__ import annotations

import argparse
import math

import harness
import torch
from harness import Case
from shapes import GEMMA3
from torch import nn

from thought_kernels.models.linear import FastLinear

ROWS = (64, 256)
INTERMEDIATE = {"270m": 2048, "1b": 6912}
VOCABULARY, ENDS, LENGTH = 262_144, 8, 4


def bench(case: Case, module: nn.Linear, x: torch.Tensor) -> None:
    """Times a module on x [..., d_in] by torch and within FastLinear, after a check of both."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def fast() -> torch.Tensor:
        with FastLinear():
            return run()

    names = ("torch's linear", "oneDNN's linear" if x.dim() == 2 else "rows together")
    providers = [harness.Provider(name, call, dict) for name, call in zip(names, (run, fast), strict=True)]
    some = slice(4096)  # of the outputs: all of a head's would not fit in float64
    truth = x.double() @ module.weight[some].detach().double().mT
    # A random walk of d_in roundings, and the result's.
    bound = math.sqrt(x.shape[-1]) * torch.finfo(torch.float32).eps / 2
    bound += torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0
    for provider in providers:
        error = float((provider.run()[..., some] - truth).norm() / truth.norm())
        if not error <= bound:
            raise SystemExit(
                f"{case.shape}: {provider.name} errs by {error:.3g}, allowed {bound:.3g}; nothing is timed"
            )
        harness.record([harness.row(case, provider.name, "relative error, root mean square", error, "", "cpu")], "cpu")
    harness.measure(case, providers, {}, {}, seconds=2)


def ends(width: int, dtype: torch.dtype) -> torch.Tensor:
    """The last tokens of some rows, [ENDS, 1, width], as `logits_to_keep` cuts them out."""
    return torch.randn(ENDS, LENGTH, width, dtype=dtype)[:, -1:]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, intermediate in INTERMEDIATE.items():
        for rows in ROWS:
            for d_in, d_out in ((GEMMA3[name].hidden, intermediate), (intermediate, GEMMA3[name].hidden)):
                case = Case("linear", "no bias", f"{rows} x {d_in} to {d_out}", "float32")
                bench(case, nn.Linear(d_in, d_out, bias=False), torch.randn(rows, d_in))
    for dtype in (torch.float32, torch.bfloat16):
        d = GEMMA3["270m"].hidden
        head = nn.Linear(d, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
        shape = f"{ENDS} last of {LENGTH} x {d} to {VOCABULARY}"
        bench(Case("linear", "head", shape, str(dtype).removeprefix("torch.")), head, ends(d, dtype))


if __name__ == "__main__":
    main()
