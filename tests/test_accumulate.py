"""accumulate and accumulate_pair: every backend against sums written out in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOORS, allowed_error, largest, rounding
from torch import Tensor

import thought_kernels as tk

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NORMALIZATIONS = ("none", "norm", "squared_norm")
NAMES = ("cross", "gram", "delta_sum", "activation_sum", "moments")
GPU = torch.cuda.is_available()


class Place(NamedTuple):
    """A backend and the device it is tested on; without a GPU, Triton runs in its interpreter."""

    backend: str
    device: str


PLACES = [
    Place("reference", "cpu"),
    Place("cpp", "cpu"),
    Place("triton", "cuda" if GPU else "cpu"),
    Place("reference", "cuda"),
    Place("cuda", "cuda"),
]
CPU_PLACES = PLACES[:2]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request) -> Place:
    if request.param.device == "cuda" and not GPU:
        pytest.skip("no GPU on this machine")
    return request.param


@pytest.fixture(params=CPU_PLACES, ids="-".join)
def cpu_place(request) -> Place:
    return request.param


class Call(NamedTuple):
    """The arguments of one call, on the CPU, in the inputs' dtypes."""

    delta: Tensor  # [..., d_out], or the with-context activation
    activation: Tensor  # [..., d_in]
    weights: Tensor | None
    normalization: str
    coefficient: float
    pair: bool


def random_call(rows=(3, 23), d_out=37, d_in=29, dtype=FLOAT32, normalization="norm", pair=False, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    d_out = d_in if pair else d_out
    call = Call(
        delta=torch.randn((*rows, d_out), generator=generator).to(dtype),
        activation=torch.randn((*rows, d_in), generator=generator).to(dtype),
        weights=torch.rand(size=rows, generator=generator) - 0.2,
        normalization=normalization,
        coefficient=-1.75,
        pair=pair,
    )
    return call._replace(**changes)


def accumulators(call: Call, dtype=FLOAT32, device="cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    d_out, d_in = call.delta.shape[-1], call.activation.shape[-1]
    shapes = ((d_out, d_in), (d_in, d_in), (d_out,), (d_in,), (4,))
    return {
        name: torch.randn(shape, generator=generator, dtype=FLOAT64 if name == "moments" else dtype).to(device)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def run(call: Call, sums: dict[str, Tensor], place: Place) -> None:
    function = tk.accumulate_pair if call.pair else tk.accumulate
    weights = None if call.weights is None else call.weights.to(place.device)
    outputs = {name: tensor for name, tensor in sums.items() if name != "cross"}
    function(
        sums["cross"],
        call.delta.to(place.device),
        call.activation.to(place.device),
        weights=weights,
        normalization=call.normalization,
        coefficient=call.coefficient,
        backend=place.backend,
        **outputs,
    )


def written_out(call: Call, initial: dict[str, Tensor], dtype=FLOAT64, rounded=None) -> dict[str, Tensor]:
    """The sums in ``dtype`` with whole-batch products; the scaled operand is rounded once to ``rounded``, if given."""
    a = call.activation.reshape(-1, call.activation.shape[-1]).to(dtype)
    d = call.delta.reshape(-1, call.delta.shape[-1]).to(dtype)
    d = d - a if call.pair else d
    w = torch.ones(len(a), dtype=dtype) if call.weights is None else call.weights.reshape(-1).to(dtype)
    a, d, w = a[w != 0], d[w != 0], w[w != 0]
    norm = {"none": torch.ones(len(a), dtype=dtype), "norm": a.norm(dim=1), "squared_norm": a.square().sum(1)}
    v = torch.where(norm[call.normalization] == 0, 0, w / norm[call.normalization])
    scaled_a, scaled_d = a * v[:, None], d * v[:, None]
    if rounded is not None:
        scaled_a, scaled_d = scaled_a.to(rounded).to(dtype), scaled_d.to(rounded).to(dtype)
    change = {
        "cross": scaled_d.T @ a,
        "gram": scaled_a.T @ a,
        "delta_sum": d.T @ w,
        "activation_sum": a.T @ w,
        "moments": torch.stack([w.sum(), v.sum(), (v * d.square().sum(1)).sum(), w.new_tensor(float(len(w)))]).double(),
    }
    factor = {name: 1.0 if name == "moments" else call.coefficient for name in NAMES}
    return {name: (initial[name].to(change[name].dtype) + factor[name] * change[name]) for name in NAMES}


def conditions(call: Call, initial: dict[str, Tensor], dtype=FLOAT32, rounded=None) -> dict[str, float]:
    """The error that any order of additions in ``dtype`` may make of each sum, from its terms' absolute values.

    A row's factor takes a sum over its elements before the rows are added. An operand rounded to ``rounded`` errs by
    half of its eps in every term of the two products.
    """
    difference = call.delta.double() - call.activation.double() if call.pair else call.delta
    positive = call._replace(
        delta=difference.abs(),
        activation=call.activation.abs(),
        weights=None if call.weights is None else call.weights.abs(),
        coefficient=abs(call.coefficient),
        pair=False,
    )
    sizes = written_out(positive, {name: tensor.abs() for name, tensor in initial.items()})
    rows, d_in = call.activation.shape[:-1].numel(), call.activation.shape[-1]
    relative = rounding(rows + 1, dtype) + rounding(max(d_in, call.delta.shape[-1]), dtype)
    operand = 0 if rounded is None else torch.finfo(rounded).eps / 2
    return {name: (relative + operand * (name in ("cross", "gram"))) * largest(size) for name, size in sizes.items()}


def assert_right(call: Call, place: Place, dtype=FLOAT32, outputs=NAMES) -> None:
    """Runs the call and holds every sum to twice the error of plain PyTorch, or to what its condition allows."""
    initial = accumulators(call, dtype)
    sums = {name: initial[name].clone().to(place.device) for name in outputs}
    before = call.delta.clone(), call.activation.clone()
    run(call, sums, place)
    half = call.activation.dtype if call.activation.dtype in (BFLOAT16, FLOAT16) else call.delta.dtype
    rounded = half if place.backend in ("triton", "cuda") and half in (BFLOAT16, FLOAT16) else None
    truth, plain = written_out(call, initial), written_out(call, initial, dtype, rounded)
    condition = conditions(call, initial, dtype, rounded)
    for name, actual in sums.items():
        error = largest(actual.cpu().double() - truth[name])
        assert error <= allowed_error(truth[name], plain[name], dtype, condition[name]), name  # also False for NaN
    for after, saved in zip((call.delta, call.activation), before, strict=True):
        assert torch.equal(after.nan_to_num(), saved.nan_to_num())


@pytest.mark.parametrize("pair", [False, True], ids=["delta", "pair"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_agrees_with_float64(place, dtype, normalization, pair):
    assert_right(random_call(dtype=dtype, normalization=normalization, pair=pair), place)


@pytest.mark.parametrize("pair", [False, True], ids=["delta", "pair"])
def test_float64_accumulators_hold_float64_products(cpu_place, pair):
    assert_right(random_call(dtype=FLOAT64, pair=pair), cpu_place, FLOAT64)
    # Integers: every product and sum is exact in float64, and far beyond float32's 24 bits.
    generator = torch.Generator().manual_seed(2)
    delta, activation = (torch.randint(-(2**20), 2**20, (50, 7), generator=generator).double() for _ in range(2))
    cross, gram = torch.zeros(7, 7, dtype=FLOAT64), torch.zeros(7, 7, dtype=FLOAT64)
    function = tk.accumulate_pair if pair else tk.accumulate
    function(cross, delta, activation, gram=gram, backend=cpu_place.backend)
    assert torch.equal(cross, (delta - activation if pair else delta).T @ activation)
    assert torch.equal(gram, activation.T @ activation)


def test_pair_forms_the_difference_in_the_accumulators_precision(place):
    # Both numbers are bfloat16; their difference needs ten bits, and bfloat16 has eight.
    without, with_context = torch.full((4, 8), 0.75, dtype=BFLOAT16), torch.full((4, 8), 256.0, dtype=BFLOAT16)
    cross, delta_sum = torch.zeros(8, 8, device=place.device), torch.zeros(8, device=place.device)
    arguments = cross, with_context.to(place.device), without.to(place.device)
    tk.accumulate_pair(*arguments, delta_sum=delta_sum, backend=place.backend)
    assert torch.equal(delta_sum.cpu(), torch.full((8,), 4 * 255.25))


@pytest.mark.parametrize("outputs", [("cross",), ("cross", "delta_sum"), ("cross", "moments"), ("cross", "gram")])
@pytest.mark.parametrize("scaling", ["weights", "norm", "nothing"])
def test_every_output_is_optional(place, outputs, scaling):
    call = random_call(rows=(20,), d_out=9, d_in=11, dtype=BFLOAT16, normalization="none")
    if scaling != "weights":
        call = call._replace(weights=None, normalization="norm" if scaling == "norm" else "none")
    assert_right(call, place, outputs=outputs)


def test_a_dtype_for_each_input(place):
    call = random_call()
    assert_right(call._replace(activation=call.activation.to(BFLOAT16), weights=call.weights.to(FLOAT64)), place)
    assert_right(call._replace(delta=call.delta.to(FLOAT16), weights=call.weights.to(BFLOAT16)), place)


def test_more_rows_than_a_block(cpu_place):
    call = random_call(rows=(5000,), d_out=9, d_in=200)
    call.weights[call.weights < 0.1] = 0  # blocks of scattered rows
    call.weights[2100:4300] = 1  # and one of consecutive rows
    assert_right(call, cpu_place)
    assert_right(call._replace(weights=None, normalization="none"), cpu_place)


def test_more_rows_than_a_block_and_sums_too_large_to_be_kept_aside(cpu_place):
    assert_right(random_call(rows=(1000,), d_out=3, d_in=2600), cpu_place, dtype=FLOAT64)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instructions, dtype):
    # Several tiles in both directions, several blocks and part of another.
    call = random_call(rows=(600,), d_out=330, d_in=345, dtype=BFLOAT16)
    initial = accumulators(call, dtype)
    sums = {name: tensor.clone() for name, tensor in initial.items()}
    arguments = call.delta, call.activation, False, call.weights, 1, call.coefficient
    outputs = [sums[name] for name in NAMES]
    try:
        torch.ops.thought_kernels.accumulate_cpp(outputs[0], *arguments, *outputs[1:], instructions)
    except ValueError as error:
        if "instructions must be" not in str(error):
            raise
        pytest.skip(str(error))
    truth, plain = written_out(call, initial), written_out(call, initial, dtype)
    condition = conditions(call, initial, dtype)
    for name, actual in sums.items():
        allowed = allowed_error(truth[name], plain[name], dtype, condition[name])
        assert largest(actual.double() - truth[name]) <= allowed, name
    change = sums["gram"].double() - initial["gram"].double()
    assert largest(change - change.mT) <= 4 * FLOORS[dtype] * largest(truth["gram"])


def test_padding_may_hold_anything(place):
    call = random_call(rows=(4, 16))
    call.weights[:, 11:] = 0
    call.delta[:, 11:], call.activation[:, 11:] = torch.nan, torch.inf
    for normalization in NORMALIZATIONS:
        assert_right(call._replace(normalization=normalization), place)


def test_zero_rows_and_no_rows(place):
    call = random_call(rows=(40,))
    call.activation[7:20] = 0
    for normalization in NORMALIZATIONS:
        assert_right(call._replace(normalization=normalization), place)
        for rows in ((0,), (2, 0, 3)):
            empty = random_call(rows=rows, normalization=normalization)
            sums = accumulators(empty, device=place.device)
            expected = {name: tensor.clone() for name, tensor in sums.items()}
            run(empty, sums, place)
            assert all(torch.equal(sums[name], expected[name]) for name in NAMES)
    call.weights.zero_()
    assert_right(call, place)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("normalization", ["norm", "squared_norm"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_zero_activation_hides_its_delta_from_what_is_normalised(backend, normalization, value):
    place = Place(backend, "cuda" if GPU and backend == "triton" else "cpu")
    call = random_call(rows=(40,), normalization=normalization)
    call.activation[7], call.delta[7] = 0, value
    spoilt, expected = (accumulators(call, device=place.device) for _ in range(2))
    run(call, spoilt, place)
    call.delta[7] = 0
    run(call, expected, place)
    for name in ("cross", "gram", "activation_sum", "moments"):
        assert torch.equal(spoilt[name], expected[name]), name
    assert not spoilt["delta_sum"].isfinite().any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("what", ["delta", "activation", "weights"])
def test_nan_spoils_the_sums_that_its_row_enters_and_no_others(place, what, normalization):
    call = random_call(rows=(40,), normalization=normalization)
    getattr(call, what)[7].flatten()[:1].fill_(torch.nan)  # one feature of one row, or its weight
    sums = accumulators(call, device=place.device)
    run(call, sums, place)
    truth = written_out(call, accumulators(call))
    assert any(tensor.isnan().any() for tensor in truth.values())
    for name in NAMES:
        assert torch.equal(sums[name].cpu().isnan(), truth[name].isnan()), name


def test_accumulators_made_in_inference_mode_can_be_added_to_outside_of_it(place):
    call = random_call()
    with torch.inference_mode():
        made_inside = accumulators(call, device=place.device)
    expected = accumulators(call, device=place.device)
    run(call, made_inside, place)
    run(call, expected, place)
    assert all(torch.equal(made_inside[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("normalization", ["norm", "squared_norm"])
@pytest.mark.parametrize("size", [1e-24, 1e-20, 1.0, 1e18, 3e18])
def test_tiny_and_huge_rows(place, size, normalization):
    # ‖a‖² of such rows and 1/‖a‖² may lie outside float32 while δ aᵀ/‖a‖² does not.
    call = random_call(rows=(30,), normalization=normalization)
    call = call._replace(delta=call.delta * size, activation=call.activation * size)
    sums = {"cross": torch.zeros(37, 29, device=place.device)}
    run(call, sums, place)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in accumulators(call, FLOAT64).items()}
    truth = written_out(call, zeros)["cross"]
    # Plain PyTorch in float32 is no measure here, since its norms overflow.
    allowed = conditions(call, zeros)["cross"] + FLOORS[FLOAT32] * largest(truth)
    assert largest(sums["cross"].cpu().double() - truth) <= allowed


def test_leading_dimensions_without_a_common_stride(cpu_place):
    call = random_call(rows=(40, 90), d_out=6, d_in=5)
    strided = call._replace(
        delta=call.delta[:, 3:83], activation=call.activation[:, 3:83], weights=call.weights[:, 3:83]
    )
    assert_right(strided, cpu_place)
    assert_right(strided._replace(activation=call.activation[:, 3:83].mT.contiguous().mT), cpu_place)


def test_accumulators_of_any_strides(place):
    call = random_call(rows=(50,), d_out=29, d_in=29)
    initial = accumulators(call)
    buffer = torch.zeros(29, 58, device=place.device)
    sums = {
        "cross": buffer[:, :29],  # side by side with gram in one buffer
        "gram": buffer[:, 29:],
        "delta_sum": torch.zeros(29, 3, device=place.device)[:, 1],
        "activation_sum": torch.zeros(29, 2, device=place.device)[:, 0],
        "moments": torch.zeros(4, 2, dtype=FLOAT64, device=place.device)[:, 1],
    }
    for name, tensor in sums.items():
        tensor.copy_(initial[name])
    run(call, sums, place)
    columns = {name: tensor.to(place.device) for name, tensor in initial.items()}
    columns["cross"] = columns["cross"].mT.contiguous().mT
    run(call, columns, place)
    initial = accumulators(call)
    truth, plain = written_out(call, initial), written_out(call, initial, FLOAT32)
    condition = conditions(call, initial)
    for name in NAMES:
        allowed = allowed_error(truth[name], plain[name], FLOAT32, condition[name])
        assert largest(sums[name].cpu().double() - truth[name]) <= allowed, name
        assert largest(columns[name].cpu().double() - truth[name]) <= allowed, name


def test_repeats_bit_for_bit_and_gram_stays_symmetric(place):
    call = random_call(rows=(150,), d_in=350 if place.backend in ("reference", "cpp") else 40)
    runs = []
    for _ in range(2):
        sums = {name: torch.zeros_like(tensor) for name, tensor in accumulators(call, device=place.device).items()}
        run(call, sums, place)
        runs.append(sums)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in NAMES)
    assert torch.equal(runs[0]["gram"], runs[0]["gram"].mT)


def test_bits_do_not_depend_on_the_number_of_threads():
    call, threads, runs = random_call(rows=(700,), d_out=350, d_in=330), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(accumulators(call))
            run(call, runs[-1], Place("cpp", "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in NAMES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    place=st.sampled_from(CPU_PLACES),
    rows=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    dtypes=st.tuples(*[st.sampled_from([FLOAT32, BFLOAT16, FLOAT16, FLOAT64])] * 2),
    wide=st.booleans(),
    normalization=st.sampled_from(NORMALIZATIONS),
    pair=st.booleans(),
    weighted=st.booleans(),
    holes=st.integers(0, 2**16),
    strides=st.sampled_from(["plain", "columns", "every other", "repeated"]),
    seed=st.integers(0, 2**16),
)
def test_any_shapes_strides_and_holes(
    place, rows, d_out, d_in, dtypes, wide, normalization, pair, weighted, holes, strides, seed
):
    call = random_call(rows, d_out, d_in, normalization=normalization, pair=pair, seed=seed)
    generator = torch.Generator().manual_seed(holes)
    padding = torch.rand(size=rows, generator=generator) < 0.3
    zero = torch.rand(size=rows, generator=generator) < 0.3
    call.activation[zero] = 0
    if weighted:
        call.weights[padding] = 0
        call.delta[padding] = torch.nan

    def restride(tensor: Tensor) -> Tensor:
        if strides == "columns":
            return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        if strides == "every other":
            return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]
        if strides == "repeated" and tensor.dim() > 1:
            return tensor[:1].expand_as(tensor) if len(tensor) else tensor
        return tensor

    call = call._replace(
        delta=restride(call.delta.to(dtypes[0])),
        activation=restride(call.activation.to(dtypes[1])),
        weights=call.weights if weighted else None,
    )
    if strides == "repeated" and weighted and call.delta.isnan().any():
        call = call._replace(delta=call.delta.nan_to_num())
    assert_right(call, place, FLOAT64 if wide else FLOAT32)


def test_the_operator_itself_takes_no_rows():
    cross = torch.ones(3, 5)
    torch.ops.thought_kernels.accumulate_cpp(
        cross, torch.empty(0, 3), torch.empty(0, 5), False, None, 0, 1.0, None, None, None, None, None
    )
    assert torch.equal(cross, torch.ones(3, 5))
