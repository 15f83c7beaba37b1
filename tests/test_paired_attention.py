"""paired_attention on every backend of this machine, against one dense float64 softmax over concatenated keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_condition import difference_error, output_error
from dense_attention import dense_attention, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DIFFERENCE, allowed_error, largest
from torch import Tensor
from torch.library import opcheck

import thought_kernels as tk

BACKENDS = [name for name in ("reference", "cpp") if tk.available_backends("paired_attention", "cpu")[name] is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    length: int = 6,
    head_dim: int = 16,
    prefix: int = 5,
    header: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    key_heads = heads // groups
    pair = lambda count, base: tuple(normal(key_heads, count, head_dim, seed=base + i, dtype=dtype) for i in (0, 1))  # noqa: E731
    return {
        "query": normal(batch, heads, length, head_dim, seed=10 * seed, dtype=dtype),
        "key": normal(batch, key_heads, length, head_dim, seed=10 * seed + 1, dtype=dtype),
        "value": normal(batch, key_heads, length, head_dim, seed=10 * seed + 2, dtype=dtype),
        "with_prefix": pair(prefix, 10 * seed + 3),
        "without_prefix": None if header is None else pair(header, 10 * seed + 5),
    }


def dense_pair(
    query: Tensor, key: Tensor, value: Tensor, with_prefix: Any, without_prefix: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    without = dense_attention(query, key, value, without_prefix, **options)
    return without, dense_attention(query, key, value, with_prefix, **options) - without


def condition_of_output(arguments: dict[str, Any], **options: Any) -> Tensor:
    own = (arguments["query"], arguments["key"], arguments["value"])
    return output_error(*own, arguments["without_prefix"], **options)


def relative_error(delta: Tensor, truth: Tensor) -> float:
    """The worst query's error, relative to the largest entry of its own true difference."""
    return share_of(delta, truth, truth)


def share_of(delta: Tensor, truth: Tensor, size: Tensor) -> float:
    """The worst query's error, relative to the largest entry of its own ``size``."""
    return ((delta - truth).abs().amax(-1) / size.abs().amax(-1)).max().item()


def assert_matches(arguments: dict[str, Any], backend: str | None, **options: Any) -> None:
    assert_outputs_match(tk.paired_attention(**arguments, **options, backend=backend), arguments, **options)


def assert_outputs_match(outputs: tuple[Tensor, Tensor], arguments: dict[str, Any], **options: Any) -> None:
    dtype = arguments["query"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    without, delta = outputs
    true_without, true_delta = dense_pair(**arguments, **options)
    plain_without, plain_delta = dense_pair(**arguments, **options, dtype=wide)
    assert without.dtype == dtype and delta.dtype == wide
    assert without.transpose(1, 2).is_contiguous() and delta.transpose(1, 2).is_contiguous()
    condition = largest(condition_of_output(arguments, **options, dtype=wide))
    allowed = allowed_error(true_without, plain_without.to(dtype), condition=condition)
    assert largest(without.double() - true_without) <= allowed
    # The plain difference errs by the rounding of both outputs, so the outputs' size sets its floor and ours.
    floor = allowed_error(true_without, plain_without)
    condition = largest(difference_error(**arguments, **options, dtype=wide))
    assert largest(delta.double() - true_delta) <= max(floor, allowed_error(true_delta, plain_delta, None, condition))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_both_outputs_equal_the_dense_softmax(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 4]), "groups")
    length = draw(st.integers(1, 40), "length")
    batch = draw(st.integers(1, 3), "batch")
    arguments = inputs(
        batch,
        groups * draw(st.integers(1, 2), "key heads"),
        groups,
        length,
        draw(st.sampled_from([1, 8, 24]), "head_dim"),
        draw(st.integers(0, 40), "prefix"),
        draw(st.none() | st.integers(0, 20), "header"),
        draw(st.sampled_from(DTYPES), "dtype"),
        draw(st.integers(0, 1000), "seed"),
    )
    lengths = draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch), "lengths")
    assert_matches(
        arguments,
        backend,
        lengths=None if lengths is None else torch.tensor(lengths),
        window=draw(st.none() | st.integers(1, 50), "window"),
        scale=draw(st.none() | st.just(0.3), "scale"),
        softcap=draw(st.none() | st.just(1.5), "softcap"),
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 40], ids=["full", "window"])
def test_sizes_beyond_one_tile(backend: str, window: int | None) -> None:
    lengths = torch.tensor([150, 97])
    assert_matches(inputs(2, 4, 4, 150, 72, 131, 67), backend, lengths=lengths, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("header", [None, 3], ids=["no_header", "header"])
@pytest.mark.parametrize("mass", [1e-1, 1e-3, 1e-6])
def test_delta_keeps_its_accuracy_as_the_prefix_fades(backend: str, header: int | None, mass: float) -> None:
    arguments = inputs(2, 4, 2, 24, 32, 4, header, torch.bfloat16)
    # Feature 0 is 1 in the queries and the score log(mass) in the prefixes' keys; the others move scores little.
    arguments["query"].mul_(0.25)[..., 0] = 1
    arguments["key"][..., 0] = 0
    arguments["with_prefix"][0][..., 0] = math.log(mass) * 32**0.5
    if header is not None:  # as faint, so that delta is too
        arguments["without_prefix"][0][..., 0] = math.log(mass / 2) * 32**0.5
    _, delta = tk.paired_attention(**arguments, backend=backend)
    _, truth = dense_pair(**arguments)
    assert 0.1 * mass < largest(truth) < 50 * mass
    allowed = difference_error(**arguments, dtype=torch.float32)
    assert share_of(delta, truth, allowed) <= 1
    assert share_of(allowed, torch.zeros(()), truth) < 1e-3  # what is allowed fades as the difference does
    if mass <= 1e-3:
        _, plain = dense_pair(**arguments, dtype=torch.float32)
        assert relative_error(plain, truth) > 4 * relative_error(delta, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_is_exactly_zero_where_the_window_hides_both_prefixes(backend: str) -> None:
    _, delta = tk.paired_attention(**inputs(length=8, prefix=5, header=3), window=4, backend=backend)
    assert (delta[:, :, 3:] == 0).all() and (delta[:, :, :3] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_any_length_is_no_limit(backend: str) -> None:
    unlimited = tk.paired_attention(**inputs(header=3), backend=backend)
    for window in (2**62, 2**63, 2**100):
        limited = tk.paired_attention(**inputs(header=3), window=window, backend=backend)
        torch.testing.assert_close(limited, unlimited)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absent_prefix_equals_one_without_keys(backend: str) -> None:
    arguments = inputs(prefix=4)
    empty = tuple(part[:, :0] for part in arguments["with_prefix"])
    without, delta = tk.paired_attention(**arguments, backend=backend)
    again, same = tk.paired_attention(**{**arguments, "without_prefix": empty}, backend=backend)
    torch.testing.assert_close((without, delta), (again, same), rtol=0, atol=0)
    _, nothing = tk.paired_attention(**{**arguments, "with_prefix": empty}, backend=backend)
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_prefixes_differ_by_nothing(backend: str) -> None:
    arguments = inputs(prefix=4)
    _, delta = tk.paired_attention(**{**arguments, "without_prefix": arguments["with_prefix"]}, backend=backend)
    assert (delta == 0).all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything_and_returns_zeros(backend: str) -> None:
    arguments = inputs(batch=3, length=7, header=2)
    lengths = torch.tensor([7, 0, 3])
    clean = tk.paired_attention(**arguments, lengths=lengths, backend=backend)
    for name in ("query", "key", "value"):
        for row, length in enumerate(lengths):
            arguments[name][row, :, length:] = torch.nan
    poisoned = tk.paired_attention(**arguments, lengths=lengths, backend=backend)
    torch.testing.assert_close(clean, poisoned, rtol=0, atol=0)
    assert all((part[1] == 0).all() and (part[2, :, 3:] == 0).all() for part in poisoned)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_batch(backend: str) -> None:
    arguments = inputs(batch=3, length=33, head_dim=64, prefix=40, header=7)
    whole = tk.paired_attention(**arguments, backend=backend)
    for row in range(3):
        alone = {name: arguments[name][row : row + 1] for name in ("query", "key", "value")}
        single = tk.paired_attention(**{**arguments, **alone}, backend=backend)
        for part, one in zip(whole, single, strict=True):
            assert largest(part[row] - one[0]) <= DIFFERENCE * largest(one)
    again = tk.paired_attention(**arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    arguments = inputs(header=3)
    strided = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            strided[name] = tuple(part.transpose(0, 1).contiguous().transpose(0, 1) for part in value)
        else:
            strided[name] = value.repeat(1, 1, 1, 2)[..., ::2].copy_(value).transpose(1, 2).clone().transpose(1, 2)
    torch.testing.assert_close(
        tk.paired_attention(**strided, backend=backend), tk.paired_attention(**arguments, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}, {"prefix": 0}])
def test_empty_sizes(backend: str, sizes: dict[str, int]) -> None:
    assert_matches(inputs(**sizes), backend)


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instructions: str, dtype: torch.dtype) -> None:
    if "cpp" not in BACKENDS:
        pytest.skip(str(tk.available_backends("paired_attention", "cpu")["cpp"]))
    arguments = inputs(2, 4, 4, 70, 43, 40, 21, dtype)
    own = (arguments["query"], arguments["key"], arguments["value"])
    prefixes = (*arguments["with_prefix"], *arguments["without_prefix"])
    options = {"lengths": torch.tensor([70, 33]), "window": 50, "scale": 0.2, "softcap": 3.0}
    try:
        outputs = torch.ops.thought_kernels.paired_attention_cpp(*own, *prefixes, *options.values(), instructions)
    except ValueError as error:
        if "instructions must be" not in str(error):
            raise
        pytest.skip(str(error))
    assert_outputs_match(outputs, arguments, **options)


def test_compiled_kernels_name_themselves_when_a_length_is_out_of_range() -> None:
    if "cpp" not in BACKENDS:
        pytest.skip(str(tk.available_backends("paired_attention", "cpu")["cpp"]))
    arguments = inputs(header=3)
    own, lengths = (arguments["query"], arguments["key"], arguments["value"]), torch.tensor([6, 9])
    prefixes = (*arguments["with_prefix"], *arguments["without_prefix"])
    with pytest.raises(ValueError, match="^paired_attention_cpp: lengths must be between 0 and 6, got 9"):
        torch.ops.thought_kernels.paired_attention_cpp(*own, *prefixes, lengths, None, 0.2, None)
    none_shared = ([], [], torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="^shared_prefix_attention_cpp: lengths must be between 0 and 6, got 9"):
        torch.ops.thought_kernels.shared_prefix_attention_cpp(
            *own, *none_shared, lengths, None, 0.2, None, torch.float32
        )


def test_scores_too_large_to_exponentiate() -> None:
    arguments = inputs(header=3)
    for backend in BACKENDS:
        assert_matches(arguments, backend, scale=60.0)


def test_inputs_are_left_alone() -> None:
    for backend in BACKENDS:
        arguments, untouched = inputs(header=3), inputs(header=3)
        tk.paired_attention(**arguments, lengths=torch.tensor([6, 2]), softcap=2.0, backend=backend)
        torch.testing.assert_close(arguments, untouched, rtol=0, atol=0)


OPTIONS = {"lengths": torch.tensor([6, 4]), "window": 4, "scale": 0.2, "softcap": 5.0}


def operator_arguments(**sizes: Any) -> tuple[Any, ...]:
    arguments = inputs(**sizes)
    without = arguments["without_prefix"] or (None, None)
    own = (arguments["query"], arguments["key"], arguments["value"])
    return (*own, *arguments["with_prefix"], *without)


@pytest.mark.parametrize("sizes", [{}, {"header": 3}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}], ids=str)
def test_opcheck(sizes: dict[str, Any]) -> None:
    opcheck(torch.ops.thought_kernels.paired_attention.default, operator_arguments(**sizes), OPTIONS)


def test_options_of_the_operator_are_keywords() -> None:
    arguments = torch.ops.thought_kernels.paired_attention.default._schema.arguments
    options = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
    assert options == dict.fromkeys(("lengths", "window", "scale", "softcap", "backend"))


def test_compiles_without_a_graph_break() -> None:
    arguments = inputs(header=3)
    function: Callable = torch.compile(tk.paired_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        function(**arguments, window=4), tk.paired_attention(**arguments, window=4), rtol=0, atol=0
    )


BAD = {
    "query dtype": ({"query": torch.zeros(2, 4, 6, 16, dtype=torch.int64)}, TypeError, "query must be float64"),
    "query dims": ({"query": torch.zeros(4, 6, 16)}, ValueError, r"query must be \[B, Hq, T, D\]"),
    "no head_dim": ({"query": torch.zeros(2, 4, 6, 0)}, ValueError, "with D ≥ 1"),
    "key dtype": ({"key": torch.zeros(2, 2, 6, 16).half()}, TypeError, "key must have query's dtype"),
    "key length": ({"key": torch.zeros(2, 2, 5, 16)}, ValueError, "T = 6"),
    "key heads": ({"key": torch.zeros(2, 3, 6, 16)}, ValueError, "divides query's 4, got 3"),
    "no key heads": ({"key": torch.zeros(2, 0, 6, 16)}, ValueError, "divides query's 4, got 0"),
    "value heads": ({"value": torch.zeros(2, 4, 6, 16)}, ValueError, "value must have key's shape"),
    "not a tensor": ({"value": [1.0]}, TypeError, "value must be a tensor, got list"),
    "sparse": (
        {"key": torch.zeros(2, 2, 6, 16).to_sparse()},
        TypeError,
        "key must be a tensor that is dense, got torch",
    ),
    "sparse query": (
        {"query": torch.zeros(2, 4, 6, 16).to_sparse()},
        TypeError,
        "query must be a tensor that is dense",
    ),
    "nothing": ({"without_prefix": (None, None)}, TypeError, "without_prefix key must be a tensor, got NoneType"),
    "prefix tensor": ({"with_prefix": torch.zeros(2, 3, 16)}, TypeError, "with_prefix must be a .* pair"),
    "prefix batch": ({"with_prefix": (torch.zeros(2, 2, 3, 16),) * 2}, ValueError, "has no batch dimension"),
    "prefix heads": ({"with_prefix": (torch.zeros(4, 3, 16),) * 2}, ValueError, "with_prefix key must be"),
    "prefix value": (
        {"without_prefix": (torch.zeros(2, 3, 16), torch.zeros(2, 4, 16))},
        ValueError,
        "without_prefix value must have its key's shape",
    ),
    "half a prefix": (
        {"without_prefix": (torch.zeros(2, 3, 16), None)},
        TypeError,
        "without_prefix value must be a tensor, got NoneType",
    ),
    "prefix dtype": ({"with_prefix": (torch.zeros(2, 3, 16).double(),) * 2}, TypeError, "with_prefix key must have"),
    "lengths dtype": ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must be an integer tensor"),
    "lengths list": ({"lengths": [1, 2]}, TypeError, "lengths must be an integer tensor, got list"),
    "lengths shape": ({"lengths": torch.tensor([1])}, ValueError, r"lengths must be \[B\] with B = 2"),
    "too long": ({"lengths": torch.tensor([1, 7])}, ValueError, "lengths must be between 0 and 6, got 7"),
    "negative": ({"lengths": torch.tensor([-1, 2])}, ValueError, "lengths must be between 0 and 6, got -1"),
    "window": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "window type": ({"window": 2.0}, TypeError, "window must be an int"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "scale type": ({"scale": "1"}, TypeError, "scale must be a number"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be finite and positive, got 0.0"),
    "backend": ({"backend": "fast"}, ValueError, "backend must be None or one of"),
    "no such device": ({"backend": "cuda"}, ValueError, "backend must support this call on cpu, got 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changed, error, pattern = BAD[case]
    with pytest.raises(error, match=f"^paired_attention: .*{pattern}"):
        tk.paired_attention(**{**inputs(), **changed})
