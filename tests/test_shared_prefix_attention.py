"""shared_prefix_attention on every backend of this machine, row by row against one dense float64 softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_condition import output_error
from dense_attention import dense_attention, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import allowed_error, largest
from torch import Tensor
from torch.library import opcheck

import thought_kernels as tk

BACKENDS = [
    name for name in ("reference", "cpp") if tk.available_backends("shared_prefix_attention", "cpu")[name] is None
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(
    index: list[int],
    prefixes: tuple[int, ...] = (5, 3),
    heads: int = 4,
    groups: int = 2,
    length: int = 6,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    batch, key_heads, base = len(index), heads // groups, 100 * seed
    return {
        "query": normal(batch, heads, length, head_dim, seed=base, dtype=dtype),
        "key": normal(batch, key_heads, length, head_dim, seed=base + 1, dtype=dtype),
        "value": normal(batch, key_heads, length, head_dim, seed=base + 2, dtype=dtype),
        "prefixes": [
            tuple(normal(key_heads, count, head_dim, seed=base + 2 * n + part, dtype=dtype) for part in (3, 4))
            for n, count in enumerate(prefixes)
        ],
        "prefix_index": torch.tensor(index, dtype=torch.int64),
    }


def dense_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: list[Any],
    prefix_index: Tensor,
    lengths: Any = None,
    function: Callable[..., Tensor] = dense_attention,
    **options: Any,
) -> Tensor:
    rows = [
        function(
            query[row : row + 1],
            key[row : row + 1],
            value[row : row + 1],
            None if index < 0 else prefixes[index],
            lengths=None if lengths is None else lengths[row : row + 1],
            **options,
        )
        for row, index in enumerate(prefix_index.tolist())
    ]
    return torch.cat(rows) if rows else query.double()


def assert_matches(arguments: dict[str, Any], backend: str | None, **options: Any) -> None:
    wanted = options.pop("output_dtype", None)
    dtype = arguments["query"].dtype
    output = tk.shared_prefix_attention(**arguments, **options, output_dtype=wanted, backend=backend)
    truth = dense_rows(**arguments, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = dense_rows(**arguments, **options, dtype=wide)
    condition = largest(dense_rows(**arguments, **options, function=output_error, dtype=wide))
    dtype = wanted or dtype
    assert output.dtype == dtype and output.transpose(1, 2).is_contiguous()
    assert largest(output.double() - truth) <= allowed_error(truth, plain.to(dtype), condition=condition)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_each_row_equals_the_dense_softmax(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 4]), "groups")
    length = draw(st.integers(1, 40), "length")
    prefixes = tuple(draw(st.lists(st.integers(0, 30), max_size=3), "prefixes"))
    index = draw(st.lists(st.integers(-1, len(prefixes) - 1), min_size=1, max_size=4), "index")
    arguments = inputs(
        index,
        prefixes,
        groups * draw(st.integers(1, 2), "key heads"),
        groups,
        length,
        draw(st.sampled_from([1, 8, 24]), "head_dim"),
        draw(st.sampled_from(DTYPES), "dtype"),
        draw(st.integers(0, 1000), "seed"),
    )
    lengths = draw(st.none() | st.lists(st.integers(0, length), min_size=len(index), max_size=len(index)), "lengths")
    narrow = arguments["query"].dtype.itemsize < 4
    assert_matches(
        arguments,
        backend,
        lengths=None if lengths is None else torch.tensor(lengths),
        window=draw(st.none() | st.integers(1, 50), "window"),
        scale=draw(st.none() | st.just(0.3), "scale"),
        softcap=draw(st.none() | st.just(1.5), "softcap"),
        output_dtype=torch.float32 if narrow and draw(st.booleans(), "wide output") else None,
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 40], ids=["full", "window"])
def test_sizes_beyond_one_tile(backend: str, window: int | None) -> None:
    assert_matches(inputs([1, -1, 0], (131, 67), 4, 4, 150, 72), backend, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_rows_of_an_example_give_the_outputs_of_paired_attention(backend: str) -> None:
    arguments = inputs([0, 1, 0, 1])
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name][:2].repeat_interleave(2, 0)
    output = tk.shared_prefix_attention(**arguments, backend=backend).double()
    own = {name: arguments[name][::2] for name in ("query", "key", "value")}
    without, delta = tk.paired_attention(
        **own, with_prefix=arguments["prefixes"][0], without_prefix=arguments["prefixes"][1]
    )
    torch.testing.assert_close(output[1::2], without.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output[0::2] - output[1::2], delta.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything_and_returns_zeros(backend: str) -> None:
    arguments = inputs([0, 1, -1], length=7)
    lengths = torch.tensor([7, 0, 3])
    clean = tk.shared_prefix_attention(**arguments, lengths=lengths, backend=backend)
    for name in ("query", "key", "value"):
        for row, length in enumerate(lengths):
            arguments[name][row, :, length:] = torch.nan
    poisoned = tk.shared_prefix_attention(**arguments, lengths=lengths, backend=backend)
    assert torch.equal(clean, poisoned)
    assert (poisoned[1] == 0).all() and (poisoned[2, :, 3:] == 0).all()


@pytest.mark.parametrize("index", [[], [-1, -1]], ids=["no_rows", "no_prefix_chosen"])
def test_empty_choices(index: list[int]) -> None:
    for backend in BACKENDS:
        assert_matches(inputs(index), backend)
        assert_matches(inputs(index, prefixes=()), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = inputs([1, -1], dtype=dtype)
    keys, values = map(list, zip(*arguments["prefixes"], strict=True))
    own = (arguments["query"], arguments["key"], arguments["value"])
    options = {
        "lengths": torch.tensor([6, 4]),
        "window": 4,
        "scale": 0.2,
        "softcap": 5.0,
        "output_dtype": torch.float32,
    }
    operator = torch.ops.thought_kernels.shared_prefix_attention.default
    opcheck(operator, (*own, keys, values, arguments["prefix_index"]), options)


def test_options_of_the_operator_are_keywords() -> None:
    arguments = torch.ops.thought_kernels.shared_prefix_attention.default._schema.arguments
    options = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
    assert options == dict.fromkeys(("lengths", "window", "scale", "softcap", "output_dtype", "backend"))


def test_compiles_without_a_graph_break() -> None:
    arguments = inputs([1, -1, 0], dtype=torch.bfloat16)
    function = torch.compile(tk.shared_prefix_attention, backend="aot_eager", fullgraph=True)
    for options in ({"window": 4}, {"output_dtype": torch.float32}):
        expected = tk.shared_prefix_attention(**arguments, **options)
        output = function(**arguments, **options)
        assert torch.equal(output, expected) and output.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_output_is_the_narrow_one_before_it_is_rounded(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs([1, -1, 0], dtype=dtype)
    wide = tk.shared_prefix_attention(**arguments, output_dtype=torch.float32, backend=backend)
    assert torch.equal(wide.to(dtype), tk.shared_prefix_attention(**arguments, backend=backend))


BAD = {
    "index high": ({"prefix_index": torch.tensor([0, 2])}, ValueError, "prefix_index must be between -1 and 1, got 2"),
    "index low": ({"prefix_index": torch.tensor([0, -2])}, ValueError, "prefix_index must be between -1 and 1, got -2"),
    "index dtype": ({"prefix_index": torch.tensor([0.0, 1.0])}, TypeError, "prefix_index must be an integer tensor"),
    "index shape": ({"prefix_index": torch.tensor([0])}, ValueError, r"prefix_index must be \[B\] with B = 2"),
    "index sparse": ({"prefix_index": torch.ones(2).long().to_sparse()}, TypeError, "prefix_index must be an integer"),
    "prefixes": ({"prefixes": torch.zeros(2, 3, 16)}, TypeError, "prefixes must be a list"),
    "pair": ({"prefixes": [torch.zeros(2, 3, 16)] * 2}, TypeError, r"prefixes\[0\] must be a .* pair"),
    "prefix shape": ({"prefixes": [(torch.zeros(1, 3, 16),) * 2] * 2}, ValueError, r"prefixes\[0\] key must be"),
    "lengths": ({"lengths": torch.tensor([0, 9])}, ValueError, "lengths must be between 0 and 6, got 9"),
    "window": ({"window": -1}, ValueError, "window must be at least 1, got -1"),
    "key": ({"key": torch.zeros(2, 2, 6, 8)}, ValueError, "D = 16"),
    "window type": ({"window": 2.0}, TypeError, "window must be an int or None, got float"),
    "wider": ({"output_dtype": torch.float64}, ValueError, r"output_dtype must be None or torch\.float32 .*float64"),
    "narrower": ({"output_dtype": torch.float16}, ValueError, r"output_dtype must be None or torch\.float32 .*float16"),
    "dtype name": ({"output_dtype": "float32"}, TypeError, r"output_dtype must be a torch\.dtype or None, got str"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must support this call on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changed, error, pattern = BAD[case]
    with pytest.raises(error, match=f"^shared_prefix_attention: .*{pattern}"):
        tk.shared_prefix_attention(**{**inputs([0, 1]), **changed})
