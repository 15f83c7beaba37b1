"""Float32 products of linear modules on a CPU: torch's own choice against oneDNN, which models/linear.py takes.

python benchmarks/measure/bench_linear.py

oneDNN adds up each output in one chain, torch's BLAS in several, which errs half as much; so what is checked before
timing is the bound of one chain, and both errors are recorded.
"""

from __future__ import annotations

import argparse
import math

import harness
import torch
from shapes import GEMMA3
from torch import nn

from thought_kernels.models.linear import FastLinear

ROWS = (64, 256)
INTERMEDIATE = {"270m": 2048, "1b": 6912}


def bench(rows: int, d_in: int, d_out: int) -> None:
    module, x = nn.Linear(d_in, d_out, bias=False), torch.randn(rows, d_in)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def onednn() -> torch.Tensor:
        with FastLinear():
            return run()

    providers = [harness.Provider("torch's linear", run, dict), harness.Provider("oneDNN's linear", onednn, dict)]
    case = harness.Case("linear", "no bias", f"{rows} x {d_in} to {d_out}", "float32")
    truth = (x.double() @ module.weight.double().mT).detach()
    bound = math.sqrt(d_in) * torch.finfo(torch.float32).eps / 2  # a random walk of d_in roundings
    for provider in providers:
        error = float((provider.run() - truth).norm() / truth.norm())
        if not error <= bound:
            raise SystemExit(
                f"{case.shape}: {provider.name} errs by {error:.3g}, allowed {bound:.3g}; nothing is timed"
            )
        harness.record([harness.row(case, provider.name, "relative error, root mean square", error, "", "cpu")], "cpu")
    harness.measure(case, providers, {}, {}, seconds=2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, intermediate in INTERMEDIATE.items():
        for rows in ROWS:
            bench(rows, GEMMA3[name].hidden, intermediate)
            bench(rows, intermediate, GEMMA3[name].hidden)


if __name__ == "__main__":
    main()
