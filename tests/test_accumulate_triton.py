"""What only the Triton backend of accumulate has: tiles, splits and batches of programs, and its CPU interpreter.

The contract itself is tested for every backend in test_accumulate.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import FLOORS, allowed_error, largest, rounding

triton = pytest.importorskip("triton")

import interpreter  # noqa: E402
import triton.language as tl  # noqa: E402

from thought_kernels.triton import accumulate as module  # noqa: E402
from thought_kernels.triton import accumulate_plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launch(cross, delta, activation, **options):
    names = ("weights", "gram", "delta_sum", "activation_sum", "moments")
    defaults = {"pair": False, "normalization": "none", "coefficient": 1.0, **dict.fromkeys(names)}
    module.launch(cross, delta, activation, **{**defaults, **options})


def assert_products(rows: int, d_out: int, d_in: int, dtype: torch.dtype, **options) -> None:
    """cross and gram from random rows against float64, held to the error of float32 products."""
    generator = torch.Generator().manual_seed(rows)
    delta = torch.randn(rows, d_out, generator=generator).to(dtype)
    activation = torch.randn(rows, d_in, generator=generator).to(dtype)
    cross, gram = torch.zeros(d_out, d_in, device=DEVICE), torch.zeros(d_in, d_in, device=DEVICE)
    launch(cross, delta.to(DEVICE), activation.to(DEVICE), gram=gram, **options)
    for actual, left in ((cross, delta), (gram, activation)):
        truth, plain = left.double().T @ activation.double(), left.float().T @ activation.float()
        condition = rounding(rows, FLOAT32) * largest(left.double().abs().T @ activation.double().abs())
        assert largest(actual.cpu().double() - truth) <= allowed_error(truth, plain, condition=condition)


@pytest.mark.parametrize("dtype, d_out, d_in", [(FLOAT32, 100, 150), (FLOAT16, 40, 150), (BFLOAT16, 150, 40)], ids=str)
def test_several_tiles(dtype, d_out, d_in):
    # Unscaled half-precision products are exact in float32, so even they are held to float32's error.
    assert_products(rows=70, d_out=d_out, d_in=d_in, dtype=dtype)


def test_several_batches_of_tiles(monkeypatch):
    plan = accumulate_plan.plan
    sizes = {"rows": 40, "d_out": 100, "d_in": 200, "gram": True}
    monkeypatch.setattr(module, "plan", lambda *dtypes, **options: plan(*dtypes, **{**options, "processors": 1}))
    chosen = module.plan(FLOAT32, FLOAT32, **sizes, scaled=False)
    assert (chosen.batch, chosen.tiles) == (4, 2 * 4 + 4 * 5 // 2)  # the last batch is smaller than the others
    assert_products(sizes["rows"], sizes["d_out"], sizes["d_in"], FLOAT32)


def test_split_rows(monkeypatch):
    rows = 4 * 128 + 3
    plan = accumulate_plan.plan
    monkeypatch.setattr(module, "plan", lambda *dtypes, **options: plan(*dtypes, **options)._replace(
        splits=3, rows_per_split=192))  # fmt: skip
    assert_products(rows, 30, 20, FLOAT32)


@pytest.mark.parametrize("d", [1, 64, 640, 1152, 5376])
@pytest.mark.parametrize("rows", [1, 63, 1000, 16384, 1_000_000])
def test_a_plan_covers_the_call_within_bounded_scratch(rows, d):
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for gram in (False, True):
            plan = accumulate_plan.plan(
                dtype, dtype, rows=rows, d_out=d, d_in=d, gram=gram, scaled=True, processors=132
            )
            assert plan.splits * plan.rows_per_split >= rows > (plan.splits - 1) * plan.rows_per_split
            assert plan.splits == 1 or plan.rows_per_split % plan.block_k == 0
            assert plan.tiles_in * plan.block >= d
            assert plan.batch * plan.splits <= 4 * 132


def test_few_tiles_are_split_and_many_are_not():
    def splits(rows: int, d: int) -> int:
        sizes = {"rows": rows, "d_out": d, "d_in": d, "gram": True, "scaled": True}
        return accumulate_plan.plan(BFLOAT16, BFLOAT16, **sizes, processors=132).splits

    assert splits(16384, 128) > 30  # 2 tiles for 132 processors
    assert splits(16384, 640) >= 3  # 40 tiles
    assert splits(16384, 5376) == 1
    assert splits(64, 640) == 1  # not worth the scratch


def test_float16_factors_outside_its_range():
    # w / ‖a‖² is about 1e-9 here and δ w / ‖a‖² would be 0 in float16, whose smallest number is 6e-8.
    generator = torch.Generator().manual_seed(0)
    delta = (torch.randn(48, 8, generator=generator) * 1e-2).half()
    activation = (torch.randn(48, 64, generator=generator) * 2000).half()
    weights = torch.full((48,), 0.1)
    cross = torch.zeros(8, 64, device=DEVICE)
    launch(cross, delta.to(DEVICE), activation.to(DEVICE), weights=weights.to(DEVICE), normalization="squared_norm")
    factor = weights.double() / activation.double().square().sum(1)
    scaled = delta.double() * factor[:, None]
    assert largest(scaled) < 6e-8
    truth = scaled.T @ activation.double()
    # A correctly rounded operand errs by half of float16's eps in each of 48 terms.
    assert largest(cross.cpu().double() - truth) <= FLOORS[FLOAT16] * largest(
        scaled.abs().T @ activation.double().abs()
    )


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20])
def test_w_over_a_squared_norm_may_leave_float32_where_the_products_do_not(size, dtype):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(24, 8, generator=generator).to(dtype)
    activation = (torch.randn(24, 12, generator=generator) * size).to(dtype)
    cross, gram = torch.zeros(8, 12, device=DEVICE), torch.zeros(12, 12, device=DEVICE)
    launch(cross, delta.to(DEVICE), activation.to(DEVICE), gram=gram, normalization="squared_norm")
    factor = activation.double().square().sum(1, keepdim=True).reciprocal()
    for actual, left in ((cross, delta.double()), (gram, activation.double())):
        truth = (left * factor).T @ activation.double()
        # One operand is rounded, by half of eps; the other is only moved to another binade.
        operand = torch.finfo(dtype).eps / 2 + rounding(24, FLOAT32) + rounding(12, FLOAT32)
        allowed = operand * largest((left * factor).abs().T @ activation.double().abs())
        assert largest(actual.cpu().double() - truth) <= allowed


def test_infinite_norm_is_not_dropped_silently():
    activation = torch.ones(4, 8, device=DEVICE)
    activation[2] = float("inf")
    cross = torch.zeros(8, 8, device=DEVICE)
    launch(cross, activation, activation, normalization="squared_norm")
    assert cross.isnan().all()


def test_float64_accumulators_are_refused_and_left_alone():
    cross, x = torch.zeros(4, 4, dtype=torch.float64, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="cross must be float32 for the triton backend"):
        launch(cross, x, x)
    assert not cross.any()


@triton.jit
def _round_trip(source, target, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(target + i, tl.load(source + i).to(tl.bfloat16).to(tl.float32))


@triton.jit
def _bfloat16_arithmetic(left, right, target, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(target + i, tl.load(left + i) * tl.load(right + i) + tl.load(left + i))


def test_bfloat16_is_correct_where_these_tests_run():
    # Ties to even in both directions, numbers that round into the next binade, infinities and NaN.
    special = [1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e-40, -0.0]
    source = torch.cat([torch.randn(64 - len(special)), torch.tensor(special)]).to(DEVICE)
    target = torch.full_like(source, torch.nan)
    _round_trip[(1,)](source, target, 64)
    assert torch.equal(target.nan_to_num(nan=7.0), source.bfloat16().float().nan_to_num(nan=7.0))

    left, right = (torch.randn(64, device=DEVICE).bfloat16() for _ in range(2))
    result = torch.zeros(64, dtype=BFLOAT16, device=DEVICE)
    _bfloat16_arithmetic[(1,)](left, right, result, 64)
    truth = left.double() * right.double() + left.double()
    assert largest(result.double() - truth) <= 2 * FLOORS[BFLOAT16] * largest(left.double().abs() * 4)


def test_the_interpreters_bfloat16_bits_are_torchs():
    values = torch.randn(1000).mul(torch.randn(1000).exp())
    bits = interpreter.float32_to_bits(values.numpy())
    assert np.array_equal(bits, values.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(interpreter.bits_to_float32(bits), values.bfloat16().float().numpy())
