"""Streaming accumulation of weighted rank-one products, in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops import library
from thought_kernels.ops.checks import check_number, not_dense
from thought_kernels.ops.overlap import check_overlap

NORMALIZATIONS = {"none": 0, "norm": 1, "squared_norm": 2}  # the integers are those of the compiled kernels
_INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GROUP_ROWS = 2048  # rows copied at a time where the leading dimensions have no common stride

# The launchers thought_kernels.reference.accumulate.launch and thought_kernels.triton.accumulate.launch both take
#   (cross, delta, activation, *, pair, weights, normalization, coefficient, gram, delta_sum, activation_sum, moments)
# with delta [rows, d_out], activation [rows, d_in], weights [rows] or None, all of any strides, and rows ≥ 1. With pair
# δ is delta − activation, formed in the accumulators' precision. The compiled kernels take the same, in order:
_KERNEL_ARGUMENTS = (
    "(Tensor(a!) cross, Tensor delta, Tensor activation, bool pair, Tensor? weights, int normalization,"
    " float coefficient, Tensor(b!)? gram, Tensor(c!)? delta_sum, Tensor(d!)? activation_sum,"
    " Tensor(e!)? moments{}) -> ()"
)
_OPTIONS = (
    "*, Tensor? weights=None, str normalization='none', float coefficient=1.0, Tensor(b!)? gram=None,"
    " Tensor(c!)? delta_sum=None, Tensor(d!)? activation_sum=None, Tensor(e!)? moments=None, str? backend=None) -> ()"
)


def accumulate(
    cross: Tensor,
    delta: Tensor,
    activation: Tensor,
    *,
    weights: Tensor | None = None,
    normalization: str = "none",
    coefficient: float = 1.0,
    gram: Tensor | None = None,
    delta_sum: Tensor | None = None,
    activation_sum: Tensor | None = None,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adds the weighted rank-one products of many tokens to a matrix, and their first and second moments, in one pass.

    With a_i and δ_i the rows of activation and delta, w_i the weights and c the coefficient::

        cross          += c Σ_i w_i δ_i a_iᵀ / ν_i          ν_i = 1 | ‖a_i‖ | ‖a_i‖²
        gram           += c Σ_i w_i a_i a_iᵀ / ν_i          (what is added is exactly symmetric)
        delta_sum      += c Σ_i w_i δ_i
        activation_sum += c Σ_i w_i a_i
        moments        += (Σ w_i, Σ w_i/ν_i, Σ w_i ‖δ_i‖²/ν_i, number of i with w_i ≠ 0)

    Every sum is deterministic. On a CPU no temporary grows with the number of tokens; a GPU keeps a few numbers per row
    and, with weights, norms, sums or moments, reads the rows a second time for them. Not differentiable.

    Nothing is filtered: NaN or an infinity in a row of weight other than 0 spoils the sums that it enters, as it does
    in torch's own products. A weight or a norm that is NaN spoils them for the whole row.

    >>> cross = torch.zeros(2, 3)
    >>> accumulate(cross, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0]]), normalization="norm")
    >>> cross  # δ aᵀ / ‖a‖, and ‖a‖ = 5
    tensor([[0.6000, 0.0000, 0.8000],
            [1.2000, 0.0000, 1.6000]])

    Args:
        cross: ``[d_out, d_in]``, float32 or float64, any strides; updated in place.
        delta: ``[..., d_out]``, float16, bfloat16, float32 or float64, any strides.
        activation: ``[..., d_in]``, the same leading dimensions; its dtype may differ from delta's.
        weights: the leading dimensions' shape, any float dtype, of any sign; None for ones. A row of weight 0
            (padding) adds nothing whatever it holds, NaN included.
        normalization: "none", "norm" or "squared_norm" for the ν above. Under the last two a row with a_i = 0 adds
            nothing to cross, gram and the moments' ν sums, but counts in delta_sum, activation_sum and Σ w.
        coefficient: finite; multiplies everything but moments.
        gram: ``[d_in, d_in]`` in cross's dtype, or None.
        delta_sum: ``[d_out]`` in cross's dtype, or None.
        activation_sum: ``[d_in]`` in cross's dtype, or None.
        moments: ``[4]`` float64, or None.
        backend: "reference", "cpp", "triton", "cuda", or None for the fastest that supports the call. On a CPU the
            arithmetic is in cross's dtype, and ‖a‖² in float64, whose range norms beyond 1e±150 leave (float64 rows
            alone can have them). A GPU backend rounds the scaled operand (w_i δ_i/ν_i, and w_i a_i/ν_i for gram) once
            to activation's dtype. "triton" and "cuda" take a float32 cross alone.

    Raises:
        TypeError: for something other than a tensor, a string or a number where one belongs.
        ValueError: if a shape, dtype or device does not fit, if an accumulator overlaps another tensor of the call or
            itself, or requires grad while gradients are recorded, or if the named backend cannot run the call. Nothing
            has been written then.

    Source: Transmuting prompts into weights, Algorithm 1 and eq. 8; the normalisations are its §4.1 and eq. 4.
    """
    _call(
        "accumulate", cross, delta, activation,
        weights=weights, normalization=normalization, coefficient=coefficient, gram=gram, delta_sum=delta_sum,
        activation_sum=activation_sum, moments=moments, backend=backend,
    )  # fmt: skip


def accumulate_pair(
    cross: Tensor,
    with_context: Tensor,
    without_context: Tensor,
    *,
    weights: Tensor | None = None,
    normalization: str = "none",
    coefficient: float = 1.0,
    gram: Tensor | None = None,
    delta_sum: Tensor | None = None,
    activation_sum: Tensor | None = None,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Does what accumulate does for the difference of two activations, which is formed inside and never stored.

    With a_i and a'_i the rows of without_context and with_context, it is accumulate with::

        δ_i = a'_i − a_i      in the accumulators' precision

    Args:
        cross: ``[d, d]``, float32 or float64, any strides; updated in place.
        with_context: ``[..., d]``, float16, bfloat16, float32 or float64, any strides.
        without_context: the same shape; it is the activation a.
        weights, normalization, coefficient, gram, delta_sum, activation_sum, moments, backend: as in accumulate.

    Raises:
        TypeError, ValueError: as accumulate does.

    Source: Transmuting prompts into weights, Algorithm 1, lines 13 to 15.
    """
    _call(
        "accumulate_pair", cross, with_context, without_context,
        weights=weights, normalization=normalization, coefficient=coefficient, gram=gram, delta_sum=delta_sum,
        activation_sum=activation_sum, moments=moments, backend=backend,
    )  # fmt: skip


class _Options(NamedTuple):
    """The keyword arguments of both functions; the operators leave out those that have their defaults."""

    weights: Tensor | None = None
    normalization: str = "none"
    coefficient: float = 1.0
    gram: Tensor | None = None
    delta_sum: Tensor | None = None
    activation_sum: Tensor | None = None
    moments: Tensor | None = None
    backend: str | None = None


def _call(function: str, cross: Tensor, delta: Tensor, activation: Tensor, **keywords: Any) -> None:
    through_torch = library.dispatched(cross, delta, activation, *keywords.values())
    run = getattr(torch.ops.thought_kernels, function) if through_torch else functools.partial(_run, function)
    run(cross, delta, activation, **keywords)


def _run(function: str, cross: Tensor, delta: Tensor, activation: Tensor, **keywords: Any) -> None:
    """Checks everything, then writes: both functions on real tensors, called directly or through torch.ops."""
    options = _Options(**keywords)
    read, written = _named(function, cross, delta, activation, options)
    _check(function, read, written, options)
    check_overlap(function, read, written)
    tensors = {"delta": delta, "activation": activation, "weights": options.weights, **written}
    copies = {name: tensor.resolve_neg() for name, tensor in tensors.items() if tensor is not None and tensor.is_neg()}
    if copies:  # kernels read and write memory as it lies, which is the negative of these tensors
        _run(function, **{"cross": cross, "delta": delta, "activation": activation, **keywords, **copies})
        for name in written.keys() & copies.keys():
            written[name].copy_(copies[name])
        return
    unsupported = functools.partial(_unsupported, cross, delta, activation, options.weights)
    chosen = library.choose(function, options.backend, cross.device, unsupported)
    pair = function == "accumulate_pair"
    # Kernels write through pointers: autograd must still notice that a tensor it saved has changed.
    torch.autograd.graph.increment_version([tensor for tensor in written.values() if tensor is not None])
    for d, a, w in _flat(delta, activation, options.weights):
        # In the order of the compiled kernels' arguments.
        rest = {**options._asdict(), "weights": w}
        del rest["backend"]
        if chosen in ("reference", "triton"):
            library.launcher(function, chosen)(cross, d, a, pair=pair, **rest)
        else:
            rest["normalization"] = NORMALIZATIONS[options.normalization]
            library.kernel(f"accumulate_{chosen}")(cross, d, a, pair, *rest.values())


def _fake(function: str, cross: Tensor, delta: Tensor, activation: Tensor, **keywords: Any) -> None:
    options = _Options(**keywords)
    _check(function, *_named(function, cross, delta, activation, options), options)


def _named(
    function: str, cross: Tensor, delta: Tensor, activation: Tensor, options: _Options
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is read and what is written under the names that errors use, checked by nobody yet."""
    names = ("delta", "activation") if function == "accumulate" else ("with_context", "without_context")
    read = {names[0]: delta, names[1]: activation, "weights": options.weights}
    optional = {name: getattr(options, name) for name in ("gram", "delta_sum", "activation_sum", "moments")}
    return read, {"cross": cross, **optional}


_accumulate = functools.partial(_run, "accumulate")
_accumulate_pair = functools.partial(_run, "accumulate_pair")


def _unsupported(cross: Tensor, delta: Tensor, activation: Tensor, weights: Tensor | None, backend: str) -> str | None:
    if backend in ("triton", "cuda") and cross.dtype != torch.float32:
        return f"it accumulates in float32 only, not {cross.dtype}"
    return library.interpreter_unsupported(delta, activation, weights) if backend == "triton" else None


def _flat(delta: Tensor, activation: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The inputs as [rows, d] and [rows], in one piece where that is a view, else copied a bounded group at a time."""
    shape = activation.shape[:-1]
    if shape.numel() == 0:
        return
    inputs = [tensor.detach() for tensor in (delta, activation, weights) if tensor is not None]
    # All that will be allocated, before anything is written: running out of memory half-way would spoil the sums.
    copied = [None if _mergeable(tensor, len(shape)) else _group_buffer(tensor, shape) for tensor in inputs]
    for group in [()] if copied.count(None) == len(copied) else _groups(shape):
        parts = []
        for tensor, buffer in zip(inputs, copied, strict=True):
            part, columns = tensor[group], tensor.shape[len(shape) :]
            dimensions = part.dim() - len(columns)
            if buffer is not None and not _mergeable(part, dimensions):
                rows = buffer[: part.shape[:dimensions].numel()]
                part = rows.view(part.shape).copy_(part)
            parts.append(part.reshape(part.shape[:dimensions].numel(), *columns))
        yield parts[0], parts[1], parts[2] if weights is not None else None


def _group_buffer(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.new_empty(min(shape.numel(), _GROUP_ROWS), *tensor.shape[len(shape) :])


def _groups(shape: torch.Size) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cover the leading dimensions, each _GROUP_ROWS rows at most or a single dimension."""
    if len(shape) <= 1 or shape.numel() <= _GROUP_ROWS:
        yield ()
        return
    step = _GROUP_ROWS // shape[1:].numel()
    for start in range(0, shape[0], max(1, step)):
        if step > 1:
            yield (slice(start, start + step),)
        else:
            yield from ((start, *rest) for rest in _groups(shape[1:]))


def _mergeable(tensor: Tensor, dimensions: int) -> bool:
    """Whether the leading dimensions flatten to one without a copy."""
    wanted = None
    for size, stride in zip(reversed(tensor.shape[:dimensions]), reversed(tensor.stride()[:dimensions]), strict=True):
        if size == 1:
            continue
        if wanted is not None and stride != wanted:
            return False
        wanted = stride * size
    return True


def _check(function: str, inputs: dict[str, Any], accumulators: dict[str, Any], options: _Options) -> None:
    """Raises unless types, dtypes, devices and shapes fit; needs no data, so it serves fake tensors too."""
    _check_tensors(function, inputs, accumulators)
    _check_inputs(function, inputs)
    _check_accumulators(function, inputs, accumulators)
    if not isinstance(options.normalization, str):
        actual = type(options.normalization).__name__
        raise TypeError(library.message(function, "normalization", "be a string", actual))
    if options.normalization not in NORMALIZATIONS:
        rule = f"be one of {', '.join(NORMALIZATIONS)}"
        raise ValueError(library.message(function, "normalization", rule, repr(options.normalization)))
    check_number(function, "coefficient", options.coefficient)


def _check_tensors(function: str, inputs: dict[str, Any], accumulators: dict[str, Any]) -> None:
    """Dense tensors on one device, of which those that are written may be; inputs and cross of a known dtype."""
    cross, needed = accumulators["cross"], ("cross", *list(inputs)[:2])
    for argument, tensor in {**accumulators, **inputs}.items():
        if tensor is None and argument not in needed:
            continue
        found = not_dense(tensor) if isinstance(tensor, Tensor) else (type(tensor).__name__, "")
        if found is not None:
            raise TypeError(library.message(function, argument, "be a dense tensor", *found))
        if argument in accumulators and tensor.requires_grad and torch.is_grad_enabled():
            rule = "not require grad while gradients are recorded"
            fix = f"call under torch.no_grad(), or pass {argument}.detach(), which shares its memory"
            actual = f"a {'leaf' if tensor.is_leaf else 'tensor'} that does"
            raise ValueError(library.message(function, argument, rule, actual, fix))
        if tensor.device != cross.device:
            raise ValueError(library.message(function, argument, f"be on cross's device {cross.device}", tensor.device))
    for argument, tensor in inputs.items():
        if tensor is not None and tensor.dtype not in _INPUT_DTYPES:
            rule = "be float16, bfloat16, float32 or float64"
            raise TypeError(library.message(function, argument, rule, tensor.dtype))
    if cross.dtype not in (torch.float32, torch.float64):
        raise TypeError(library.message(function, "cross", "be float32 or float64", cross.dtype))


def _check_inputs(function: str, inputs: dict[str, Any]) -> None:
    """Rows of the same leading dimensions, and of one width where their difference is formed."""
    (delta_name, delta), (name, activation), (_, weights) = inputs.items()
    for argument, tensor in ((delta_name, delta), (name, activation)):
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(library.message(function, argument, "be [..., d] with d ≥ 1", list(tensor.shape)))
    rows, d_in = activation.shape[:-1], activation.shape[-1]
    if delta.shape[:-1] != rows or (function == "accumulate_pair" and delta.shape[-1] != d_in):
        rule = f"have {name}'s " + (f"leading dimensions {list(rows)}" if delta.shape[:-1] != rows else f"size {d_in}")
        raise ValueError(library.message(function, delta_name, rule, list(delta.shape)))
    if weights is not None and weights.shape != rows:
        fix = "weights are not broadcast"
        raise ValueError(library.message(function, "weights", f"have shape {list(rows)}", list(weights.shape), fix))


def _check_accumulators(function: str, inputs: dict[str, Any], accumulators: dict[str, Any]) -> None:
    """Shapes and dtypes that the inputs and cross ask for."""
    (delta_name, delta), (name, activation), _ = inputs.items()
    d_out, d_in, wanted = delta.shape[-1], activation.shape[-1], accumulators["cross"].dtype
    shapes = ((d_out, d_in), (d_in, d_in), (d_out,), (d_in,), (4,))
    for (argument, tensor), shape in zip(accumulators.items(), shapes, strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            fix = f"{delta_name} is {list(delta.shape)} and {name} is {list(activation.shape)}"
            raise ValueError(library.message(function, argument, f"have shape {list(shape)}", list(tensor.shape), fix))
        dtype = torch.float64 if argument == "moments" else wanted
        if tensor.dtype != dtype:
            rule = "be torch.float64" if argument == "moments" else f"have cross's dtype {dtype}"
            raise TypeError(library.message(function, argument, rule, tensor.dtype))


library.declare(
    f"accumulate(Tensor(a!) cross, Tensor delta, Tensor activation, {_OPTIONS}",
    implementation=_accumulate,
    fake=functools.partial(_fake, "accumulate"),
)
library.declare(
    f"accumulate_pair(Tensor(a!) cross, Tensor with_context, Tensor without_context, {_OPTIONS}",
    implementation=_accumulate_pair,
    fake=functools.partial(_fake, "accumulate_pair"),
    stem="accumulate",
)
for _name in ("accumulate", "accumulate_pair"):
    # torch's own way with negated tensors is made for operators that return what they write.
    library.LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Negative")
library.declare_kernel("accumulate_cpp" + _KERNEL_ARGUMENTS.format(", str? instructions=None"))
library.declare_kernel("accumulate_cuda" + _KERNEL_ARGUMENTS.format(""))
