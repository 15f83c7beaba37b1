"""gathered_low_rank, as a batch of mixed patches calls it, against batched products on factors copied for every row.

python benchmarks/measure/bench_gathered_low_rank.py             every shape, 2 seconds each
python benchmarks/measure/bench_gathered_low_rank.py --quick     three of them, a few rounds

The sites of Gemma 3 270M at rank 64, with the residual stream added. The peer finds its factors copied already, what
takes B · r · (d_in + d_out) numbers a site; "copied anew" is what it takes when the rows change. "Patch by patch" is
peft's way with a batch of several adapters: index the rows of each, multiply, add to them.
"""

from __future__ import annotations

import argparse
from functools import partial

import harness  # puts tests/ on the path, for dense_attention
import torch
from dense_attention import normal
from torch import Tensor

import thought_kernels as tk

RANK = 64
SITES = {"attention": (1024, 1024), "down": (2048, 640)}  # Gemma 3 270M's widths: 4 heads of 256, and its MLP
BATCHES = ((1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (64, 64))  # rows, and patches among them
LENGTHS = (1, 64)  # a step of writing, and a prompt


def batched(x: Tensor, right: Tensor, left: Tensor, residual: Tensor) -> Tensor:
    return torch.baddbmm(residual, torch.bmm(x, right), left)


def patch_by_patch(x: Tensor, right: Tensor, left: Tensor, rows: list[list[int]], residual: Tensor) -> Tensor:
    output = residual.clone()
    for patch, own in enumerate(rows):
        output[own] += x[own] @ right[patch] @ left[patch]
    return output


def bench(site: str, batch: int, patches: int, length: int, seconds: float, rounds: tuple[int, int]) -> None:
    d_in, d_out = SITES[site]
    index = torch.arange(batch) % patches
    rows = [(index == patch).nonzero()[:, 0].tolist() for patch in range(patches)]
    x, residual = normal(batch, length, d_in, seed=0), normal(batch, length, d_out, seed=1)
    right = normal(patches, d_in, RANK, seed=2) / d_in**0.5
    left = normal(patches, RANK, d_out, seed=3) / RANK**0.5
    copies = right[index], left[index]

    def provider(name: str, run: partial[Tensor]) -> harness.Provider:
        return harness.Provider(name, run, lambda: {"y": run()})

    call = partial(tk.gathered_low_rank, x, right, left, index, residual=residual)
    anew = partial(lambda: batched(x, right[index], left[index], residual))
    providers = [
        provider("bmm, factors copied before", partial(batched, x, *copies, residual)),
        provider("bmm, copied anew", anew),
        provider("patch by patch", partial(patch_by_patch, x, right, left, rows, residual)),
    ]
    for backend, reason in tk.available_backends("gathered_low_rank", "cpu").items():
        if reason is None and backend != "triton":  # on a CPU that is the interpreter
            providers.append(provider(f"gathered_low_rank ({backend})", partial(call, backend=backend)))
    wide = tk.gathered_low_rank(
        x.double(), right.double(), left.double(), index, residual=residual.double(), backend="reference"
    )
    shape = f"{batch} x {length}, {patches} of {d_in} to {d_out}"
    case = harness.Case("gathered_low_rank", f"{site}, rank {RANK}", shape, "float32")
    harness.measure(case, providers, {"y": wide}, {"y": batched(x, *copies, residual)}, seconds=seconds, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, a few rounds")
    options = parser.parse_args()
    if options.quick:
        for batch, patches, length in ((8, 8, 1), (64, 8, 1), (8, 8, 64)):
            bench("attention", batch, patches, length, 0.1, (3, 5))
        return
    for site in SITES:
        for length in LENGTHS:
            for batch, patches in BATCHES:
                bench(site, batch, patches, length, 2.0, (5, 60))


if __name__ == "__main__":
    main()
