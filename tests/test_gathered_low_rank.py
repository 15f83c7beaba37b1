"""gathered_low_rank on every backend of this machine, row by row against float64 products."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dense_attention import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import allowed_error, largest, rounding
from torch import Tensor
from torch.library import opcheck

import thought_kernels as tk

GPU = torch.cuda.is_available()
PLACES = {"reference": "cpu", "cpp": "cpu", "triton": "cuda" if GPU else "cpu"}  # Triton: interpreted where no GPU is
BACKENDS = [name for name, device in PLACES.items() if tk.available_backends("gathered_low_rank", device)[name] is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(
    index: list[int],
    length: int = 3,
    widths: tuple[int, int, int] = (40, 5, 30),
    patches: int = 3,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Of x, of the factors and vectors, and of the residual stream are the dtypes."""
    (d_in, rank, d_out), (of_x, of_factors, of_residual) = widths, dtypes
    return {
        "x": normal(len(index), length, d_in, seed=seed, dtype=of_x),
        "right": normal(patches, d_in, rank, seed=seed + 1, dtype=of_factors),
        "left": normal(patches, rank, d_out, seed=seed + 2, dtype=of_factors),
        "index": torch.tensor(index, dtype=torch.int64),
        "vector": normal(patches, d_out, seed=seed + 3, dtype=of_factors),
        "residual": normal(len(index), length, d_out, seed=seed + 4, dtype=of_residual),
    }


def row_by_row(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    index: Tensor,
    vector: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    for b, patch in enumerate(index.tolist()):
        y = torch.zeros(x.shape[1], left.shape[2], dtype=dtype)
        if patch >= 0:
            y = (x[b].to(dtype) @ right[patch].to(dtype)) @ left[patch].to(dtype)
            y = y if vector is None else y + vector[patch].to(dtype)
        rows.append(y if residual is None else residual[b].to(dtype) + y)
    return torch.stack(rows) if rows else torch.zeros(0, x.shape[1], left.shape[2], dtype=dtype)


def condition(dtype: torch.dtype, **arguments: Any) -> float:
    """How far a result may come out in any order: the sums' rounding, of the absolute terms, and three more steps."""
    sizes = {name: None if tensor is None else tensor.abs() for name, tensor in arguments.items() if name != "index"}
    sizes["index"] = arguments["index"]
    factors = {**sizes, "vector": None, "residual": None}
    sums = rounding(arguments["x"].shape[2], dtype) + rounding(arguments["right"].shape[2], dtype)
    return sums * largest(row_by_row(**factors)) + 3 * torch.finfo(dtype).eps * largest(row_by_row(**sizes))


def assert_right(output: Tensor, arguments: dict[str, Any]) -> None:
    like = arguments["x"] if arguments["residual"] is None else arguments["residual"]
    assert output.dtype == like.dtype and output.is_contiguous()
    truth, dtype = row_by_row(**arguments), arguments["right"].dtype
    plain = row_by_row(**arguments, dtype=dtype).to(output.dtype)
    assert output.shape == truth.shape
    assert largest(output.cpu().double() - truth) <= allowed_error(
        truth, plain, condition=condition(dtype, **arguments)
    )


def run(backend: str | None, arguments: dict[str, Any]) -> Tensor:
    device = PLACES[backend or "reference"]
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in arguments.items()}
    return tk.gathered_low_rank(**moved, backend=backend).cpu()


def check(backend: str, arguments: dict[str, Any]) -> None:
    assert_right(run(backend, arguments), arguments)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_row_is_multiplied_with_the_factors_it_picks(backend: str, data: st.DataObject) -> None:
    if backend not in BACKENDS:
        pytest.skip(str(tk.available_backends("gathered_low_rank", "cpu")[backend]))
    draw = data.draw
    patches = draw(st.integers(1, 4), "patches")
    index = draw(st.lists(st.integers(-1, patches - 1), max_size=6), "index")
    length = draw(st.sampled_from([0, 1, 2, 7, 60]), "length")
    widths = tuple(draw(st.sampled_from(sizes)) for sizes in ([1, 40, 300, 600], [0, 1, 7, 64], [1, 30, 280]))
    of_factors = draw(st.sampled_from([torch.float32, torch.float64]), "factors")
    narrow = DTYPES if of_factors == torch.float64 else DTYPES[1:]
    of_x, of_residual = (draw(st.sampled_from(narrow), name) for name in ("x", "residual"))
    arguments = inputs(index, length, widths, patches, (of_x, of_factors, of_residual), draw(st.integers(0, 99)))
    for name in ("vector", "residual"):
        if draw(st.booleans(), f"no {name}"):
            arguments[name] = None
    check(backend, arguments)


CASES: dict[str, dict[str, Any]] = {
    "empty batch": {"index": []},
    "no token": {"index": [0, 1], "length": 0},
    "rank 0": {"index": [1, -1], "widths": (40, 0, 30)},
    "no features": {"index": [1, -1], "widths": (0, 4, 30)},
    "no outputs": {"index": [1, 0], "widths": (40, 4, 0)},
    "none has a patch": {"index": [-1, -1]},
    "no patch at all": {"index": [-1, -1], "patches": 0},
    "one patch": {"index": [0, 0, 0, 0], "patches": 1},
    "repeated patches": {"index": [2, 0, 2, -1, 0, 2, 1], "length": 1, "widths": (130, 65, 70)},
    "many tokens": {"index": [1, -1, 1, 0], "length": 35, "widths": (300, 70, 65)},
    "one row": {"index": [2], "length": 1, "widths": (600, 17, 33)},
    "narrow": {"index": [1, 0], "dtypes": (torch.bfloat16, torch.float32, torch.bfloat16)},
    "half": {"index": [1, 0], "dtypes": (torch.float16, torch.float32, torch.float32)},
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_backend_in_every_case(backend: str, case: str) -> None:
    arguments = inputs(**CASES[case])
    for changed in ({}, {"vector": None}, {"residual": None}, {"vector": None, "residual": None}):
        check(backend, {**arguments, **changed})


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_patch_keep_their_bits(backend: str) -> None:
    for dtype in DTYPES if backend != "triton" else DTYPES[1:]:
        factors = torch.float64 if dtype == torch.float64 else torch.float32
        arguments = inputs([-1, 1, -1], dtypes=(dtype, factors, dtype))
        arguments["x"][0] = torch.nan
        output = run(backend, arguments)
        assert torch.equal(output[::2], arguments["residual"][::2])
        assert not run(backend, {**arguments, "residual": None})[::2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_may_lie_anywhere_and_are_left_alone(backend: str) -> None:
    packed = inputs([1, 2, -1, 1])

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    moved = {
        "strided": strided,
        "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
        "batch last": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    for move in moved.values():
        arguments = {name: move(tensor) for name, tensor in packed.items()}
        check(backend, arguments)
        assert backend != "cpp" or torch.equal(run(backend, arguments), run(backend, packed))
        assert all(torch.equal(arguments[name], tensor) for name, tensor in packed.items())
    check(backend, {**packed, "x": packed["x"][:1, :1].expand_as(packed["x"])})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_any_integers_are_an_index(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs([1, -1, 2])
    assert torch.equal(run(backend, {**arguments, "index": arguments["index"].to(dtype)}), run(backend, arguments))


needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension has no kernel for it")


@needs_cpp
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 29])
def test_every_instruction_set(instructions: str, dtype: torch.dtype, length: int) -> None:
    # Every height and width of a tile, and part of another.
    arguments = inputs([0, 1, 1, 2, 2, 2, -1, 0], length, (520, 95, 271), dtypes=(torch.bfloat16, dtype, dtype))
    try:
        output = torch.ops.thought_kernels.gathered_low_rank_cpp(*arguments.values(), instructions)
    except ValueError as error:
        if "instructions must be" not in str(error):
            raise
        pytest.skip(str(error))
    assert_right(output, arguments)


@needs_cpp
@pytest.mark.parametrize("length", [1, 90])
def test_neither_threads_nor_other_rows_change_a_bit(length: int) -> None:
    arguments = inputs([0, 1, 1, 2, 1, -1, 1], length, (600, 33, 300))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(run("cpp", arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    for b in range(len(arguments["index"])):
        own = {name: arguments[name][b : b + 1] for name in ("x", "index", "residual")}
        assert torch.equal(run("cpp", {**arguments, **own})[0], runs[0][b])


@needs_cpp
def test_the_compiled_kernel_names_itself_when_called_wrongly() -> None:
    kernel = torch.ops.thought_kernels.gathered_low_rank_cpp
    for changed, sentence in (
        ({"index": torch.tensor([0, 3])}, "index must be between -1 and 2, got 3"),
        ({"index": torch.tensor([-2, 0])}, "index must be between -1 and 2, got -2"),
        ({"left": torch.zeros(3, 4, 30)}, r"left must have shape \[3, 5, 30\], got \[3, 4, 30\]"),
        ({"residual": torch.zeros(2, 3, 29)}, r"residual must have shape \[2, 3, 30\], got \[2, 3, 29\]"),
    ):
        with pytest.raises(ValueError, match=f"^gathered_low_rank_cpp: {sentence}"):
            kernel(*{**inputs([0, 1]), **changed}.values())


def test_opcheck() -> None:
    arguments = inputs([1, -1, 0], dtypes=(torch.bfloat16, torch.float32, torch.float16))
    operator = torch.ops.thought_kernels.gathered_low_rank.default
    needed, optional = list(arguments.values())[:4], {name: arguments[name] for name in ("vector", "residual")}
    opcheck(operator, tuple(needed))
    opcheck(operator, tuple(needed), optional)


def test_the_operator_is_the_documented_function() -> None:
    documented = (
        "(Tensor x, Tensor right, Tensor left, Tensor index, *, Tensor? vector=None, Tensor? residual=None,"
        " str? backend=None)"
    )
    schema = str(torch.ops.thought_kernels.gathered_low_rank.default._schema)
    assert schema == f"thought_kernels::gathered_low_rank{documented} -> Tensor"


def test_compiles_without_a_graph_break() -> None:
    arguments = inputs([1, -1, 0])
    function = torch.compile(tk.gathered_low_rank, backend="aot_eager", fullgraph=True)
    for changed in ({}, {"residual": None}):
        call = partial(tk.gathered_low_rank, **{**arguments, **changed})
        assert torch.equal(function(**{**arguments, **changed}), call())


def test_outputs_lie_as_the_fake_kernel_says() -> None:
    arguments = inputs([1, -1], dtypes=(torch.float32, torch.float32, torch.bfloat16))
    arguments["residual"] = arguments["residual"].mT.contiguous().mT
    for changed in ({}, {"residual": None}):
        real = {**arguments, **changed}
        fake = tk.gathered_low_rank(**{n: None if t is None else t.to("meta") for n, t in real.items()})
        output = tk.gathered_low_rank(**real)
        assert (fake.shape, fake.stride(), fake.dtype) == (output.shape, output.stride(), output.dtype)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x type": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x dtype": ({"x": torch.zeros(2, 3, 40).int()}, TypeError, "x must be float64, float32, bfloat16 or float16, got"),
    "x shape": ({"x": torch.zeros(2, 40)}, ValueError, r"x must be \[B, T, d_in\], got \[2, 40\]"),
    "right type": ({"right": None}, TypeError, "right must be a tensor, got NoneType"),
    "right shape": (
        {"right": torch.zeros(3, 39, 5)},
        ValueError,
        r"right must be \[P, d_in, r\] with d_in = 40, got \[3, 39, 5\]",
    ),
    "right dtype": (
        {name: torch.zeros(3, 5, 5).bfloat16() for name in ("right", "left")} | {"vector": None},
        TypeError,
        r"right must be float32 or float64, got torch.bfloat16; pass right.float\(\)",
    ),
    "narrow factors": (
        {"x": torch.zeros(2, 3, 40).double()},
        TypeError,
        "right must be torch.float64 beside x in torch.float64, got torch.float32",
    ),
    "narrow factors beside the stream": (
        {"residual": torch.zeros(2, 3, 30).double()},
        TypeError,
        "right must be torch.float64 beside residual in torch.float64, got torch.float32",
    ),
    "right device": (
        {"right": torch.zeros(3, 40, 5, device="meta")},
        ValueError,
        "right must be on x's device cpu, go",
    ),
    "left missing": ({"left": None}, TypeError, "left must be a tensor, got NoneType"),
    "left patches": (
        {"left": torch.zeros(2, 5, 30)},
        ValueError,
        r"left must be \[P, r, d_out\] with P = 3 and r = 5, got \[2, 5, 30\]",
    ),
    "left turned": ({"left": torch.zeros(3, 30, 5)}, ValueError, r"left must be .* and r = 5, got \[3, 30, 5\]"),
    "left dtype": ({"left": torch.zeros(3, 5, 30).double()}, TypeError, "left must have right's dtype torch.float32"),
    "vector shape": (
        {"vector": torch.zeros(3, 29)},
        ValueError,
        r"vector must be \[P, d_out\] with P = 3 and d_out = 30, got \[3, 29\]",
    ),
    "vector dtype": (
        {"vector": torch.zeros(3, 30).double()},
        TypeError,
        "vector must have right's dtype torch.float32",
    ),
    "residual shape": (
        {"residual": torch.zeros(2, 1, 30)},
        ValueError,
        r"residual must have shape \[2, 3, 30\], got \[2, 1, 30\]",
    ),
    "residual type": ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "residual device": (
        {"residual": torch.zeros(2, 3, 30, device="meta")},
        ValueError,
        "residual must be on x's device cpu, got meta",
    ),
    "index type": ({"index": [0, 1]}, TypeError, "index must be an integer tensor, got list"),
    "index dtype": ({"index": torch.zeros(2)}, TypeError, "index must be an integer tensor, got torch.float32"),
    "index shape": ({"index": torch.tensor([0])}, ValueError, r"index must be \[B\] with B = 2, got \[1\]"),
    "index device": (
        {"index": torch.zeros(2, dtype=torch.long, device="meta")},
        ValueError,
        "index must be on x's device cpu, got meta",
    ),
    "index too large": ({"index": torch.tensor([0, 3])}, ValueError, "index must be between -1 and 2, got 3"),
    "index too small": ({"index": torch.tensor([-2, 0])}, ValueError, "index must be between -1 and 2, got -2"),
    "sparse": ({"right": torch.zeros(3, 40, 5).to_sparse()}, TypeError, "right must be a tensor that is dense"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must support this call on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changed, error, pattern = BAD[case]
    arguments = {"backend": None, **inputs([0, 1]), **changed}
    with pytest.raises(error, match=f"^gathered_low_rank: {pattern}"):
        tk.gathered_low_rank(**arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton does not run here")
def test_triton_leaves_float64_to_others() -> None:
    arguments = inputs([0, 1], dtypes=(torch.float32, torch.float64, torch.float32))
    with pytest.raises(ValueError, match="^gathered_low_rank: backend must .* got 'triton'; it computes in float32"):
        run("triton", arguments)
    check("reference", arguments)
