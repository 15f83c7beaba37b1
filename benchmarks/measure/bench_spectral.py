"""Fractional dimensionality of many features against one Gram product, and against the pairwise formula in blocks.

python benchmarks/measure/bench_spectral.py          262,144 x 1152 against W @ W.T, 65,536 features against all pairs
python benchmarks/measure/bench_spectral.py --small  the same at an eighth of the features

The pairwise formula costs n / 2m times as much. It is timed for a sixteenth of the features, whose cost is a sixteenth
of the whole; the row "speed-up" is sixteen times the ratio.
"""

from __future__ import annotations

import argparse

import harness  # puts tests/ on the path
import torch
from shapes import GEMMA3
from torch import Tensor

from thought_kernels import spectral

BLOCK = 2048
SHARE = 16


def pairwise(W: Tensor, count: int) -> Tensor:
    """D of the first ``count`` features by eq. 3.1, a block of pairs at a time."""
    parts = []
    for start in range(0, count, BLOCK):
        block = W[:, start : min(start + BLOCK, count)]
        total = torch.zeros(block.shape[1], dtype=W.dtype)
        for other in range(0, W.shape[1], BLOCK):
            total += (block.T @ W[:, other : other + BLOCK]).square_().sum(1)
        parts.append(block.square().sum(0).square() / total)
    return torch.cat(parts)


def truth(W: Tensor, count: int) -> Tensor:
    """D of the first ``count`` features in float64 by F, one block of columns at a time."""
    F = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64)
    for start in range(0, W.shape[1], BLOCK):
        block = W[:, start : start + BLOCK].double()
        F += block @ block.T
    first = W[:, :count].double()
    return first.square().sum(0).square() / (first * (F @ first)).sum(0)


def bench(m: int, n: int, *, seconds: float) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))
    count = n // SHARE
    case = harness.Case("spectral", "fractional dimensionality", f"{m} x {n}", "float32")

    def ours() -> Tensor:
        return spectral.fractional_dimensionality(W)

    against_gram = [
        harness.Provider("one Gram product W @ W.T", lambda: W @ W.T, dict),
        harness.Provider("fractional_dimensionality", ours, lambda: {"D": ours()[:count]}),
    ]
    against_pairs = [
        harness.Provider("fractional_dimensionality", ours, lambda: {"D": ours()[:count]}),
        harness.Provider(
            "pairwise, a sixteenth of the features", lambda: pairwise(W, count), lambda: {"D": pairwise(W, count)}
        ),
    ]
    expected = {"D": truth(W, count)}
    plain = {"D": pairwise(W, min(count, BLOCK))}
    # One block of the pairwise result is enough to set the error that is allowed.
    plain["D"] = torch.cat([plain["D"], expected["D"][len(plain["D"]) :].float()])
    harness.measure(case, against_gram, expected, plain, seconds=seconds, rounds=(3, 20))
    if n > 65536:
        return
    rows = harness.measure(
        case._replace(case="fractional dimensionality, all pairs"),
        against_pairs,
        expected,
        plain,
        seconds=seconds,
        rounds=(3, 10),
    )
    speed_up = SHARE * float(rows[1]["ratio"])
    case = case._replace(case=f"over all pairs; n/2m = {n / (2 * m):.4g}")
    harness.record([harness.row(case, "fractional_dimensionality", "speed-up", speed_up, "x", "cpu")], "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="an eighth of the features")
    part = 8 if parser.parse_args().small else 1
    for m, n in ((512, 65536), (GEMMA3["1b"].hidden, 65536), (GEMMA3["1b"].hidden, 262144)):
        bench(m, n // part, seconds=20 / part)


if __name__ == "__main__":
    main()
