"""rms_norm_pair on every backend of this machine, against two float64 norms subtracted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dense_attention import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOORS, allowed_error, largest, rounding
from torch import Tensor
from torch.library import opcheck

import thought_kernels as tk

BACKENDS = [name for name in ("reference", "cpp") if tk.available_backends("rms_norm_pair", "cpu")[name] is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float, dtype: torch.dtype = torch.float64) -> Tensor:
    x = x.to(dtype)
    return (weight.to(dtype) + weight_offset) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def two_norms(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    first = norm(x, weight, eps, weight_offset)
    return first, norm(x.double() + delta.double(), weight, eps, weight_offset) - first


def pair_errors(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The errors allowed to both outputs computed in ``dtype``, before they are rounded to their own.

    With m the mean square and c = mean(δ (2x + δ)) its change, 1/√m errs by half of m's relative error, and the change
    of 1/√m, −c / (√m √m' (√m + √m')), by c's error, whose terms cancel. A term takes 4 more steps of eps.
    """
    x, delta, gain = x.double(), delta.double(), weight.double() + weight_offset
    sums, steps = rounding(x.shape[-1], dtype), 4 * torch.finfo(dtype).eps
    r, shifted = (1 / (row.square().mean(-1, keepdim=True) + eps).sqrt() for row in (x, x + delta))
    slope = (r * shifted).square() / (r + shifted)
    change = (delta * (2 * x + delta)).mean(-1, keepdim=True)
    size = (delta.abs() * (2 * x.abs() + delta.abs())).mean(-1, keepdim=True)
    first = (sums / 2 + steps) * (gain * x * r).abs()
    terms = (gain * delta).abs() * shifted * (sums / 2 + steps)
    terms = terms + (gain * x).abs() * slope * ((sums + steps) * size + (2 * sums + steps) * change.abs())
    return first, terms


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_both_outputs_equal_two_norms(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3), "leading"), draw(st.sampled_from([1, 5, 32, 67]), "d"))
    dtypes = [draw(st.sampled_from(DTYPES), name) for name in ("x", "delta", "weight")]
    seed = draw(st.integers(0, 1000), "seed")
    x, delta = (normal(*shape, seed=seed + n, dtype=dtypes[n]) for n in (0, 1))
    delta = delta * draw(st.sampled_from([1.0, 0.01]), "size of delta")
    weight = normal(shape[-1], seed=seed + 2, dtype=dtypes[2])
    options = {"eps": 1e-6, "weight_offset": draw(st.sampled_from([0.0, 1.0]), "weight_offset")}
    residual = draw(st.sampled_from([None, normal(*shape, seed=seed + 3, dtype=dtypes[0])]), "residual")
    first, change = tk.rms_norm_pair(x, delta, weight, **options, residual=residual, backend=backend)
    assert (first.dtype, change.dtype) == (x.dtype, delta.dtype)
    assert first.shape == change.shape == x.shape
    truth, true_change = two_norms(x, delta, weight, **options)
    wide = torch.float64 if torch.float64 in dtypes[:2] else torch.float32
    plain = norm(x, weight, **options, dtype=wide).to(x.dtype)
    added = torch.zeros_like(x) if residual is None else residual
    first_error, change_error = pair_errors(x, delta, weight, **options, dtype=wide)
    sum_ = added.double() + truth
    allowed = allowed_error(sum_, added + plain, condition=largest(first_error) + FLOORS[x.dtype] * largest(sum_))
    assert largest(first.double() - sum_) <= allowed
    # The float64 truth is itself a subtraction.
    floor = FLOORS[torch.float64] * largest(truth) + largest(change_error) + FLOORS[delta.dtype] * largest(true_change)
    subnormal = torch.finfo(delta.dtype).smallest_normal * torch.finfo(delta.dtype).eps
    assert largest(change.double() - true_change) <= floor + subnormal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-12])
def test_the_change_keeps_its_accuracy_as_delta_fades(backend: str, size: float) -> None:
    x, weight = normal(32, 64, seed=0), normal(64, seed=1)
    delta = normal(32, 64, seed=2) * size
    _, change = tk.rms_norm_pair(x, delta, weight, eps=1e-6, backend=backend)
    # At size 1e-12 float64 norms cancel too, so the truth is the derivative of the norm there.
    if size > 1e-9:
        _, truth = two_norms(x, delta, weight, 1e-6)
    else:
        _, truth = torch.func.jvp(lambda row: norm(row, weight, 1e-6, 0.0), (x.double(),), (delta.double(),))
    _, allowed = pair_errors(x, delta, weight, 1e-6, dtype=torch.float32)
    assert largest(allowed) < 1e-4 * largest(truth)
    assert largest(change - truth) <= largest(allowed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 67, 640])
def test_the_fused_sum_is_that_of_two_calls_bit_for_bit(backend: str, dtype: torch.dtype, d: int) -> None:
    x, weight, residual = (normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(7, d), (d,), (7, d)]))
    for delta in (normal(7, d, seed=3), normal(7, d, seed=3, dtype=torch.float64)):
        call = partial(tk.rms_norm_pair, x, delta, weight, eps=1e-6, weight_offset=1.0, backend=backend)
        (plain, change), (first, same_change) = call(), call(residual=residual)
        assert torch.equal(first, residual + plain)
        assert torch.equal(same_change, change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_may_lie_anywhere_and_is_left_alone(backend: str) -> None:
    x, delta, weight = normal(2, 3, 8, seed=0), normal(2, 3, 8, seed=1), normal(8, seed=2)
    wide = normal(2, 8, 3, 2, seed=3)
    for residual in (x, delta, x[:, :1].expand_as(x), x.flip(0), wide[..., 0].mT, wide[0, 0, 0, 0].expand_as(x)):
        before = [tensor.clone() for tensor in (x, delta, residual)]
        call = partial(tk.rms_norm_pair, x, delta, weight, eps=1e-6, backend=backend)
        (first, change), (packed, packed_change) = call(residual=residual), call(residual=residual.clone())
        assert torch.equal(first, packed) and torch.equal(change, packed_change)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, delta, residual), strict=True))
        assert first.is_contiguous() and first.data_ptr() not in (x.data_ptr(), residual.data_ptr())


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_of_both_outputs_is_written(backend: str) -> None:
    x, weight = normal(3, 40, seed=0), normal(40, seed=1)
    for residual in (None, x):
        for output in tk.rms_norm_pair(x, normal(3, 40, seed=2), weight, eps=1e-6, residual=residual, backend=backend):
            assert output.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_lie_as_the_fake_kernel_says(backend: str) -> None:
    x, delta = (normal(4, 5, 6, seed=seed).transpose(0, 2) for seed in (0, 1))
    inputs = x, delta, normal(4, seed=2)
    fake_inputs = x.to("meta"), delta.to("meta"), torch.zeros(4, device="meta")
    for with_residual in (False, True):
        outputs = tk.rms_norm_pair(*inputs, eps=1e-6, residual=x if with_residual else None, backend=backend)
        fakes = tk.rms_norm_pair(*fake_inputs, eps=1e-6, residual=fake_inputs[0] if with_residual else None)
        assert [output.stride() for output in outputs] == [fake.stride() for fake in fakes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_and_strided_rows(backend: str) -> None:
    x, weight = normal(4, 30, seed=0), normal(30, seed=1)
    x[1] = 0
    delta = torch.zeros_like(x)
    first, change = tk.rms_norm_pair(x, delta, weight, eps=1e-6, backend=backend)
    assert (first[1] == 0).all() and (change == 0).all()
    wide = normal(4, 2, 60, seed=2)
    strided = tk.rms_norm_pair(wide[:, 1, ::2], wide[:, 0, ::2], weight, eps=1e-6, backend=backend)
    packed = tk.rms_norm_pair(wide[:, 1, ::2].clone(), wide[:, 0, ::2].clone(), weight, eps=1e-6, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


def test_equals_the_norm_of_gemma_3() -> None:
    modeling = pytest.importorskip("transformers.models.gemma3.modeling_gemma3", reason="transformers is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        module = modeling.Gemma3RMSNorm(48, eps=1e-6).to(dtype)
        module.weight.data = normal(48, seed=1, dtype=dtype)
        x = normal(5, 48, seed=2, dtype=dtype)
        first, _ = tk.rms_norm_pair(
            x, torch.zeros_like(x), module.weight, eps=1e-6, weight_offset=1.0, backend="reference"
        )
        assert torch.equal(first, module(x))


def test_opcheck() -> None:
    x, weight = normal(3, 8, seed=0, dtype=torch.bfloat16), normal(8, seed=1)
    operator = torch.ops.thought_kernels.rms_norm_pair.default
    opcheck(operator, (x, x.float(), weight), {"eps": 1e-6})
    opcheck(operator, (x, x.float(), weight), {"eps": 1e-6, "weight_offset": 1.0})
    opcheck(operator, (x, x.float(), weight), {"eps": 1e-6, "residual": x + 1})


def test_the_operator_is_the_documented_function() -> None:
    documented = (
        "(Tensor x, Tensor delta, Tensor weight, *, float eps, float weight_offset=0., Tensor? residual=None,"
        " str? backend=None)"
    )
    schema = str(torch.ops.thought_kernels.rms_norm_pair.default._schema)
    assert schema == f"thought_kernels::rms_norm_pair{documented} -> (Tensor, Tensor)"


def test_compiles_without_a_graph_break() -> None:
    x, weight = normal(3, 8, seed=0), normal(8, seed=1)
    function = torch.compile(tk.rms_norm_pair, backend="aot_eager", fullgraph=True)
    for residual in (None, x + 1):
        results = (f(x, x, weight, eps=1e-6, residual=residual) for f in (function, tk.rms_norm_pair))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ROWS = torch.zeros(3, 8)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x type": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x dtype": ({"x": ROWS.int()}, TypeError, "x must be float64"),
    "x empty": ({"x": torch.zeros(3, 0)}, ValueError, r"x must be \[\.\.\., d\] with d ≥ 1"),
    "delta shape": ({"delta": torch.zeros(1, 8)}, ValueError, "delta must have x's shape"),
    "delta dtype": ({"delta": ROWS.long()}, TypeError, "delta must be float64"),
    "residual type": ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "residual dtype": ({"residual": ROWS.double()}, TypeError, "residual must have x's dtype torch.float32, got"),
    "residual shape": ({"residual": ROWS[:1]}, ValueError, r"residual must have x's shape \[3, 8\], got \[1, 8\]"),
    "residual device": ({"residual": ROWS.to("meta")}, ValueError, "residual must be on x's device cpu, got meta"),
    "sparse residual": ({"residual": ROWS.to_sparse()}, TypeError, "residual must be a tensor that is dense"),
    "weight shape": ({"weight": torch.zeros(7)}, ValueError, r"weight must be \[d\] with d = 8, got \[7\]"),
    "sparse": ({"x": ROWS.to_sparse()}, TypeError, "x must be a tensor that is dense, got torch.sparse_coo"),
    "sparse weight": ({"weight": ROWS[0].to_sparse()}, TypeError, "weight must be a tensor that is dense"),
    "endless eps": ({"eps": 10**400}, ValueError, "eps must be finite and at least 0, got 1000"),
    "eps": ({"eps": -1e-6}, ValueError, "eps must be finite and at least 0"),
    "eps type": ({"eps": None}, TypeError, "eps must be a number"),
    "offset": ({"weight_offset": float("inf")}, ValueError, "weight_offset must be finite"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must support this call on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changed, error, pattern = BAD[case]
    with pytest.raises(error, match=f"^rms_norm_pair: .*{pattern}"):
        tk.rms_norm_pair(**{"x": ROWS, "delta": ROWS, "weight": torch.zeros(8), "eps": 1e-6, **changed})
