"""ThoughtAccumulator: the right sums in the right place, whole or in parts, and refusals that change nothing."""

from __future__ import annotations

import io
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tolerances import FLOORS, largest
from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator

D = 6


def rows(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta, activation = (torch.randn(*shape, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return delta, activation, torch.rand(*shape, generator=generator, dtype=torch.float64)


def filled(seeds: range | tuple[int, ...], **options: Any) -> ThoughtAccumulator:
    accumulator = ThoughtAccumulator(**{"dtype": torch.float64, **options})
    for seed in seeds:
        delta, activation, weights = rows(seed, 2, 3)
        accumulator.update(seed % 2, "attention", delta, activation, weights)
        accumulator.update(1, "residual", delta, None, weights)
    return accumulator


def snapshot(accumulator: ThoughtAccumulator) -> dict[str, Tensor]:
    return accumulator.state_dict()["sums"]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], floors: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert largest(a[name] - b[name]) <= floors * FLOORS[a[name].dtype] * largest(b[name]), name


def test_sums_are_those_of_the_definition() -> None:
    accumulator = ThoughtAccumulator(normalization="norm", dtype=torch.float64)
    parts = [rows(seed, 2, 3) for seed in range(3)]
    for delta, activation, weights in parts:
        accumulator.update(4, "mlp", delta, activation, weights)
        accumulator.update(4, "residual", delta, None, weights)
    delta, activation, w = (torch.cat([part[i].flatten(0, 1) for part in parts]) for i in range(3))
    scaled = w / activation.norm(dim=-1)
    energy = delta.square().sum(-1)
    sums, residual = accumulator.sums(4, "mlp"), accumulator.sums(4, "residual")
    expected = {
        "cross": (scaled[:, None] * delta).T @ activation,
        "gram": (scaled[:, None] * activation).T @ activation,
        "delta_sum": w @ delta,
        "activation_sum": w @ activation,
        "moments": torch.stack([w.sum(), scaled.sum(), (scaled * energy).sum(), torch.tensor(18.0)]),
    }
    assert_same(sums.tensors(), expected, floors=10)
    assert residual.cross is residual.gram is residual.activation_sum is None
    moments = torch.stack([w.sum(), w.sum(), (w * energy).sum(), torch.tensor(18.0)])
    assert_same(residual.tensors(), {"delta_sum": expected["delta_sum"], "moments": moments}, floors=10)
    assert accumulator.layers == (4,)
    assert accumulator.sites == ("mlp", "residual")
    assert accumulator.sums(3, "mlp") is None


@pytest.mark.parametrize("site", ["attention", "residual"])
def test_padding_may_hold_anything(site: str) -> None:
    delta, activation, weights = rows(0, 7)
    weights[2] = weights[5] = 0
    clean, padded = ThoughtAccumulator(), ThoughtAccumulator()
    clean.update(0, site, delta, activation, weights)
    delta[2], activation[5] = math.nan, math.inf
    padded.update(0, site, delta, activation, weights)
    assert_same(snapshot(padded), snapshot(clean))
    assert padded.sums(0, site).moments[3] == 5


def test_half_precision_rows_are_summed_in_float32() -> None:
    delta, activation, _ = rows(0, 4)
    accumulator = ThoughtAccumulator()
    accumulator.update(0, "attention", delta.float(), activation.bfloat16())
    accumulator.update(0, "residual", delta.bfloat16(), None)
    assert {tensor.dtype for tensor in accumulator.sums(0, "attention").tensors().values()} == {
        torch.float32,
        torch.float64,
    }
    expected = delta.bfloat16().double().sum(0)
    assert largest(accumulator.sums(0, "residual").delta_sum - expected) <= 4 * FLOORS[torch.float32] * 4
    assert largest(accumulator.sums(0, "attention").cross) > 0


@pytest.mark.parametrize("site", ["attention", "residual"])
def test_an_empty_set_of_rows_adds_nothing(site: str) -> None:
    accumulator = ThoughtAccumulator()
    accumulator.update(0, site, torch.empty(0, D), torch.empty(0, D), torch.empty(0))
    assert not any(tensor.any() for tensor in snapshot(accumulator).values())
    with pytest.raises(ValueError, match=r"at least one row .* \(block 0, site"):
        accumulator.solve("ridge")


@pytest.mark.parametrize("site", ["attention", "residual"])
def test_sums_and_patches_do_not_belong_to_the_mode_that_made_them(site: str) -> None:
    delta, activation, weights = rows(0, 4)
    accumulator = ThoughtAccumulator()
    with torch.inference_mode():
        accumulator.update(0, site, delta * 1, activation * 1, weights * 1)
        patch = accumulator.solve("ridge")
    accumulator.update(0, site, delta.requires_grad_(), activation.requires_grad_(), weights)
    for tensor in (*accumulator.sums(0, site).tensors().values(), *patch.entries[0, site].tensors().values()):
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def _nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[1] = math.nan
    return changed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d, a, w: (0, "mlp", _nan(d), a, w),
            ValueError,
            "delta must be finite .* in 1 of 4 rows, first in row 1",
        ),
        (lambda d, a, w: (0, "mlp", d, a / 0, w), ValueError, "activation must be finite .*block 0, site 'mlp'"),
        (lambda d, a, w: (0, "residual", _nan(d), None, None), ValueError, "delta must be finite"),
        (lambda d, a, w: (0, "mlp", d, a, _nan(w)), ValueError, "weights must be finite and not negative"),
        (lambda d, a, w: (0, "mlp", d, a, -w), ValueError, "weights must be finite and not negative"),
        (lambda d, a, w: (0, "mlp", d, a, w[:3]), ValueError, r"leading shape \[4\] of delta, got \[3\]"),
        (lambda d, a, w: (0, "mlp", d, a[:3], w), ValueError, "activation must have shape"),
        (lambda d, a, w: (0, "mlp", d[:, :5], a[:, :5], w), ValueError, "width 6 as before, got 5"),
        (lambda d, a, w: (0, "mlp", d, None, w), TypeError, "activation must be a floating-point tensor, got NoneType"),
        (
            lambda d, a, w: (0, "mlp", d.long(), a, w),
            TypeError,
            "delta must be a floating-point tensor, got torch.int64",
        ),
        (lambda d, a, w: (0, "mlp", d, a, w.long()), TypeError, "weights must be a floating-point tensor"),
        (
            lambda d, a, w: (0, "head", d, a, w),
            ValueError,
            "site must be one of attention, mlp, .*, got 'head'",
        ),
        (lambda d, a, w: (-1, "mlp", d, a, w), ValueError, "layer must be a 0-based block index, got -1"),
    ],
)
def test_refused_rows_change_nothing(change: Any, error: type[Exception], message: str) -> None:
    accumulator = ThoughtAccumulator()
    accumulator.update(0, "mlp", *rows(0, 4))
    before = snapshot(accumulator)
    with pytest.raises(error, match=message):
        accumulator.update(*change(*rows(1, 4)))
    assert_same(snapshot(accumulator), before)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="normalization must be one of none, norm, squared_norm, got 'l2'"):
        ThoughtAccumulator(normalization="l2")
    with pytest.raises(ValueError, match="dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        ThoughtAccumulator(dtype=torch.bfloat16)


def test_parts_merge_into_the_whole() -> None:
    whole, left, right = filled(range(5)), filled((0, 2)), filled((1, 3, 4))
    kept = snapshot(right)
    left.merge(right)
    assert_same(snapshot(left), snapshot(whole), floors=10)
    left.update(1, "residual", rows(9, 3)[0], None)
    assert_same(snapshot(right), kept)  # nothing is shared with what was merged


def test_what_is_no_state_or_accumulator_is_refused() -> None:
    accumulator = filled((0,))
    before = snapshot(accumulator)
    for wrong in (None, 3, []):
        with pytest.raises(ValueError, match=r"^load_state_dict: state must be a state_dict, got"):
            accumulator.load_state_dict(wrong)
    with pytest.raises(TypeError, match=r"^merge: other must be a ThoughtAccumulator, got int"):
        accumulator.merge(3)
    assert_same(snapshot(accumulator), before)


def test_unlike_parts_do_not_merge() -> None:
    accumulator = filled((0,))
    before = snapshot(accumulator)
    wide = ThoughtAccumulator(dtype=torch.float64)
    wide.update(1, "mlp", torch.ones(2, D), torch.ones(2, D))
    wide.update(0, "attention", torch.ones(2, D + 1), torch.ones(2, D + 1))
    cases = [
        (ThoughtAccumulator(normalization="norm", dtype=torch.float64), "normalization none, got norm"),
        (ThoughtAccumulator(), "dtype torch.float64, got torch.float32"),
        (wide, "width 6, got 7; block 0, site 'attention'"),
        (accumulator, "another accumulator"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            accumulator.merge(other)
        assert_same(snapshot(accumulator), before)


def test_state_survives_a_file_without_pickle() -> None:
    accumulator = filled(range(3))
    file = io.BytesIO()
    torch.save(accumulator.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    restored = ThoughtAccumulator(dtype=torch.float64)
    restored.load_state_dict(state)
    assert_same(snapshot(restored), snapshot(accumulator))
    restored.update(0, "attention", *rows(7, 3))
    accumulator.load_state_dict(state)  # the update above did not write into the state
    assert_same(snapshot(accumulator), snapshot(filled(range(3))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), "version must be 1, got 2"),
        (lambda s: s.update(normalization="norm"), "normalization must be 'none', got 'norm'"),
        (lambda s: s.update(dtype="float32"), "dtype must be 'float64', got 'float32'"),
        (lambda s: s["sums"].pop("0.attention.gram"), "block 0, site 'attention'"),
        (lambda s: s["sums"].update({"0.attention.extra": torch.zeros(2)}), "block 0, site 'attention'"),
        (lambda s: s["sums"].update({"0.attention.cross": torch.zeros(2, 2)}), "block 0, site 'attention'"),
        (lambda s: s["sums"].update({"1.residual.delta_sum": torch.zeros(D)}), "block 1, site 'residual'"),
        (lambda s: s["sums"].update({"0.head.cross": torch.zeros(2)}), "named block.site.field, got '0.head.cross'"),
        (lambda s: s["sums"].update({"0.mlp.cross": "x"}), "a str"),
        (lambda s: s.update(sums={"sums": 3}), "named block.site.field, got 'sums', a int"),
        (lambda s: s.update(sums=3), "sums must be tensors by name, got int"),
        (lambda s: s.pop("sums"), "sums must be tensors by name, got NoneType"),
        (
            lambda s: s["sums"].update({"².attention.cross": torch.zeros(D, D)}),
            "got '².attention",
        ),
        (lambda s: s["sums"].update({"00.attention.cross": torch.zeros(D, D)}), "got '00.att"),
        (lambda s: s["sums"]["0.attention.gram"].fill_(math.nan), "finite, got NaN or an infinity in gram; block 0"),
    ],
)
def test_a_damaged_state_is_refused(change: Any, message: str) -> None:
    accumulator = filled(range(3))
    before = snapshot(accumulator)
    state = accumulator.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        accumulator.load_state_dict(state)
    assert_same(snapshot(accumulator), before)


def test_solve_covers_the_chosen_blocks_and_sites() -> None:
    accumulator = filled(range(4))
    patch = accumulator.solve(
        "ridge", ridge=0.3, scale={"attention": 2.0, "residual": 0.5}, provenance={"pairing": "x"}
    )
    assert list(patch.entries) == [(0, "attention"), (1, "attention"), (1, "residual")]
    assert patch.provenance | {"estimator": "ridge", "ridge": 0.3, "pairing": "x"} == patch.provenance
    plain = accumulator.solve("ridge", ridge=0.3, layers=[1], sites=["attention"])
    assert list(plain.entries) == [(1, "attention")]
    assert torch.equal(patch.matrix(1, "attention"), 2 * plain.matrix(1, "attention"))
    assert accumulator.solve("mean").provenance["ridge"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 5]}, r"layers must be among those accumulated, \[0, 1\], got \[0, 5\]"),
        ({"layers": []}, "layers must be among those accumulated"),
        ({"sites": ["mlp"]}, r"sites must be among those accumulated, \['attention', 'residual'\], got \['mlp'\]"),
        ({"scale": {"attention": 1.0}}, "scale must have an entry for each of"),
        ({"scale": {"attention": 1.0, "residual": 1.0, "head": 1.0}}, "scale must have an entry for each of"),
        ({"scale": {"attention": 1.0, "residual": math.nan}}, "scale must be finite"),
        ({"ridge": 0}, "ridge must be finite and positive"),
    ],
)
def test_solve_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(range(4)).solve("ridge", **options)


def test_solve_needs_rows() -> None:
    with pytest.raises(ValueError, match="accumulator must hold rows, got none"):
        ThoughtAccumulator().solve("ridge")


def _join(rank: int, file: Path) -> None:
    store = dist.FileStore(str(file), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))


def _second_process(file: Path) -> None:
    torch.set_num_threads(1)
    _join(1, file)
    try:
        filled((1, 3, 4)).all_reduce()
        unlike = ThoughtAccumulator(normalization="norm")
        try:
            unlike.all_reduce()
        except ValueError:
            return
        raise AssertionError("the second process saw no difference")
    finally:
        dist.destroy_process_group()


def test_all_reduce_adds_the_rows_of_every_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group must be initialised"):
        filled((0,)).all_reduce()
    process = multiprocessing.get_context("spawn").Process(target=_second_process, args=(tmp_path / "store",))
    process.start()
    _join(0, tmp_path / "store")
    try:
        # This process has no rows of block 1's attention, which the other one has.
        accumulator = filled((0, 2))
        accumulator.all_reduce()
        with pytest.raises(ValueError, match="processes must share normalization and dtype"):
            ThoughtAccumulator().all_reduce()
    finally:
        dist.destroy_process_group()
        process.join(60)
    assert process.exitcode == 0
    assert_same(snapshot(accumulator), snapshot(filled(range(5))), floors=10)
