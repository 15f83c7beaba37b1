"""The attention, norm and low-rank kernels compile for sm_80, sm_90 and sm_100 without spilling, as test_aot.py's do.

``python tests/test_aot_attention.py 90`` prints one line of json per kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from test_aot import SHARED_MEMORY, Case, compile_case

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def attention_case(
    arch: int, dtype: str, head_dim: int, *, header: bool = True, windowed: bool = False, pointers: bool = False,
    rows: int = 512, shared: bool = False, wide: bool = False,
    softcap: bool = False,
) -> Case:  # fmt: skip
    """paired_attention, or shared_prefix_attention, with the tiles that a launch would choose on this chip."""
    import torch

    from thought_kernels.triton import attention_plan
    from thought_kernels.triton import paired_attention as paired
    from thought_kernels.triton import shared_prefix_attention as single

    plan = attention_plan.choose_tiles(
        getattr(torch, dtype), head_dim, rows, groups=1024, processors=132, capability=(arch // 10, 0),
        descriptors=arch >= 90 and not pointers, shared_memory=SHARED_MEMORY[arch],
    )  # fmt: skip
    pointer = f"*{TYPES[dtype]}"

    def source(rows: int) -> str:
        return f"tensordesc<{TYPES[dtype]}[1,1,{rows},{plan.block_d}]>" if plan.descriptors else pointer

    keys, without_keys = source(plan.block_n), source(plan.header_n) if header else None
    arguments = {
        "query": pointer,
        **dict.fromkeys(("key", "value", "with_key", "with_value", "prefix_key", "prefix_value"), keys),
        **dict.fromkeys(("without_key", "without_value"), without_keys),
        **dict.fromkeys(("header_key", "header_value"), without_keys if plan.parts > 1 else None),
        "prefix_index": "*i64",
        "bounds": "*i32",
        "lengths": "*i64",
        "without": pointer,
        "output": "*fp32" if wide else pointer,
        "delta": "*fp32",
        "scratch": "*fp32" if header else None,
        "window": "i32" if windowed else None,
        "scale": "fp32",
        "softcap": "fp32" if softcap else None,
        "GROUP": 4,
        "PARTS": 1 if shared and not wide else plan.parts,
        "PRECISION": plan.precision,
        "HEAD_DIM": head_dim,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_D": plan.block_d,
        "HEADER_N": plan.header_n,
        "DESCRIPTORS": plan.descriptors,
    }
    kernel = single.shared_prefix_attention_kernel if shared else paired.paired_attention_kernel
    words = ["shared" if shared else "paired", dtype, str(head_dim)]
    words += [
        word for word, on in (("header", header), ("window", windowed), ("pointers", pointers), ("wide", wide)) if on
    ]
    return Case(" ".join([*words, f"{rows} rows"]), kernel, arguments, plan.options, dtype != "float32")


def norm_case(dtype: str, d: int, *, residual: bool = False) -> Case:
    from thought_kernels.triton import rms_norm_pair as module

    pointer = f"*{TYPES[dtype]}"
    rows, columns, warps = module.tiles(d)
    arguments = {
        **dict.fromkeys(("x", "weight", "norm"), pointer),
        **dict.fromkeys(("delta", "difference"), "*fp32"),
        "residual": pointer if residual else None,
        **dict.fromkeys(("x_column", "delta_column", "residual_column", "weight_stride"), 1),
        **dict.fromkeys(("eps", "weight_offset"), "fp32"),
        "ROWS": rows,
        "COLUMNS": columns,
    }
    return Case(
        f"norm {dtype} {d}{' residual' * residual}", module.rms_norm_pair_kernel, arguments, {"num_warps": warps}, False
    )


def gathered_case(kind: str, dtype: str, block_t: int) -> Case:
    """Rows that shrink to the rank, or expand from it, in float32 throughout."""
    from thought_kernels.triton import gathered_low_rank as module

    tensors = {"hidden": "*fp32", "right": "*fp32", "left": "*fp32", "vector": "*fp32", "index": "*i64"}
    arguments = {
        **tensors,
        **dict.fromkeys(("x", "residual", "output"), f"*{TYPES[dtype]}"),
        **dict.fromkeys(("x_column", "right_column", "left_column", "vector_column", "residual_column"), 1),
        "BLOCK_T": block_t,
        "BLOCK_R": module.BLOCK_R,
        "BLOCK_D": module.BLOCK_D,
        "BLOCK_K": module.BLOCK_K,
    }
    kernel = {"shrink": module.shrink_kernel, "expand": module.expand_kernel}[kind]
    return Case(f"{kind} {dtype} {block_t}", kernel, arguments, {"num_warps": 4, "num_stages": 3}, False)


def cases(arch: int, thorough: bool) -> Iterator[Case]:
    yield attention_case(arch, "bfloat16", 256)
    yield attention_case(arch, "bfloat16", 128, shared=True)
    yield norm_case("bfloat16", 640)
    yield norm_case("bfloat16", 8192, residual=True)
    yield gathered_case("shrink", "bfloat16", 16)
    yield gathered_case("expand", "bfloat16", 32)
    if thorough:
        yield gathered_case("shrink", "float32", 32)
        yield gathered_case("expand", "float32", 16)
        yield norm_case("bfloat16", 8192)
        yield norm_case("float32", 1152, residual=True)
        yield attention_case(arch, "bfloat16", 256, header=False)
        yield attention_case(arch, "bfloat16", 256, windowed=True)
        yield attention_case(arch, "bfloat16", 256, rows=64)
        yield attention_case(arch, "bfloat16", 256, rows=64, softcap=True, windowed=True)
        yield attention_case(arch, "bfloat16", 128, rows=64, shared=True, wide=True)
        yield attention_case(arch, "float16", 256)
        yield attention_case(arch, "bfloat16", 128)
        yield attention_case(arch, "bfloat16", 64)
        yield attention_case(arch, "bfloat16", 256, softcap=True)
        yield attention_case(arch, "bfloat16", 128, softcap=True, windowed=True)
        yield attention_case(arch, "bfloat16", 256, shared=True, wide=True)
        yield attention_case(arch, "bfloat16", 128, shared=True, wide=True)
        yield attention_case(arch, "float16", 128)
        yield attention_case(arch, "float32", 64)
        yield attention_case(arch, "float32", 128)
        yield attention_case(arch, "float32", 256)
        yield attention_case(arch, "float32", 256, shared=True)
        yield attention_case(arch, "float32", 256, softcap=True, windowed=True)
        yield attention_case(arch, "bfloat16", 256, shared=True)
        if arch >= 90:
            yield attention_case(arch, "bfloat16", 256, pointers=True)


@pytest.mark.parametrize(
    "arch, thorough",
    [(90, False), *(pytest.param(arch, True, marks=pytest.mark.slow) for arch in SHARED_MEMORY)],
    ids=lambda value: str(value),
)
def test_kernels_fit_the_chip(arch: int, thorough: bool) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(arch), *(["thorough"] if thorough else [])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == (6 if not thorough else 29 + (arch >= 90))
    for row in rows:
        assert row["stack"] == 0, f"{row} spills registers"
        assert row["shared"] <= SHARED_MEMORY[arch], f"{row} does not fit a multiprocessor"
        assert row["tensor_cores"] == row["needs_tensor_cores"], row


if __name__ == "__main__":
    for case in cases(int(sys.argv[1]), "thorough" in sys.argv):
        print(json.dumps(compile_case(case, int(sys.argv[1]))), flush=True)
