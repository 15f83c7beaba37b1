"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spilling, within shared memory, on tensor cores.

Compiling needs neither a GPU nor a driver, but a process in which Triton is not interpreted, so this file also runs as
a script: ``python tests/test_aot.py 90`` prints one line of json per kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes one program may have
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


class Case(NamedTuple):
    """One kernel to compile.

    Attributes:
        name: shown in the report.
        kernel: the jitted function.
        arguments: Triton type such as "*bf16" or "i32" by argument, or the value of a constexpr.
        options: num_warps, num_stages.
        tensor_cores: whether matrix instructions must appear.
    """

    name: str
    kernel: object
    arguments: dict[str, object]
    options: dict[str, int]
    tensor_cores: bool


def accumulate_cases() -> Iterator[Case]:
    import torch
    import triton.language as tl

    from thought_kernels.triton.accumulate import COLUMNS, STATISTICS_ROWS, STRIP
    from thought_kernels.triton.accumulate_plan import plan as plan_call
    from thought_kernels.triton.accumulate_product import product_kernel
    from thought_kernels.triton.accumulate_reduce import reduce_sums_kernel, reduce_tiles_kernel
    from thought_kernels.triton.accumulate_rows import row_statistics_kernel

    pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    operands = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    strides = {"delta_column": 1, "activation_column": 1}
    for delta, activation, pair, scaled in (
        (bf16, bf16, False, True),
        (bf16, bf16, True, True),
        (fp32, bf16, False, True),
        (fp16, fp16, False, False),
        (fp16, fp16, True, True),
        (fp32, fp32, True, True),
    ):
        plan = plan_call(
            delta, activation, rows=4096, d_out=640, d_in=640, gram=True, scaled=scaled or pair, processors=132
        )
        yield Case(
            f"product {delta} {activation}{' pair' * pair}{' scaled' * scaled}",
            product_kernel,
            {
                "delta": pointer[delta],
                "without": pointer[activation] if pair else None,
                "activation": pointer[activation],
                "factors": "*fp32" if scaled else None,
                "further": "*fp32" if scaled else None,
                "partials": "*fp32",
                **strides,
                "OPERAND": operands[plan.operand],
                "PRECISION": plan.precision,
                "BLOCK": plan.block,
                "BLOCK_K": plan.block_k,
            },
            plan.options,
            tensor_cores=activation != fp32,
        )
    yield Case(
        "row_statistics",
        row_statistics_kernel,
        {
            "delta": "*bf16",
            "without": "*bf16",
            "activation": "*bf16",
            "weights": "*fp32",
            "factors": "*fp32",
            "further": "*fp32",
            "sums": "*fp32",
            "moments": "*fp64",
            **strides,
            "NORMALIZATION": 2,
            "ROWS": STATISTICS_ROWS,
            "COLUMNS": COLUMNS,
        },
        {"num_warps": 8},
        tensor_cores=False,
    )
    accumulators = {"cross": "*fp32", "gram": "*fp32", "coefficient": "fp32", "cross_column": 1, "gram_column": 1}
    yield Case(
        "reduce_tiles",
        reduce_tiles_kernel,
        {"partials": "*fp32", **accumulators, "BLOCK": 128, "STRIP": STRIP},
        {"num_warps": 4},
        tensor_cores=False,
    )
    sums = {"sums": "*fp32", "moment_parts": "*fp64", "delta_sum": "*fp32", "activation_sum": "*fp32"}
    unit = {"delta_sum_stride": 1, "activation_sum_stride": 1, "moments_stride": 1}
    yield Case(
        "reduce_sums",
        reduce_sums_kernel,
        {**sums, "moments": "*fp64", "coefficient": "fp32", **unit, "BLOCKS": 16, "COLUMNS": COLUMNS},
        {"num_warps": 4},
        tensor_cores=False,
    )


def compile_case(case: Case, arch: int) -> dict[str, object]:
    """Resources of one kernel: registers, stack bytes (spills), shared bytes, and its matrix instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        value = case.arguments.get(name, "i32")
        if isinstance(value, str) and value.startswith(("*", "i32", "fp32", "tensordesc")):
            signature[name] = value
            if value.startswith("*") or name.endswith(("_row", "_head", "_batch")) or name in ("d", "d_out", "d_in"):
                attributes[(index,)] = [["tt.divisibility", 16]]  # as Triton finds for d a multiple of 16
        else:
            signature[name], constants[name] = "constexpr", value
    compiled = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={**case.options, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    return {
        "case": case.name,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_cores": TENSOR_CORE[arch] in ptx,
        "needs_tensor_cores": case.tensor_cores,
        "pipelined": "cp.async" in ptx,
    }


# The kernels' resources differ little between chips, and compiling takes a while: one chip in the quick tests.
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in SHARED_MEMORY]
)
def test_kernels_fit_the_chip(arch: int) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 9
    for row in rows:
        assert row["stack"] == 0, f"{row} spills registers"
        assert row["shared"] <= SHARED_MEMORY[arch], f"{row} does not fit a multiprocessor"
        assert row["tensor_cores"] == row["needs_tensor_cores"], row
        assert row["pipelined"] or not row["case"].startswith("product"), f"{row} waits for each load"


if __name__ == "__main__":
    for case in accumulate_cases():
        print(json.dumps(compile_case(case, int(sys.argv[1]))), flush=True)
