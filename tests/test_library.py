"""The choice of a backend, with and without the compiled extension."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import thought_kernels as tk
from thought_kernels.ops import accumulate as accumulate_module
from thought_kernels.ops import library

CPU = torch.device("cpu")
INDEX = torch.zeros(2, dtype=torch.int64)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(library, "extension", lambda: "the extension is away")
    library.unavailable.cache_clear()
    yield
    library.unavailable.cache_clear()


def test_without_the_extension_the_reference_runs_and_cpp_says_why(no_extension):
    assert library.choose("accumulate", None, CPU) == "reference"
    assert tk.available_backends("accumulate", "cpu")["cpp"] == "the extension is away"
    cross, rows = torch.zeros(3, 3), torch.randn(4, 3)
    with pytest.raises(
        ValueError, match="^accumulate: backend must support this call on cpu, got 'cpp'; the extension is"
    ):
        tk.accumulate(cross, rows, rows, backend="cpp")
    assert not cross.any()
    tk.accumulate(cross, rows, rows)
    assert torch.equal(cross, rows.T @ rows)


def test_default_is_the_fastest_that_supports_the_call():
    assert library.choose("accumulate", None, CPU) == "cpp"
    assert library.choose("accumulate", None, CPU, lambda backend: "no" if backend == "cpp" else None) == "reference"
    with pytest.raises(ValueError, match="got 'cpp'; not this one"):
        library.choose("accumulate", "cpp", CPU, lambda backend: "not this one")


def test_a_device_without_kernels_gets_the_reference():
    listed = tk.available_backends("accumulate", "meta")
    assert [name for name, reason in listed.items() if reason is None] == ["reference"]
    assert library.choose("accumulate", None, torch.device("meta")) == "reference"


def test_an_unknown_device_is_refused():
    for device in ("foo", None, 1.5):
        with pytest.raises(ValueError, match=f"^available_backends: device must be a torch device, got {device!r}"):
            tk.available_backends("accumulate", device)


@pytest.mark.parametrize("name", ["einsum", None, ["accumulate"]], ids=repr)
def test_an_unknown_operator_is_refused(name):
    with pytest.raises(ValueError, match="^available_backends: op_name must be one of accumulate, accumulate_pair, "):
        tk.available_backends(name, "cpu")


def test_meta_tensors_give_shapes():
    rows, cross = torch.randn(4, 3, device="meta"), torch.zeros(3, 3, device="meta")
    tk.accumulate(cross, rows, rows, gram=torch.zeros(3, 3, device="meta"))
    tk.accumulate_pair(cross, rows, rows)
    heads, prefix = torch.randn(2, 2, 5, 8, device="meta"), (torch.randn(2, 3, 8, device="meta"),) * 2
    index = torch.zeros(2, dtype=torch.int64, device="meta")
    without, delta = tk.paired_attention(heads, heads, heads, prefix, lengths=index)
    chosen = tk.shared_prefix_attention(heads, heads, heads, [prefix], index)
    assert {without.shape, delta.shape, chosen.shape} == {heads.shape}
    assert {part.shape for part in tk.rms_norm_pair(rows, rows, rows[0], eps=0.0)} == {rows.shape}
    factors = torch.randn(3, 8, 1, device="meta"), torch.randn(3, 1, 9, device="meta")
    assert tk.gathered_low_rank(heads[0], *factors, index).shape == (2, 5, 9)


RETURNING = ("rms_norm_pair", "gathered_low_rank", "paired_attention", "shared_prefix_attention")


def outputs(name, through_torch_ops=False, make=torch.clone):
    """What an operator returns for tensors that come out of make, as a tuple."""
    rows, heads, prefix, index = map(make, (torch.ones(4, 3), torch.ones(2, 2, 5, 8), torch.ones(2, 3, 8), INDEX))
    arguments = {
        "rms_norm_pair": ([rows, rows, rows[0]],) * 2,
        "gathered_low_rank": ([prefix, prefix.mT, prefix, index],) * 2,
        "paired_attention": ([(prefix, prefix)], [prefix, prefix, None, None]),
        "shared_prefix_attention": ([[(prefix, prefix)], index], [[prefix], [prefix], index]),
    }[name][through_torch_ops]
    function = getattr(torch.ops.thought_kernels if through_torch_ops else tk, name)
    if name == "rms_norm_pair":
        return function(*arguments, eps=0.0)
    if name == "gathered_low_rank":
        return (function(*arguments),)
    returned = function(heads, heads, heads, *arguments)
    return returned if isinstance(returned, tuple) else (returned,)


@pytest.mark.parametrize("name", RETURNING)
def test_outputs_claim_no_gradient_however_they_are_called(name):
    def make(tensor):
        return tensor.clone().requires_grad_(tensor.is_floating_point())

    compiled = torch.compile(lambda: outputs(name, make=make), backend="aot_eager", fullgraph=True)
    for returned in (outputs(name, make=make), outputs(name, through_torch_ops=True, make=make), compiled()):
        assert not any(output.requires_grad for output in returned)


@pytest.mark.parametrize("name", RETURNING)
def test_fake_tensors_give_shapes_outside_their_mode_too(name):
    fakes = outputs(name, make=FakeTensorMode().from_tensor)
    assert [(x.shape, x.dtype, x.stride()) for x in fakes] == [(x.shape, x.dtype, x.stride()) for x in outputs(name)]


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_autocast_lowers_no_precision(backend):
    reason = tk.available_backends("accumulate", "cpu")[backend]
    if reason is not None:
        pytest.skip(reason)
    rows, heads, prefix = torch.randn(4, 3), torch.randn(2, 2, 5, 16), torch.randn(2, 3, 16)

    def everything():
        sums = {"cross": torch.zeros(3, 3), "gram": torch.zeros(3, 3), "delta_sum": torch.zeros(3)}
        tk.accumulate(delta=rows, activation=rows, **sums, backend=backend)
        pair = tk.paired_attention(heads, heads, heads, (prefix, prefix), backend=backend)
        one = tk.shared_prefix_attention(heads, heads, heads, [(prefix, prefix)], INDEX, backend=backend)
        norms = tk.rms_norm_pair(rows, rows, rows[0], eps=0.0, backend=backend)
        shift = tk.gathered_low_rank(prefix, prefix.mT, prefix, INDEX, backend=backend)
        return *sums.values(), *pair, one, *norms, shift

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = everything()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(lowered, expected, strict=True))


def test_fake_accumulators_share_no_memory():
    mode = FakeTensorMode()
    cross, gram = (mode.from_tensor(torch.zeros(3, 3)) for _ in range(2))
    rows = mode.from_tensor(torch.ones(4, 3))
    assert tk.accumulate(cross, rows, rows, gram=gram) is None


def test_triton_kept_from_being_imported_is_not_there(monkeypatch):
    def refuse(name, package=None):
        raise ModuleNotFoundError(f"no {name}")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    library.unavailable.cache_clear()
    assert tk.available_backends("accumulate", "cpu")["triton"] == "triton is not installed"
    library.unavailable.cache_clear()


def test_the_interpreter_as_triton_ships_it_is_not_trusted_with_bfloat16():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = """
import torch
import thought_kernels as tk
rows, heads = torch.ones(4, 3).bfloat16(), torch.ones(1, 1, 2, 16).bfloat16()
cross = torch.zeros(3, 3)
for call in (
    lambda: tk.accumulate(cross, rows.float(), rows.float(), weights=rows[:, 0], backend="triton"),
    lambda: tk.accumulate_pair(cross, rows, rows.float(), backend="triton"),
    lambda: tk.paired_attention(heads, heads, heads, (heads[0], heads[0]), backend="triton"),
    lambda: tk.shared_prefix_attention(heads, heads, heads, [], torch.tensor([-1]), backend="triton"),
    lambda: tk.gathered_low_rank(heads[0], heads[0].float().mT, heads[0].float(), torch.tensor([0]), backend="triton"),
    lambda: tk.rms_norm_pair(rows.float(), rows.float(), rows[0], eps=0.0, backend="triton"),
):
    try:
        call()
    except ValueError as error:
        print(error)
assert not cross.any()
tk.accumulate(cross, rows.half(), rows.half(), backend="triton")
assert (cross == 4).all()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    reason = "backend must support this call on cpu, got 'triton'; Triton's interpreter computes wrongly in bfloat16"
    names = ("accumulate", "accumulate_pair", *RETURNING[2:], *RETURNING[1::-1])
    assert refusals == [f"{name}: {reason}" for name in names]


def test_a_missing_cuda_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    listed = tk.available_backends("accumulate", "cuda")
    assert listed["triton"] == listed["cuda"] == "torch sees no CUDA device"
    assert listed["cpp"] == "it runs on CPU tensors, not cuda"


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that an extension with CUDA kernels meets a GPU; returns what sets the two."""

    def pretend(cuda_code: str, capability: tuple[int, int]) -> dict[str, str | None]:
        monkeypatch.setattr(library, "extension", lambda: SimpleNamespace(cuda_code=cuda_code))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: True)
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
        library.unavailable.cache_clear()
        return tk.available_backends("accumulate", "cuda:0")

    yield pretend
    library.unavailable.cache_clear()


@pytest.mark.parametrize(
    ("cuda_code", "capability", "runs"),
    [
        ("sm_80,sm_90", (8, 0), True),
        ("sm_80,sm_90", (8, 9), True),  # machine code serves later chips of its generation
        ("sm_86,sm_90", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_80,compute_80", (12, 0), True),  # PTX serves all later ones
        ("compute_90,sm_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("compute_90a,sm_90a", (10, 0), False),  # an architecture's own instructions serve no other
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("", (9, 0), False),
    ],
)
def test_cuda_kernels_must_have_been_built_for_the_gpu(gpu, cuda_code, capability, runs):
    reason = gpu(cuda_code, capability)["cuda"]
    assert (reason is None) == runs
    chosen = library.choose("accumulate", None, torch.device("cuda", 0))
    assert (chosen == "cuda") == runs
    if cuda_code and not runs:
        number = f"{capability[0]}.{capability[1]}"
        assert f"was built for {cuda_code}, and this device has compute capability {number}" in reason


def test_float64_accumulators_on_a_gpu_are_left_to_the_reference(gpu):
    gpu("sm_90", (9, 0))
    cross = torch.zeros(3, 3, dtype=torch.float64)
    unsupported = functools.partial(accumulate_module._unsupported, cross, cross, cross, None)
    assert library.choose("accumulate", None, torch.device("cuda", 0), unsupported) == "reference"
    with pytest.raises(ValueError, match="^accumulate: backend must support this call on cuda, got 'cuda'; it accumul"):
        library.choose("accumulate", "cuda", torch.device("cuda", 0), unsupported)
