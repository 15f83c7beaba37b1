"""The choice of a backend, with and without the compiled extension."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import thought_kernels as tk
from thought_kernels.ops import accumulate as accumulate_module
from thought_kernels.ops import library

CPU = torch.device("cpu")


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
    unsupported = functools.partial(accumulate_module._unsupported, cross)
    assert library.choose("accumulate", None, torch.device("cuda", 0), unsupported) == "reference"
    with pytest.raises(ValueError, match="^accumulate: backend must support this call on cuda, got 'cuda'; it accumul"):
        library.choose("accumulate", "cuda", torch.device("cuda", 0), unsupported)
