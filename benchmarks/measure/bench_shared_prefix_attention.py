"""shared_prefix_attention, both streams of a batch in one launch, against two calls of torch's flash attention.

python benchmarks/measure/bench_shared_prefix_attention.py

Flash attention is handed concatenated keys and a mask, both made beforehand and untimed.
"""

from __future__ import annotations

import argparse

import harness  # puts tests/ and peers/ on the path
import torch
from bench_paired_attention import batch_of, make_inputs
from dense_attention import dense_attention
from flash_attention import Inputs, flash_over_both
from shapes import ATTENTION
from torch import Tensor

import thought_kernels as tk


def bench(length: int, prefix: int, dtype: torch.dtype) -> None:
    batch = batch_of(length)
    streams = make_inputs(2 * batch, length, prefix, 256, dtype, header=8)
    prefixes = [streams["with_prefix"], streams["without_prefix"]]
    index = torch.arange(2).repeat_interleave(batch)
    halves: list[Inputs] = [
        streams | {name: streams[name][rows] for name in ("query", "key", "value")}
        for rows in (slice(batch), slice(batch, None))
    ]
    calls = [
        flash_over_both(half, f"{name}_prefix", None, None)
        for half, name in zip(halves, ("with", "without"), strict=True)
    ]
    own = (streams["query"], streams["key"], streams["value"])

    def dense(dtype: torch.dtype) -> dict[str, Tensor]:
        outputs = [
            dense_attention(half["query"], half["key"], half["value"], chosen, dtype=dtype)
            for half, chosen in zip(halves, prefixes, strict=True)
        ]
        return {"output": torch.cat(outputs)}

    providers = [
        harness.Provider(
            "flash, twice",
            lambda: [call() for call in calls],
            lambda: {"output": torch.cat([call() for call in calls])},
        )
    ]
    for backend, reason in tk.available_backends("shared_prefix_attention", "cpu").items():
        if reason is None and backend != "triton":  # on a CPU that is the interpreter
            run = lambda backend=backend: tk.shared_prefix_attention(*own, prefixes, index, backend=backend)  # noqa: E731
            providers.append(
                harness.Provider(f"shared_prefix_attention ({backend})", run, lambda run=run: {"output": run()})
            )
    shape, name = f"{2 * batch}x4/1 T{length} P{prefix} D256", str(dtype).removeprefix("torch.")
    case = harness.Case("shared_prefix_attention", "two streams, header of 8", shape, name)
    harness.measure(case, providers, dense(torch.float64), dense(dtype), seconds=2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for length, prefix in ATTENTION:
        for dtype in (torch.float32, torch.bfloat16):
            bench(length, prefix, dtype)


if __name__ == "__main__":
    main()
