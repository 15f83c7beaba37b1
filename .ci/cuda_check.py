"""Compiles the CUDA sources without a GPU, and fails where they would run badly: ``make cuda-check``.

Every csrc/cuda/*.cu goes through nvcc to PTX and through ptxas to machine code for each architecture: no warnings, no
spilled registers, static shared memory within the limit, tensor-core instructions where they are promised. The glue,
csrc/cuda/*.cpp, is type-checked against the torch installed here, CUDA build or not. Flags and architectures are those
that setup.py and torch build with.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402

CSRC = ROOT / "csrc"
# Since 9.0 with the instructions of that architecture alone, which no other would compile.
ARCHITECTURES = [f"{major}{minor}" + "a" * (major >= 9) for major, minor in build.CAPABILITIES]
# What must appear in the PTX of a source, by its stem.
INSTRUCTIONS = {
    "accumulate": (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    )
}
MAX_STATIC_SHARED = 48 * 1024  # bytes; more must be asked for at launch, on every architecture


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    registers: int
    stack: int  # bytes; registers are spilled here
    shared: int  # bytes, static


def run(command: Sequence[str | Path]) -> str:
    """The output, stdout and stderr; SystemExit with it if the command fails."""
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    output = finished.stdout + finished.stderr
    if finished.returncode != 0:
        raise SystemExit(f"cuda-check: {' '.join(map(str, command))} failed:\n{output}")
    return output


def kernels(report: str) -> list[Kernel]:
    """Reads ``ptxas -v``."""
    pattern = r"Function properties for (\w+)\s+(\d+) bytes stack frame.*\n.*?Used (\d+) registers(.*)"
    found = []
    for name, stack, registers, rest in re.findall(pattern, report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(Kernel(name, int(registers), int(stack), int(shared[1]) if shared else 0))
    return found


def compile_source(source: Path, architecture: str, instructions: Sequence[str] = ()) -> list[Kernel]:
    """Compiles one .cu for one architecture such as "90a"; SystemExit with a sentence if anything is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
        flags = [*COMMON_NVCC_FLAGS, *build.NVCC_FLAGS, "-std=c++20", "-Werror", "all-warnings", "-I", CSRC]
        run(["nvcc", "-ptx", f"-arch=compute_{architecture}", *flags, source, "-o", ptx])
        report = run(["ptxas", "-v", "-O3", f"-arch=sm_{architecture}", ptx, "-o", binary])
        text = ptx.read_text()
    where = f"{source.name} for sm_{architecture}"
    found = kernels(report)
    if not found:
        raise SystemExit(f"cuda-check: {where} must hold kernels, got none; ptxas said:\n{report}")
    for kernel in found:
        if kernel.stack > 0:
            raise SystemExit(f"cuda-check: {where}: {kernel.name} must not spill, got {kernel.stack} bytes of stack")
        if kernel.shared > MAX_STATIC_SHARED:
            raise SystemExit(
                f"cuda-check: {where}: {kernel.name} must have at most {MAX_STATIC_SHARED} bytes of static shared "
                f"memory, got {kernel.shared}"
            )
    for instruction in instructions:
        if instruction not in text:
            raise SystemExit(f"cuda-check: {where} must use {instruction}, got none in its PTX")
    return found


def check_glue(source: Path) -> None:
    """Type-checks a .cpp that includes torch; one stub stands in for the header that only CUDA builds of torch have."""
    import torch

    includes = [*include_paths(), str(CSRC), str(CSRC / "cuda"), str(toolkit() / "include")]
    if torch.version.cuda is None:
        includes.insert(0, str(CSRC / "cuda" / "stub_include"))
    flags = ["-fsyntax-only", "-std=c++20", *build.CXX_FLAGS, "-Werror"]
    # torch's headers are system headers here: their warnings are not ours.
    run([os.environ.get("CXX", "g++"), *flags, *(word for path in includes for word in ("-isystem", path)), source])


def toolkit() -> Path:
    """The CUDA toolkit's folder, as nvcc itself reports it."""
    report = run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(\S+)$", report, re.MULTILINE)
    if top is None:
        raise SystemExit(f"cuda-check: nvcc --dryrun must name TOP, got:\n{report}")
    return Path(top[1]).resolve()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="such as 80 90a 100a")
    options = parser.parse_args(arguments)
    for source in sorted((CSRC / "cuda").glob("*.cpp")):
        check_glue(source)
        print(f"{source.relative_to(ROOT)}: types agree", flush=True)
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        for architecture in options.arch:
            found = compile_source(source, architecture, INSTRUCTIONS.get(source.stem, ()))
            registers = max(kernel.registers for kernel in found)
            name = source.relative_to(ROOT)
            print(
                f"{name} sm_{architecture}: {len(found)} kernels, at most {registers} registers, no spill", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
