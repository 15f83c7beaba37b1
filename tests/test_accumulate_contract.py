"""accumulate and accumulate_pair: refusals that leave everything untouched, registration, torch.compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import thought_kernels as tk
from thought_kernels.ops import accumulate as accumulate_module

ROWS, D_OUT, D_IN = 6, 5, 3


def arguments() -> dict:
    """A valid call of accumulate."""
    torch.manual_seed(0)
    return {
        "cross": torch.randn(D_OUT, D_IN),
        "delta": torch.randn(2, 3, D_OUT),
        "activation": torch.randn(2, 3, D_IN),
        "weights": torch.rand(2, 3),
        "gram": torch.randn(D_IN, D_IN),
        "delta_sum": torch.randn(D_OUT),
        "activation_sum": torch.randn(D_IN),
        "moments": torch.randn(4, dtype=torch.float64),
    }


BAD = [  # what to change, the error, the sentence
    ({"cross": None}, TypeError, "cross must be a dense tensor, got NoneType"),
    ({"delta": [1.0]}, TypeError, "delta must be a dense tensor, got list"),
    ({"activation": torch.eye(3).to_sparse()}, TypeError, "activation must be a dense tensor, got torch.sparse_coo"),
    ({"gram": torch.zeros(3, 3, device="meta")}, ValueError, "gram must be on cross's device cpu, got meta"),
    (
        {"delta": torch.zeros(2, 3, 5, dtype=torch.int32)},
        TypeError,
        "delta must be float16, bfloat16, float32 or float64",
    ),
    (
        {"weights": torch.ones(2, 3, dtype=torch.bool)},
        TypeError,
        "weights must be float16, bfloat16, float32 or float64",
    ),
    ({"cross": torch.zeros(5, 3).bfloat16()}, TypeError, "cross must be float32 or float64, got torch.bfloat16"),
    ({"delta": torch.tensor(1.0)}, ValueError, "delta must be [..., d] with d ≥ 1, got []"),
    ({"delta": torch.zeros(2, 3, 0), "cross": torch.zeros(0, 3)}, ValueError, "delta must be [..., d] with d ≥ 1, got"),
    ({"activation": torch.zeros(2, 3, 0), "cross": torch.zeros(5, 0)}, ValueError, "activation must be [..., d] with"),
    ({"delta": torch.zeros(6, 5)}, ValueError, "delta must have activation's leading dimensions [2, 3], got [6, 5]"),
    ({"weights": torch.ones(3)}, ValueError, "weights must have shape [2, 3], got [3]; weights are not broadcast"),
    ({"weights": torch.tensor(1.0)}, ValueError, "weights must have shape [2, 3], got []"),
    ({"cross": torch.zeros(3, 5)}, ValueError, "cross must have shape [5, 3], got [3, 5]; delta is [2, 3, 5] and"),
    ({"gram": torch.zeros(5, 5)}, ValueError, "gram must have shape [3, 3], got [5, 5]"),
    ({"gram": torch.zeros(3, 3).double()}, TypeError, "gram must have cross's dtype torch.float32, got torch.float64"),
    ({"delta_sum": torch.zeros(3)}, ValueError, "delta_sum must have shape [5], got [3]"),
    ({"activation_sum": torch.zeros(1, 3)}, ValueError, "activation_sum must have shape [3], got [1, 3]"),
    ({"moments": torch.zeros(4)}, TypeError, "moments must be torch.float64, got torch.float32"),
    ({"moments": torch.zeros(3).double()}, ValueError, "moments must have shape [4], got [3]"),
    ({"normalization": "l2"}, ValueError, "normalization must be one of none, norm, squared_norm, got 'l2'"),
    ({"normalization": ["norm"]}, TypeError, "normalization must be a string, got list"),
    ({"coefficient": float("nan")}, ValueError, "coefficient must be finite, got nan"),
    ({"coefficient": 10**400}, ValueError, "coefficient must be finite, got 1000"),
    ({"coefficient": torch.ones(())}, TypeError, "coefficient must be a number, got Tensor"),
    ({"backend": "fastest"}, ValueError, "backend must be None or one of reference, cpp, triton, cuda, got 'fastest'"),
    ({"backend": "cuda"}, ValueError, "backend must support this call on cpu, got 'cuda'; it runs on CUDA tensors"),
    (
        {"cross": torch.zeros(1, 3).expand(5, 3)},
        ValueError,
        "cross must have one address for each element, got strides",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "sentence"), BAD, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bad_arguments_are_refused_before_anything_is_written(backend, change, error, sentence):
    call = {**arguments(), "backend": backend, **change}
    tensors = {
        name: value for name, value in call.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    }
    before = {name: value.clone() for name, value in tensors.items()}
    with pytest.raises(error, match="^accumulate: " + re.escape(sentence)):
        tk.accumulate(**call)
    for name, value in before.items():
        assert torch.equal(tensors[name].to_dense(), value.to_dense()), name


def test_zero_features_are_refused_for_fake_tensors_too():
    with pytest.raises(ValueError, match=r"^accumulate: activation must be \[\.\.\., d\] with d ≥ 1, got \[6, 0\]"):
        torch.ops.thought_kernels.accumulate(
            *(torch.zeros(*shape, device="meta") for shape in ((5, 0), (6, 5), (6, 0)))
        )


def test_groups_share_buffers_that_exist_before_the_first_is_summed(monkeypatch):
    monkeypatch.setattr(accumulate_module, "_GROUP_ROWS", 6)
    delta, weights = torch.randn(2, 4, 3, 5).transpose(0, 1), torch.rand(4, 2, 3)
    activation = torch.randn(4, 2, 3, 7)
    pieces = accumulate_module._flat(delta, activation, weights)
    copies = [(d, d.clone(), a, w) for d, a, w in pieces]
    assert len(copies) == 4 and len({d.data_ptr() for d, *_ in copies}) == 1
    assert torch.equal(torch.cat([copy for _, copy, _, _ in copies]), delta.reshape(-1, 5))
    assert torch.equal(torch.cat([a for *_, a, _ in copies]), activation.reshape(-1, 7))
    assert torch.equal(torch.cat([w for *_, w in copies]), weights.reshape(-1))


def test_pair_names_its_own_arguments():
    cross = torch.zeros(3, 3)
    with pytest.raises(
        ValueError, match=r"^accumulate_pair: with_context must have without_context's size 3, got \[6, 5\]"
    ):
        tk.accumulate_pair(cross, torch.zeros(6, 5), torch.zeros(6, 3))
    with pytest.raises(TypeError, match=r"^accumulate_pair: without_context must be float16"):
        tk.accumulate_pair(cross, torch.zeros(6, 3), torch.zeros(6, 3, dtype=torch.int64))


@pytest.mark.parametrize("through_torch_ops", [False, True])
def test_overlap_is_refused(through_torch_ops):
    accumulate = torch.ops.thought_kernels.accumulate if through_torch_ops else tk.accumulate
    memory = torch.randn(40)
    matrix, rows = memory[:9].view(3, 3), torch.randint(-9, 9, (2, 3)).float()  # products exact in any order
    for change, name in (
        ({"delta": memory[8:14].view(2, 3)}, "delta"),
        ({"activation": memory[2:8].view(2, 3)}, "activation"),
        ({"weights": memory[7:9]}, "weights"),
        ({"gram": memory[6:15].view(3, 3)}, "gram"),
        ({"delta_sum": memory[4:7]}, "delta_sum"),
        ({"moments": memory[4:12].view(torch.float64)}, "moments"),
    ):
        before = memory.clone()
        call = {"delta": rows, "activation": rows, **change}
        inputs = call.pop("delta"), call.pop("activation")
        with pytest.raises(ValueError, match=f"^accumulate: cross must not overlap {name}, got shared memory"):
            accumulate(matrix, *inputs, **call)
        assert torch.equal(memory, before)
    # Columns of one buffer: their address ranges interleave, their elements do not meet.
    columns = torch.zeros(3, 8)
    accumulate(columns[:, :3], rows, rows, gram=columns[:, 3:6], delta_sum=columns[:, 7])
    assert torch.equal(columns[:, 3:6], rows.T @ rows) and not columns[:, 6].any()
    assert torch.equal(columns[:, 7], rows.sum(0))
    with pytest.raises(ValueError, match="^accumulate: cross must not overlap delta_sum"):
        accumulate(columns[:, :3], rows, rows, delta_sum=columns[:, 2])
    with pytest.raises(ValueError, match="^accumulate: cross must not overlap gram"):
        accumulate(columns[:, :3], rows, rows, gram=columns[:, 2:5])


def test_elements_of_one_buffer_in_turn_do_not_overlap():
    rows = torch.randint(-9, 9, (4, 3)).float()  # products exact in any order
    in_turn, vectors = torch.zeros(3, 3, 2), torch.zeros(3, 2)
    sums = {"delta_sum": vectors[:, 0], "activation_sum": vectors[:, 1]}
    tk.accumulate(in_turn[..., 0], rows, 2 * rows, gram=in_turn[..., 1], **sums)
    product = rows.T @ rows
    assert torch.equal(in_turn[..., 0], 2 * product) and torch.equal(in_turn[..., 1], 4 * product)
    assert torch.equal(vectors, torch.stack([rows.sum(0), 2 * rows.sum(0)], 1))
    complex_sums = torch.zeros(3, 3, dtype=torch.complex64)
    tk.accumulate(complex_sums.real, rows, rows, gram=complex_sums.imag)
    assert torch.equal(complex_sums.real, complex_sums.imag)
    for other in (in_turn[..., 0].T, torch.as_strided(in_turn, (3, 3), (3, 1), 1)):
        with pytest.raises(ValueError, match="^accumulate: cross must not overlap gram"):
            tk.accumulate(in_turn[..., 0], rows, rows, gram=other)
    moments = torch.zeros(8, dtype=torch.float64)
    halves = moments.view(torch.float32)
    with pytest.raises(ValueError, match="^accumulate: delta_sum must not overlap moments"):
        tk.accumulate(product, rows, rows, delta_sum=halves[1:12:4], moments=moments[::2])
    tk.accumulate(product, rows, rows, delta_sum=halves[2:14:4], moments=moments[::2])
    assert torch.equal(halves[2:14:4], rows.sum(0)) and moments[0] == 4


@pytest.mark.parametrize(("function", "dtype"), [("accumulate", torch.float32), ("accumulate_pair", torch.bfloat16)])
def test_opcheck(function, dtype):
    delta, activation = torch.randn(6, 3, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    operator = getattr(torch.ops.thought_kernels, function).default
    torch.library.opcheck(operator, (torch.zeros(3, 3), delta, activation))
    options = {
        "weights": torch.rand(6),
        "normalization": "norm",
        "coefficient": 0.5,
        "gram": torch.zeros(3, 3),
        "delta_sum": torch.zeros(3),
        "activation_sum": torch.zeros(3),
        "moments": torch.zeros(4, dtype=torch.float64),
    }
    torch.library.opcheck(operator, (torch.zeros(3, 3), delta, activation), options)


def test_torch_compile_with_a_changing_number_of_rows():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(cross, gram, delta, activation, weights):
        tk.accumulate(cross, delta * 2, activation, weights=weights, normalization="norm", gram=gram)
        tk.accumulate_pair(gram, activation * 2, activation)
        return cross.sum()

    for rows in (4, 9, 17):
        delta, activation, weights = torch.randn(rows, 5), torch.randn(rows, 3), torch.rand(rows)
        cross, gram = torch.zeros(5, 3), torch.zeros(3, 3)
        total = step(cross, gram, delta, activation, weights)
        expected_cross, expected_gram = torch.zeros(5, 3), torch.zeros(3, 3)
        tk.accumulate(expected_cross, delta * 2, activation, weights=weights, normalization="norm", gram=expected_gram)
        tk.accumulate_pair(expected_gram, activation * 2, activation)
        assert torch.equal(cross, expected_cross) and torch.equal(gram, expected_gram) and total == cross.sum()


def test_inputs_that_require_grad_build_no_graph():
    for backend in ("reference", "cpp"):
        cross, rows = torch.zeros(3, 3), torch.randn(4, 3, requires_grad=True)
        tk.accumulate(cross, rows, rows, backend=backend)
        assert not cross.requires_grad and torch.allclose(cross, (rows.T @ rows).detach())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autograd_notices_that_an_accumulator_has_changed(backend):
    scale, rows = torch.ones(3, 3, requires_grad=True), torch.randn(4, 3)
    cross, gram = torch.zeros(3, 3), torch.zeros(3, 3)
    for saved in (cross, gram):
        product = (scale * saved).sum()
        tk.accumulate(cross, rows, rows, gram=gram, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_available_backends_lists_all_four():
    for name in ("accumulate", "accumulate_pair"):
        listed = tk.available_backends(name, "cpu")
        assert list(listed) == ["reference", "cpp", "triton", "cuda"]
        assert listed["reference"] is None and listed["cpp"] is None
        assert "CUDA tensors" in listed["cuda"]
    with pytest.raises(
        ValueError, match=r"^available_backends: op_name must be one of .*accumulate, .*got 'accumulat'"
    ):
        tk.available_backends("accumulat", "cpu")


def test_triton_refuses_float64_accumulators():
    rows = torch.randn(4, 3)
    if tk.available_backends("accumulate", "cpu")["triton"] is not None:
        pytest.skip(tk.available_backends("accumulate", "cpu")["triton"])
    with pytest.raises(ValueError, match="got 'triton'; it accumulates in float32 only"):
        tk.accumulate(torch.zeros(3, 3, dtype=torch.float64), rows, rows, backend="triton")


def test_compiled_kernel_checks_direct_calls():
    kernel = torch.ops.thought_kernels.accumulate_cpp
    cross, rows = torch.zeros(3, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"^accumulate_cpp: weights must have shape \[4\], got \[3\]"):
        kernel(cross, rows, rows, False, torch.ones(3), 0, 1.0, None, None, None, None)
    with pytest.raises(ValueError, match="^accumulate_cpp: normalization must be 0, 1 or 2, got 3"):
        kernel(cross, rows, rows, False, None, 3, 1.0, None, None, None, None)
    with pytest.raises(TypeError, match="^accumulate_cpp: moments must be Double, got Float"):
        kernel(cross, rows, rows, False, None, 0, 1.0, None, None, None, torch.zeros(4))
    assert not cross.any()


SHORT_OF_MEMORY = """
import resource
import torch
import thought_kernels as tk

torch.set_num_threads(2)
delta, activation = torch.randn(400, 640), torch.randn(400, 640)

def accumulated(room):
    made = [torch.zeros(640, 640), torch.zeros(640, 640), torch.zeros(640), torch.zeros(4, dtype=torch.float64)]
    cross, gram, delta_sum, moments = made
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = -1 if room is None else pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
    try:
        tk.accumulate(cross, delta, activation, gram=gram, delta_sum=delta_sum, moments=moments, backend="cpp")
        return made, True
    except (RuntimeError, MemoryError):
        return made, False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

whole, _ = accumulated(None)

def finishes(room):
    made, finished = accumulated(room)
    for sums, right in zip(made, whole):
        assert torch.equal(sums, right if finished else torch.zeros_like(sums)), f"half written with {room} bytes"
    return finished

enough = next(room for room in range(0, 16 << 20, 1 << 19) if finishes(room))
assert enough > 0
for room in range(enough - (1 << 20), enough, 1 << 13):  # the last of the memory is what some threads get
    finishes(max(room, 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_nothing_is_written_where_memory_runs_out():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and is missing next time
    run = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
