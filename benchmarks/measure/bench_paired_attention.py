"""paired_attention against torch's flash attention for the with-context output alone, and for both outputs.

python benchmarks/measure/bench_paired_attention.py                every case of the CPU
python benchmarks/measure/bench_paired_attention.py --only header  one group: full, window, lengths or header

Flash attention is handed concatenated keys and a mask, both made beforehand and untimed: its causal flag cannot express
a prefix, and it has no call for a window or for ragged lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness  # puts tests/ and peers/ on the path
import torch
from dense_attention import dense_attention, normal
from flash_attention import Inputs, flash_over_both
from shapes import ATTENTION, ATTENTION_HEAD_DIMS
from torch import Tensor

import thought_kernels as tk


def make_inputs(batch: int, length: int, prefix: int, head_dim: int, dtype: torch.dtype, header: int = 0) -> Inputs:
    """Gemma's grouping, 4 query heads to a key head; rows of all heads side by side, as projections leave them."""
    query = normal(batch, length, 4, head_dim, seed=0, dtype=dtype).transpose(1, 2)
    key, value = (normal(batch, length, 1, head_dim, seed=seed, dtype=dtype).transpose(1, 2) for seed in (1, 2))
    pair = lambda count, seed: tuple(normal(1, count, head_dim, seed=seed + part, dtype=dtype) for part in (0, 1))  # noqa: E731
    without = pair(header, 5) if header else None
    return {"query": query, "key": key, "value": value, "with_prefix": pair(prefix, 3), "without_prefix": without}


def dense(inputs: Inputs, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    own = (inputs["query"], inputs["key"], inputs["value"])
    together = dense_attention(*own, inputs["with_prefix"], dtype=dtype, **options)
    without = dense_attention(*own, inputs["without_prefix"], dtype=dtype, **options)
    return {"with": together, "without": without, "delta": together - without}


def bench(case: str, shape: str, inputs: Inputs, *, window: int | None = None, lengths: Tensor | None = None) -> None:
    options = {"window": window, "lengths": lengths}
    with_context, without_context = (
        flash_over_both(inputs, f"{name}_prefix", **options) for name in ("with", "without")
    )
    providers = [
        harness.Provider("flash, with context alone", with_context, lambda: {"with": with_context()}),
        harness.Provider(
            "flash, both",
            lambda: (with_context(), without_context()),
            lambda: {"with": with_context(), "without": without_context()},
        ),
    ]
    for backend, reason in tk.available_backends("paired_attention", "cpu").items():
        if reason is None and backend != "triton":  # on a CPU that is the interpreter
            run = lambda backend=backend: tk.paired_attention(**inputs, **options, backend=backend)  # noqa: E731
            result = lambda run=run: dict(zip(("without", "delta"), run(), strict=True))  # noqa: E731
            providers.append(harness.Provider(f"paired_attention ({backend})", run, result))
    dtype = inputs["query"].dtype
    plain = dense(inputs, torch.float32, **options)
    plain |= {name: part for name, part in dense(inputs, dtype, **options).items() if name != "delta"}
    name = str(dtype).removeprefix("torch.")
    harness.measure(
        harness.Case("paired_attention", case, shape, name),
        providers,
        dense(inputs, torch.float64, **options),
        plain,
        seconds=2,
    )


def batch_of(length: int) -> int:
    return 8 if length < 512 else 1


def bench_grid(window_of: Callable[[int, int], int | None], case: str) -> None:
    for head_dim in ATTENTION_HEAD_DIMS:
        for length, prefix in ATTENTION:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = make_inputs(batch_of(length), length, prefix, head_dim, dtype)
                shape = f"{batch_of(length)}x4/1 T{length} P{prefix} D{head_dim}"
                bench(case, shape, inputs, window=window_of(length, prefix))


def bench_lengths() -> None:
    for length, prefix in ATTENTION:
        inputs = make_inputs(8, length, prefix, 256, torch.float32)
        lengths = torch.linspace(length / 8, length, 8).long()
        bench("ragged lengths", f"8x4/1 T{length} P{prefix} D256", inputs, lengths=lengths)


def bench_header() -> None:
    for length, prefix in ATTENTION:
        inputs = make_inputs(batch_of(length), length, prefix, 256, torch.float32, header=8)
        bench("header of 8", f"{batch_of(length)}x4/1 T{length} P{prefix} D256", inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["full", "window", "lengths", "header"])
    options = parser.parse_args()
    groups = {
        "full": lambda: bench_grid(lambda length, prefix: None, "full"),
        # Three quarters of the tokens still see some of the prefix, the first of them most of it.
        "window": lambda: bench_grid(lambda length, prefix: 3 * length // 4 + 1, "window of 3T/4 + 1"),
        "lengths": bench_lengths,
        "header": bench_header,
    }
    for name, group in groups.items():
        if options.only in (None, name):
            group()


if __name__ == "__main__":
    main()
