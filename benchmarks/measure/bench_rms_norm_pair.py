"""rms_norm_pair against two norms of torch and their difference, which is less exact, and against one norm; and with
the residual stream added inside against a sum of its own.

python benchmarks/measure/bench_rms_norm_pair.py
"""

from __future__ import annotations

import argparse

import harness  # puts tests/ on the path, for dense_attention
import torch
from dense_attention import normal
from shapes import GEMMA3
from torch import Tensor
from torch.nn.functional import rms_norm

import thought_kernels as tk

ROWS = 4096
BATCH = 256  # rows of eight short examples: what a batch of layerwise adds, and finds in the cache


def bench(d: int, dtype: torch.dtype) -> None:
    x, delta, weight = normal(ROWS, d, seed=0, dtype=dtype), normal(ROWS, d, seed=1), normal(d, seed=2, dtype=dtype)

    def two_norms(wide: torch.dtype) -> dict[str, Tensor]:
        first = rms_norm(x.to(wide), (d,), weight.to(wide), 1e-6)
        shifted = rms_norm(x.to(wide) + delta.to(wide), (d,), weight.to(wide), 1e-6)
        return {"norm": first.to(dtype), "change": shifted - first}

    truth = two_norms(torch.float64)
    truth["norm"] = rms_norm(x.double(), (d,), weight.double(), 1e-6)
    providers = [
        harness.Provider(
            "two norms and their difference", lambda: two_norms(torch.float32), lambda: two_norms(torch.float32)
        ),
        harness.Provider("one norm", lambda: rms_norm(x, (d,), weight, 1e-6), dict),
    ]
    for backend, reason in tk.available_backends("rms_norm_pair", "cpu").items():
        if reason is None and backend != "triton":  # on a CPU that is the interpreter
            run = lambda backend=backend: tk.rms_norm_pair(x, delta, weight, eps=1e-6, backend=backend)  # noqa: E731
            result = lambda run=run: dict(zip(("norm", "change"), run(), strict=True))  # noqa: E731
            providers.append(harness.Provider(f"rms_norm_pair ({backend})", run, result))
    case = harness.Case("rms_norm_pair", "float32 delta", f"{ROWS} x {d}", str(dtype).removeprefix("torch."))
    harness.measure(case, providers, truth, two_norms(torch.float32), seconds=2)


def bench_residual(rows: int, d: int, dtype: torch.dtype) -> None:
    x, residual = (normal(rows, d, seed=seed, dtype=dtype) for seed in (0, 3))
    delta, weight = normal(rows, d, seed=1), normal(d, seed=2, dtype=dtype)

    def named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return dict(zip(("sum", "change"), outputs, strict=True))

    def fused(*inputs: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return tk.rms_norm_pair(*inputs[:3], eps=1e-6, residual=inputs[3], backend=backend)

    def apart() -> tuple[Tensor, Tensor]:
        normed, change = tk.rms_norm_pair(x, delta, weight, eps=1e-6)
        return residual + normed, change

    inputs = x, delta, weight, residual
    truth = named(fused(*(tensor.double() for tensor in inputs), backend="reference"))
    providers = [
        harness.Provider("rms_norm_pair, then a sum", apart, lambda: named(apart())),
        harness.Provider("rms_norm_pair with the residual", lambda: fused(*inputs), lambda: named(fused(*inputs))),
    ]
    case = harness.Case("rms_norm_pair", "residual, float32 delta", f"{rows} x {d}", str(dtype).removeprefix("torch."))
    harness.measure(case, providers, truth, named(fused(*inputs, backend="reference")), seconds=2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name in ("270m", "1b"):
        for dtype in (torch.float32, torch.bfloat16):
            bench(GEMMA3[name].hidden, dtype)
            for rows in (BATCH, ROWS):
                bench_residual(rows, GEMMA3[name].hidden, dtype)


if __name__ == "__main__":
    main()
