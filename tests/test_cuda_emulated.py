"""The CUDA kernels, run on a CPU: every index, mask, split and barrier, though not the hardware.

csrc/cuda/*.cu are compiled by the C++ compiler against tests/emulated_cuda, where a block's threads are fibers
and the tensor-core instructions are written out from the PTX manual. On a GPU the operators' own tests
test the real thing.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from dense_attention import normal
from test_accumulate import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NAMES,
    NORMALIZATIONS,
    accumulators,
    conditions,
    random_call,
    written_out,
)
from test_rms_norm_pair import pair_errors, two_norms
from tolerances import FLOORS, allowed_error, largest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER} on this machine"),
]
DTYPES = {BFLOAT16: 0, FLOAT16: 1, FLOAT32: 2}  # enum Dtype of csrc/cuda/accumulate.h


class Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64)]


class AccumulateCall(ctypes.Structure):
    _fields_ = [
        ("delta", Strided),
        ("activation", Strided),
        ("delta_dtype", ctypes.c_int),
        ("activation_dtype", ctypes.c_int),
        ("weights", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("d_out", ctypes.c_int),
        ("d_in", ctypes.c_int),
        ("pair", ctypes.c_bool),
        ("normalization", ctypes.c_int),
        ("coefficient", ctypes.c_float),
        *[(name, Strided) for name in NAMES],
    ]


def strided(tensor: torch.Tensor | None) -> Strided:
    if tensor is None:
        return Strided()
    return Strided(tensor.data_ptr(), tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0)


def build(stem: str, launches: int, folder: Path) -> ctypes.CDLL:
    """csrc/cuda/<stem>.cu, whose ``launches`` launches become calls of the emulator, as a shared library."""
    text = (ROOT / f"csrc/cuda/{stem}.cu").read_text()
    # kernel<<<grid, threads, shared, stream>>>(arguments); is the one thing that is not C++.
    launch = r"(\w+)<<<(.+?), kThreads, \w+, stream>>>\((.+?)\);"
    text, found = re.subn(launch, r"emulated::launch(dim3(\2), [&] { \1(\3); });", text, flags=re.DOTALL)
    assert found == launches
    (folder / f"{stem}.cpp").write_text(text)
    includes = [ROOT / "tests/emulated_cuda", ROOT / "csrc/cuda"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
    built = folder / f"{stem}.so"
    command = [COMPILER, *flags, str(folder / f"{stem}.cpp"), "-o", str(built)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    library = build("accumulate", 4, tmp_path_factory.mktemp("emulated"))
    library.thought_kernels_accumulate_workspace.restype = ctypes.c_int64
    library.thought_kernels_accumulate.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, call, sums: dict[str, torch.Tensor], processors: int = 4) -> None:
    """Runs one call of 2-D inputs."""
    weights = None if call.weights is None else call.weights.float().contiguous()
    arguments = AccumulateCall(
        strided(call.delta),
        strided(call.activation),
        DTYPES[call.delta.dtype],
        DTYPES[call.activation.dtype],
        None if weights is None else weights.data_ptr(),
        *call.activation.shape[:1],
        call.delta.shape[1],
        call.activation.shape[1],
        call.pair,
        NORMALIZATIONS.index(call.normalization),
        call.coefficient,
        *[strided(sums.get(name)) for name in NAMES],
    )
    ctypes.c_int.in_dll(library, "processors").value = processors
    size = library.thought_kernels_accumulate_workspace(ctypes.byref(arguments))
    assert size <= 4 * processors * 4 * 128**2 + 4 * call.activation.shape[0] + 2**16  # bounded
    buffer = torch.full((size + 512,), 255, dtype=torch.uint8)  # all ones is NaN
    start = -buffer.data_ptr() % 256
    error = library.thought_kernels_accumulate(
        ctypes.byref(arguments), ctypes.c_void_p(buffer.data_ptr() + start), ctypes.c_void_p()
    )
    assert error is None
    assert (buffer[start + size :] == 255).all()


def assert_right(library: ctypes.CDLL, call, outputs=NAMES, processors: int = 4) -> None:
    """Runs one call of 2-D inputs and holds every sum to what test_accumulate allows."""
    initial = accumulators(call)
    sums = {name: initial[name].clone() for name in outputs}
    run(library, call, sums, processors)
    half = call.activation.dtype if call.activation.dtype != FLOAT32 else call.delta.dtype
    rounded = half if half != FLOAT32 else None
    truth, plain = written_out(call, initial), written_out(call, initial, FLOAT32, rounded)
    condition = conditions(call, initial, FLOAT32, rounded)
    for name, actual in sums.items():
        allowed = allowed_error(truth[name], plain[name], condition=condition[name])
        assert largest(actual.double() - truth[name]) <= allowed, name
    if "gram" in sums:
        change = sums["gram"].double() - initial["gram"].double()
        assert largest(change - change.mT) <= allowed_error(truth["gram"], truth["gram"].float())


@pytest.mark.parametrize("pair", [False, True], ids=["delta", "pair"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(library, dtype, normalization, pair):
    assert_right(library, random_call(rows=(69,), dtype=dtype, normalization=normalization, pair=pair))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_batches_and_splits(library, dtype):
    assert_right(library, random_call(rows=(70,), d_out=136, d_in=264, dtype=dtype))
    assert_right(library, random_call(rows=(40,), d_out=264, d_in=136, dtype=dtype), processors=1)
    assert_right(library, random_call(rows=(800,), d_out=40, d_in=24, dtype=dtype), processors=16)


@pytest.mark.parametrize("delta", DTYPES, ids=str)
@pytest.mark.parametrize("activation", DTYPES, ids=str)
def test_a_dtype_for_each_input(library, delta, activation):
    call = random_call(rows=(40,))
    assert_right(library, call._replace(delta=call.delta.to(delta), activation=call.activation.to(activation)))


def test_padding_and_zero_rows(library):
    call = random_call(rows=(40,))
    call.weights[11:17] = 0
    call.delta[11:17], call.activation[11:17] = torch.nan, torch.inf
    call.activation[20:25] = 0
    for normalization in NORMALIZATIONS:
        assert_right(library, call._replace(normalization=normalization))


@pytest.mark.parametrize("outputs", [("cross",), ("cross", "gram"), ("cross", "delta_sum"), ("cross", "moments")])
def test_every_output_is_optional(library, outputs):
    call = random_call(rows=(20,), d_out=9, d_in=11)
    for normalization in ("none", "norm"):
        for weights in (None, call.weights):
            assert_right(library, call._replace(normalization=normalization, weights=weights), outputs)


@pytest.mark.parametrize("normalization", ["norm", "squared_norm"])
@pytest.mark.parametrize("size", [1e-24, 3e18])
@pytest.mark.parametrize("alike", [False, True])
def test_tiny_and_huge_rows(library, alike, size, normalization):
    # ‖a‖² lies outside float32, and 1/‖a‖² too, though δ aᵀ/‖a‖² does not, whether δ is as large as a or not.
    call = random_call(rows=(30,), normalization=normalization)
    call = call._replace(delta=call.delta * (size if alike else 1), activation=call.activation * size)
    sums = {"cross": torch.zeros(37, 29)}
    run(library, call, sums)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in accumulators(call).items()}
    truth = written_out(call, zeros)["cross"]
    assert largest(sums["cross"].double() - truth) <= conditions(call, zeros)["cross"] + FLOORS[FLOAT32] * largest(
        truth
    )


@pytest.mark.parametrize("first, width", [(3, 100), (8, 104)], ids=["unaligned", "aligned"])
def test_row_strides(library, first, width):
    call = random_call(rows=(50,), d_out=32, d_in=24, dtype=BFLOAT16)
    wide = torch.full((50, width), torch.nan, dtype=BFLOAT16)
    wide[:, first : first + 32] = call.delta
    assert_right(library, call._replace(delta=wide[:, first : first + 32]))


def test_column_strides(library):
    call = random_call(rows=(50,), d_out=32, d_in=24, dtype=FLOAT16)
    assert_right(
        library, call._replace(delta=call.delta.mT.contiguous().mT, activation=call.activation.mT.contiguous().mT)
    )


class RmsNormPairCall(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "delta", "gain", "residual", "norm", "difference")],
        *[(f"{name}_{step}", ctypes.c_int64) for name in ("x", "delta", "residual") for step in ("row", "column")],
        ("rows", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("d", "x_dtype", "delta_dtype")],
        ("eps", ctypes.c_float),
    ]


@pytest.fixture(scope="module")
def norms(tmp_path_factory) -> ctypes.CDLL:
    library = build("rms_norm_pair", 1, tmp_path_factory.mktemp("emulated"))
    library.thought_kernels_rms_norm_pair.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("dtype, delta_dtype", [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT16), (FLOAT32, BFLOAT16)], ids=str)
@pytest.mark.parametrize(
    "rows, d, step", [(11, 640, 1), (3, 67, 1), (2, 1, 1), (1, 1032, 1), (2, 1100, 2), (1, 8192, 1)], ids=str
)
def test_norm_pairs_agree_with_float64(norms, rows, d, step, dtype, delta_dtype, size):
    # One row to a warp up to 1024 elements and to a block beyond; whole vectors, odd ends, and every other column.
    x = normal(rows, d * step, seed=0, dtype=dtype)[:, ::step]
    delta = (normal(rows, d, seed=1) * size).to(delta_dtype)
    gain = normal(d, seed=2)
    residual = normal(rows, d * step + 1, seed=3, dtype=dtype)[:, :-1:step]
    outputs, fused = ([torch.full((rows + 1, d), torch.nan, dtype=t) for t in (dtype, delta_dtype)] for _ in range(2))
    for added, written in ((None, outputs), (residual, fused)):
        call = RmsNormPairCall(
            *(None if tensor is None else tensor.data_ptr() for tensor in (x, delta, gain, added, *written)),
            *x.stride(),
            *delta.stride(),
            *residual.stride(),
            rows,
            d,
            DTYPES[dtype],
            DTYPES[delta_dtype],
            1e-6,
        )
        assert norms.thought_kernels_rms_norm_pair(ctypes.byref(call), ctypes.c_void_p()) is None
    assert all(output[rows:].isnan().all() for output in (*outputs, *fused))
    assert torch.equal(fused[0][:rows], residual + outputs[0][:rows])
    assert torch.equal(fused[1][:rows], outputs[1][:rows])
    first, change = (output[:rows].double() for output in outputs)
    truth, true_change = two_norms(x, delta, gain, 1e-6)
    first_error, change_error = map(largest, pair_errors(x, delta, gain, 1e-6, dtype=FLOAT32))
    assert largest(first - truth) <= first_error + FLOORS[dtype] * largest(truth)
    subnormal = torch.finfo(delta_dtype).smallest_normal * torch.finfo(delta_dtype).eps
    floor = FLOORS[torch.float64] * largest(truth) + change_error
    assert largest(change - true_change) <= floor + FLOORS[delta_dtype] * largest(true_change) + subnormal
