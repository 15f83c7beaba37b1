"""The CUDA compile check refuses what it should, and the sources pass it. No GPU is needed, but nvcc is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
import cuda_check

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on this machine")

PLAIN = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n'
LOCAL = """
extern "C" __global__ void permute(float* x, const int* order) {
    float y[64];  // indexed at run time, so it cannot stay in registers
    for (int i = 0; i < 64; ++i) y[order[i]] = x[i];
    for (int i = 0; i < 64; ++i) x[i] = y[order[63 - i]];
}
"""


def write(folder: Path, text: str) -> Path:
    source = folder / "kernel.cu"
    source.write_text(text)
    return source


def test_a_plain_kernel_passes(tmp_path):
    (kernel,) = cuda_check.compile_source(write(tmp_path, PLAIN), "90a")
    assert (kernel.name, kernel.stack) == ("twice", 0)
    assert kernel.registers > 0


def test_spilled_registers_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"kernel.cu for sm_90a: permute must not spill, got \d+ bytes of stack"):
        cuda_check.compile_source(write(tmp_path, LOCAL), "90a")


def test_missing_tensor_core_instructions_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="kernel.cu for sm_80 must use mma.sync, got none in its PTX"):
        cuda_check.compile_source(write(tmp_path, PLAIN), "80", ["mma.sync"])


@pytest.mark.parametrize("text", [PLAIN.replace("*=", "=*"), PLAIN.replace("{", "{ int unused;")])
def test_errors_and_warnings_are_refused(tmp_path, text):
    with pytest.raises(SystemExit, match="nvcc -ptx .* failed"):
        cuda_check.compile_source(write(tmp_path, text), "90a")


@pytest.mark.slow
def test_the_glue_is_type_checked(tmp_path):
    glue = cuda_check.CSRC / "cuda" / "bindings.cpp"
    cuda_check.check_glue(glue)
    broken = tmp_path / "bindings.cpp"
    broken.write_text(glue.read_text().replace("call.rows = rows;", "call.rows = weights;"))
    with pytest.raises(SystemExit, match="cannot convert"):
        cuda_check.check_glue(broken)


@pytest.mark.slow
def test_every_source_compiles(capsys):
    cuda_check.main(["--arch", "90a"])
    report = capsys.readouterr().out
    assert "csrc/cuda/accumulate.cu sm_90a: 20 kernels" in report
    assert "csrc/cuda/rms_norm_pair.cu sm_90a: 18 kernels" in report
