"""The GPU backends of both attentions and the norm pair: Triton's interpreter here, compiled where there is a GPU.

Their contract is tested for the other backends in the operators' own files; these tests repeat it at sizes that the
interpreter finishes, in every dtype, with tensor descriptors and with pointers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thought_kernels as tk
from tests.attention_condition import difference_error, output_error
from tests.dense_attention import dense_attention, normal
from tests.test_paired_attention import condition_of_output, dense_pair, inputs, share_of
from tests.test_rms_norm_pair import pair_errors, two_norms
from tests.test_shared_prefix_attention import dense_rows
from tests.test_shared_prefix_attention import inputs as shared_inputs
from tests.tolerances import DIFFERENCE, FLOORS, SOFTMAX_WEIGHTS, allowed_error, largest

pytest.importorskip("triton")

from thought_kernels.triton import attention_plan, paired_attention, shared_prefix_attention

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [name for name in ("triton", "cuda") if tk.available_backends("rms_norm_pair", DEVICE)[name] is None]


def to_device(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(DEVICE)
    return type(argument)(map(to_device, argument)) if isinstance(argument, (tuple, list)) else argument


def paired(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    moved = {name: to_device(argument) for name, argument in {**arguments, **options}.items()}
    without, delta = tk.paired_attention(**moved, backend="triton")
    assert without.dtype == arguments["query"].dtype and delta.dtype == torch.float32
    assert without.transpose(1, 2).is_contiguous() and delta.transpose(1, 2).is_contiguous()
    return without.cpu(), delta.cpu()


def shared(arguments: dict[str, Any], **options: Any) -> Tensor:
    moved = {name: to_device(argument) for name, argument in {**arguments, **options}.items()}
    output = tk.shared_prefix_attention(**moved, backend="triton")
    assert output.transpose(1, 2).is_contiguous()
    return output.cpu()


def assert_pair_matches(arguments: dict[str, Any], **options: Any) -> None:
    dtype = arguments["query"].dtype
    without, delta = paired(arguments, **options)
    true_without, true_delta = dense_pair(**arguments, **options)
    plain_without, plain_delta = dense_pair(**arguments, **options, dtype=torch.float32)
    computed = {**options, "dtype": torch.float32, "weight_error": SOFTMAX_WEIGHTS[dtype]}
    condition = largest(condition_of_output(arguments, **computed))
    allowed = allowed_error(true_without, plain_without.to(dtype), condition=condition)
    assert largest(without.double() - true_without) <= allowed
    floor = allowed_error(true_without, plain_without)
    condition = largest(difference_error(**arguments, **computed))
    assert largest(delta.double() - true_delta) <= max(floor, allowed_error(true_delta, plain_delta, None, condition))


def assert_output_matches(arguments: dict[str, Any], output_dtype: torch.dtype | None = None, **options: Any) -> None:
    dtype = output_dtype or arguments["query"].dtype
    truth = dense_rows(**arguments, **options)
    plain = dense_rows(**arguments, **options, dtype=torch.float32).to(dtype)
    computed = {**options, "dtype": torch.float32, "weight_error": SOFTMAX_WEIGHTS[dtype]}
    condition = largest(dense_rows(**arguments, **computed, function=output_error))
    allowed = allowed_error(truth, plain, condition=condition)
    output = shared(arguments, output_dtype=output_dtype, **options)
    assert output.dtype == dtype
    assert largest(output.double() - truth) <= allowed


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the loads of older GPUs, then with those of Hopper and later."""
    if request.param == "pointers":
        monkeypatch.setattr(attention_plan, "describable", lambda tensor: False)


@pytest.mark.parametrize("groups, block_m", [(8, 64), (16, 64), (17, 128), (1000, 128)])
def test_tiles_are_small_where_all_run_at_once(groups: int, block_m: int) -> None:
    chip = {"processors": 132, "capability": (9, 0), "descriptors": True, "shared_memory": 232_448}
    chosen = attention_plan.choose_tiles(torch.bfloat16, 256, 512, groups=groups, **chip)
    assert (chosen.block_m, chosen.block_n) == (block_m, 32)


def test_no_batch_is_too_large_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's grids have 2^31 − 1 programs along the first axis, and 65,535 along the others."""
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments, **options: None

    rows = torch.zeros(70_000, 2, 3, 1)
    prefix = (torch.zeros(1, 1, 1),) * 2
    monkeypatch.setattr(paired_attention, "paired_attention_kernel", Recorder())
    monkeypatch.setattr(shared_prefix_attention, "shared_prefix_attention_kernel", Recorder())
    paired_attention.launch(rows, rows[:, :1], rows[:, :1], prefix, None, None, None, 1.0, None)
    index = torch.zeros(70_000, dtype=torch.long)
    shared_prefix_attention.launch(rows, rows[:, :1], rows[:, :1], [prefix], index, None, None, 1.0, None, rows.dtype)
    assert grids == [(70_000, 1)] * 2


@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_both_outputs_equal_the_dense_softmax(data: st.DataObject) -> None:
    draw = data.draw
    groups, length = draw(st.sampled_from([1, 2, 3]), "groups"), draw(st.integers(1, 40), "length")
    arguments = inputs(
        draw(st.integers(1, 2), "batch"),
        groups * draw(st.integers(1, 2), "key heads"),
        groups,
        length,
        draw(st.sampled_from([1, 16, 24]), "head_dim"),
        draw(st.integers(0, 40), "prefix"),
        draw(st.none() | st.integers(0, 20), "header"),
        draw(st.sampled_from(DTYPES), "dtype"),
        draw(st.integers(0, 1000), "seed"),
    )
    sizes = st.lists(st.integers(0, length), min_size=len(arguments["query"]), max_size=len(arguments["query"]))
    lengths = draw(st.none() | sizes, "lengths")
    assert_pair_matches(
        arguments,
        lengths=None if lengths is None else torch.tensor(lengths),
        window=draw(st.none() | st.integers(1, 50), "window"),
        scale=draw(st.none() | st.just(0.3), "scale"),
        softcap=draw(st.none() | st.just(1.5), "softcap"),
    )


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("window", [None, 40], ids=["full", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_beyond_one_tile(dtype: torch.dtype, window: int | None) -> None:
    # 520 rows of 130 tokens and 4 heads; 131 and 67 prefix keys, none of them a multiple of a tile.
    arguments = inputs(1, 4, 4, 130, 32, 131, 67, dtype)
    assert_pair_matches(arguments, lengths=torch.tensor([97]), window=window)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    assert_pair_matches(inputs(1, 2, 2, 20, head_dim, 20, 3, dtype))
    assert_output_matches(shared_inputs([1, 0], (5, 3), 2, 2, 20, head_dim, dtype))


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("head_dim", [40, 64])
def test_float32_features_in_strips_and_at_once(head_dim: int) -> None:
    assert_pair_matches(inputs(1, 2, 2, 20, head_dim, 20, 3, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mass", [1e-1, 1e-3, 1e-6])
def test_delta_keeps_its_accuracy_as_the_prefix_fades(dtype: torch.dtype, mass: float) -> None:
    arguments = inputs(1, 4, 2, 24, 32, 4, None, dtype)
    # Feature 0 is 1 in the queries and the score log(mass) in the prefix's keys; the others move scores little.
    arguments["query"].mul_(0.25)[..., 0] = 1
    arguments["key"][..., 0] = 0
    arguments["with_prefix"][0][..., 0] = math.log(mass) * 32**0.5
    _, delta = paired(arguments)
    _, truth = dense_pair(**arguments)
    assert 0.1 * mass < largest(truth) < 50 * mass
    allowed = difference_error(**arguments, dtype=torch.float32, weight_error=SOFTMAX_WEIGHTS[dtype])
    assert share_of(delta, truth, allowed) <= 1
    assert share_of(allowed, torch.zeros(()), truth) < 1e-3 + 10 * SOFTMAX_WEIGHTS[dtype]


def header_of_mass(mass: float, instruction: float, dtype: torch.dtype) -> dict[str, Any]:
    """A header with most of the softmax mass in both contexts, and an instruction of little mass behind it."""
    arguments = inputs(1, 4, 2, 24, 32, 12, 4, dtype)
    arguments["query"].mul_(0.25)[..., 0] = 1
    arguments["key"][..., 0] = 0
    header_key, header_value = arguments["without_prefix"]
    key, value = arguments["with_prefix"]
    key[:, :4], value[:, :4] = header_key, header_value
    key[..., 0] = math.log(instruction / (1 - mass) / 8 * 12) * 32**0.5
    for part in (key[:, :4], header_key):
        part[..., 0] = math.log(mass / (1 - mass) / 4 * 12) * 32**0.5
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_keeps_its_accuracy_beside_a_heavy_header(dtype: torch.dtype) -> None:
    arguments = header_of_mass(0.9, 1e-3, dtype)
    _, delta = paired(arguments)
    truth_without, truth = dense_pair(**arguments)
    assert largest(truth) < 0.02 * largest(truth_without)
    # The instruction's weights are rounded to dtype; were the header's too, they would err by a hundred times as much.
    allowed = difference_error(**arguments, dtype=torch.float32, weight_error=SOFTMAX_WEIGHTS[dtype], header=4)
    assert share_of(delta, truth, allowed) <= 1
    assert share_of(allowed, torch.zeros(()), truth) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_prefixes_differ_by_nothing(dtype: torch.dtype) -> None:
    arguments = inputs(prefix=20, dtype=dtype)
    _, delta = paired({**arguments, "without_prefix": arguments["with_prefix"]})
    assert (delta == 0).all()


def test_delta_is_exactly_zero_where_the_window_hides_both_prefixes() -> None:
    _, delta = paired(inputs(length=8, prefix=5, header=3), window=4)
    assert (delta[:, :, 3:] == 0).all() and (delta[:, :, :3] != 0).any(-1).all()


def test_an_absent_prefix_equals_one_without_keys() -> None:
    arguments = inputs(prefix=4)
    empty = tuple(part[:, :0] for part in arguments["with_prefix"])
    outputs, again = paired(arguments), paired({**arguments, "without_prefix": empty})
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    _, nothing = paired({**arguments, "with_prefix": empty})
    assert (nothing == 0).all()


@pytest.mark.usefixtures("loads")
def test_padding_may_hold_anything_and_returns_zeros() -> None:
    pair, rows = inputs(batch=3, length=7, header=2), shared_inputs([0, 1, -1], length=7)
    lengths = torch.tensor([7, 0, 3], dtype=torch.int32)
    clean = (*paired(pair, lengths=lengths), shared(rows, lengths=lengths))
    for arguments in (pair, rows):
        for name in ("query", "key", "value"):
            for row, length in enumerate(lengths):
                arguments[name][row, :, length:] = torch.nan
    for part, before in zip((*paired(pair, lengths=lengths), shared(rows, lengths=lengths)), clean, strict=True):
        assert torch.equal(part, before)
        assert (part[1] == 0).all() and (part[2, :, 3:] == 0).all()


def test_rows_do_not_depend_on_their_batch() -> None:
    arguments = inputs(batch=2, length=33, head_dim=64, prefix=40, header=7)
    whole = paired(arguments)
    alone = {name: arguments[name][1:] for name in ("query", "key", "value")}
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, paired({**arguments, **alone}), strict=True))


def test_strided_inputs_are_read_in_place_or_copied() -> None:
    arguments = inputs(header=3)
    layouts = {
        "heads last": lambda part: (
            part.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)
        ),
        "every other column": lambda part: part.repeat_interleave(2, -1)[..., ::2],
        "odd offset": lambda part: torch.cat([part.flatten()[:1], part.flatten()])[1:].view(part.shape),
    }
    expected = paired(arguments)
    for change in layouts.values():
        strided = {n: tuple(map(change, a)) if isinstance(a, tuple) else change(a) for n, a in arguments.items()}
        assert all(torch.equal(a, b) for a, b in zip(paired(strided), expected, strict=True))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}, {"prefix": 0}], ids=str)
def test_empty_sizes(sizes: dict[str, int]) -> None:
    assert_pair_matches(inputs(**sizes))


def test_scores_too_large_to_exponentiate() -> None:
    assert_pair_matches(inputs(header=3), scale=60.0)


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_rows_equal_the_dense_softmax(data: st.DataObject) -> None:
    draw = data.draw
    prefixes = tuple(draw(st.lists(st.integers(0, 40), max_size=3), "prefixes"))
    index = draw(st.lists(st.integers(-1, len(prefixes) - 1), min_size=1, max_size=3), "index")
    dtype, length = draw(st.sampled_from(DTYPES), "dtype"), draw(st.integers(1, 40), "length")
    lengths = draw(st.none() | st.lists(st.integers(0, length), min_size=len(index), max_size=len(index)), "lengths")
    assert_output_matches(
        shared_inputs(index, prefixes, 4, draw(st.sampled_from([1, 2, 4]), "groups"), length, 24, dtype),
        lengths=None if lengths is None else torch.tensor(lengths),
        window=draw(st.none() | st.integers(1, 50), "window"),
        softcap=draw(st.none() | st.just(1.5), "softcap"),
        output_dtype=draw(st.sampled_from([None, torch.float32]), "output_dtype"),
    )


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("window", [None, 40], ids=["full", "window"])
def test_rows_beyond_one_tile(window: int | None) -> None:
    assert_output_matches(shared_inputs([1, -1, 0], (131, 67), 4, 4, 70, 32), window=window)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_output_of_narrow_inputs_is_accurate_to_float32(dtype: torch.dtype) -> None:
    # SOFTMAX_WEIGHTS allows nothing for float32: weights must not be rounded to the inputs' dtype.
    arguments = shared_inputs([1, -1, 0], (35, 7), 4, 4, 40, 32, dtype)
    assert_output_matches(arguments, torch.float32, lengths=torch.tensor([40, 21, 33]))


def test_a_prefix_does_not_see_its_neighbours() -> None:
    arguments = shared_inputs([0], (5, 3))
    alone = shared(arguments)
    arguments["prefixes"][1][1].fill_(torch.nan)
    assert torch.equal(shared(arguments), alone)


def test_joined_prefixes_of_rows_that_are_no_multiple_of_16_bytes() -> None:
    arguments = shared_inputs([0, 1], (5, 3), 4, 2, 6, 20, torch.float16)
    for name in ("key", "value"):  # these rows are aligned, and those of the joined prefixes are not
        arguments[name] = torch.nn.functional.pad(arguments[name], (0, 4))[..., :20]
    assert_output_matches(arguments)


@pytest.mark.parametrize("backend", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_norm_pairs(dtype: torch.dtype, size: float, backend: str) -> None:
    for shape in ((3, 5, 67), (2, 1), (0, 8), (1, 5376)):
        x, delta = normal(*shape, seed=0, dtype=dtype), normal(*shape, seed=1) * size
        weight, residual = normal(shape[-1], seed=2, dtype=dtype), normal(*shape, seed=3, dtype=dtype)
        call = partial(
            tk.rms_norm_pair, *map(to_device, (x, delta, weight)), eps=1e-6, weight_offset=1.0, backend=backend
        )
        (first, change), (summed, same_change) = call(), call(residual=to_device(residual))
        truth, true_change = two_norms(x, delta, weight, 1e-6, 1.0)
        assert (first.dtype, change.dtype) == (dtype, torch.float32)
        first_error, change_error = map(largest, pair_errors(x, delta, weight, 1e-6, 1.0, dtype=torch.float32))
        assert largest(first.cpu().double() - truth) <= first_error + FLOORS[dtype] * largest(truth)
        assert torch.equal(same_change, change) and summed.dtype == dtype
        two_calls = residual + first.cpu()
        if dtype == torch.float32 and backend == "triton":  # whose compiler may leave out the rounding between the two
            assert largest(summed.cpu().double() - two_calls.double()) <= FLOORS[dtype] * largest(two_calls)
        else:
            assert torch.equal(summed.cpu(), two_calls)
        allowed = FLOORS[torch.float64] * largest(truth) + change_error
        assert largest(change.cpu().double() - true_change) <= allowed


@pytest.mark.parametrize("backend", NORMS)
def test_norm_pairs_of_strided_rows_and_zero_rows(backend: str) -> None:
    wide, weight = to_device(normal(4, 2, 60, seed=2)), to_device(normal(30, seed=1))
    wide[1] = 0
    x, delta = wide[:, 1, ::2], wide[:, 0, ::2]
    for residual in (None, delta):
        call = partial(tk.rms_norm_pair, weight=weight, eps=1e-6, backend=backend)
        strided = call(x, delta, residual=residual)
        packed = call(x.clone(), delta.clone(), residual=None if residual is None else residual.clone())
        assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
        assert (strided[0][1] == 0).all() and (strided[1][1] == 0).all()


def test_what_it_cannot_do_is_refused_by_name_and_left_to_others_otherwise() -> None:
    wide = {name: to_device(a) for name, a in inputs(head_dim=272).items()}
    with pytest.raises(ValueError, match=r"paired_attention: backend must support .* it takes D up to 256, not 272"):
        tk.paired_attention(**wide, backend="triton")
    double = shared_inputs([0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shared_prefix_attention: backend .* it computes in float32"):
        tk.shared_prefix_attention(**{n: to_device(a) for n, a in double.items()}, backend="triton")
    x = to_device(torch.zeros(2, 8200))
    with pytest.raises(ValueError, match="rms_norm_pair: backend .* rows of at most 8192"):
        tk.rms_norm_pair(x, x, x[0], eps=1e-6, backend="triton")
    assert tk.rms_norm_pair(x, x, x[0], eps=1e-6)[0].shape == x.shape


@pytest.mark.parametrize("header", [None, 3], ids=["no_header", "header"])
def test_one_prefix_for_all_is_paired_attention(header: int | None) -> None:
    # The header enters the outputs through one more merge of states, never through a copy of its keys.
    arguments = inputs(2, 4, 2, 20, 16, 9, header, torch.float32)
    without, delta = paired(arguments)
    own = [arguments[name] for name in ("query", "key", "value")]
    both = dense_attention(*own, arguments["with_prefix"])
    assert largest((without + delta).double() - both) <= DIFFERENCE * largest(both)
