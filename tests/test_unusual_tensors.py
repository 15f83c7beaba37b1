"""Tensors that are not just memory with strides, as any argument of any operator: the right value or a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import thought_kernels as tk


class Operator(NamedTuple):
    """One operator, called with all of its tensors.

    Attributes:
        arguments: makes the tensors, by the names that errors use.
        run: calls the operator and returns what it returns or has written.
        written: names of the arguments that it writes.
    """

    arguments: Callable[[], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], str | None], list[Tensor]]
    written: tuple[str, ...] = ()


SUMS = ("cross", "gram", "delta_sum", "activation_sum", "moments")


def accumulator_arguments(left: str, right: str) -> dict[str, Tensor]:
    sums = {"cross": torch.randn(3, 3), "gram": torch.randn(3, 3)}
    vectors = {"delta_sum": torch.randn(3), "activation_sum": torch.randn(3), "moments": torch.randn(4).double()}
    return {**sums, **vectors, left: torch.randn(6, 3), right: torch.randn(6, 3), "weights": torch.rand(6)}


def accumulated(function: Callable, arguments: dict[str, Tensor], backend: str | None) -> list[Tensor]:
    function(**arguments, normalization="norm", backend=backend)
    return [arguments[name] for name in SUMS]


def attention_arguments(with_prefix: str, without_prefix: str) -> dict[str, Tensor]:
    prefixes = [f"{prefix} {part}" for prefix in (with_prefix, without_prefix) for part in ("key", "value")]
    return {
        "query": torch.randn(2, 2, 3, 16),
        **{name: torch.randn(2, 1, 3, 16) for name in ("key", "value")},
        **{name: torch.randn(1, 3, 16) for name in prefixes},
        "lengths": torch.tensor([3, 2]),
    }


def paired(arguments: dict[str, Tensor], backend: str | None) -> list[Tensor]:
    query, key, value, *prefixes, lengths = arguments.values()
    return list(tk.paired_attention(query, key, value, prefixes[:2], prefixes[2:], lengths=lengths, backend=backend))


def shared_prefix_arguments() -> dict[str, Tensor]:
    return {**attention_arguments("prefixes[0]", "prefixes[1]"), "prefix_index": torch.tensor([0, 1])}


def shared_prefix(arguments: dict[str, Tensor], backend: str | None) -> list[Tensor]:
    query, key, value, *prefixes, lengths, index = arguments.values()
    pairs = [tuple(prefixes[:2]), tuple(prefixes[2:])]
    return [tk.shared_prefix_attention(query, key, value, pairs, index, lengths=lengths, backend=backend)]


def norm_arguments() -> dict[str, Tensor]:
    return {name: torch.randn(4, 8) for name in ("x", "delta", "residual")} | {"weight": torch.randn(8)}


def gathered_arguments() -> dict[str, Tensor]:
    sizes = {"x": (3, 2, 6), "right": (2, 6, 4), "left": (2, 4, 5), "vector": (2, 5), "residual": (3, 2, 5)}
    return {name: torch.randn(*size) for name, size in sizes.items()} | {"index": torch.tensor([1, -1, 0])}


OPERATORS = {
    "accumulate": Operator(
        lambda: accumulator_arguments("delta", "activation"),
        lambda arguments, backend: accumulated(tk.accumulate, arguments, backend),
        SUMS,
    ),
    "accumulate_pair": Operator(
        lambda: accumulator_arguments("with_context", "without_context"),
        lambda arguments, backend: accumulated(tk.accumulate_pair, arguments, backend),
        SUMS,
    ),
    "paired_attention": Operator(lambda: attention_arguments("with_prefix", "without_prefix"), paired),
    "shared_prefix_attention": Operator(shared_prefix_arguments, shared_prefix),
    "rms_norm_pair": Operator(
        norm_arguments,
        lambda arguments, backend: list(tk.rms_norm_pair(**arguments, eps=1e-6, backend=backend)),
    ),
    "gathered_low_rank": Operator(
        gathered_arguments,
        lambda arguments, backend: [tk.gathered_low_rank(**arguments, backend=backend)],
    ),
}


class Named(torch.Tensor):
    """A subclass that only has a name of its own."""


class Holder(torch.Tensor):
    """A subclass without memory: it holds a tensor and hands it to whatever it is given to."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Holder:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, strides=held.stride())

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        held = tree_map(lambda x: x.held if isinstance(x, Holder) else x, (arguments, keywords or {}))
        return function(*held[0], **held[1])


class Refuser(Holder):
    """A subclass that knows no operator."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return NotImplemented


def negated(tensor: Tensor) -> Tensor:
    """The same values, in memory as their negatives: what the imaginary part of a conjugate is."""
    memory = torch.zeros(tensor.shape, dtype=tensor.dtype.to_complex())
    memory.imag.copy_(-tensor)
    return memory.conj().imag


RIGHT = {"negated": negated, "named": lambda tensor: tensor.as_subclass(Named), "holder": Holder}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Subclasses are unpacked before a backend is chosen, and Triton's interpreter is slow.
CASES = [(kind, backend) for kind in RIGHT for backend in ("reference", "cpp")] + [("negated", "triton")]


@pytest.mark.parametrize(("kind", "backend"), CASES)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_right(name, kind, backend):
    reason = tk.available_backends(name, "cpu")[backend]
    if reason is not None:
        pytest.skip(reason)
    operator = OPERATORS[name]
    plain = operator.arguments()
    expected = operator.run({argument: tensor.clone() for argument, tensor in plain.items()}, backend)
    for changed in plain:
        if kind == "negated" and not plain[changed].is_floating_point():
            continue
        arguments = {argument: tensor.clone() for argument, tensor in plain.items()}
        arguments[changed] = RIGHT[kind](arguments[changed])
        assert kind != "negated" or arguments[changed].is_neg()
        for output, right in zip(operator.run(arguments, backend), expected, strict=True):
            torch.testing.assert_close(output.held if isinstance(output, Holder) else output.as_subclass(Tensor), right)


def test_negated_accumulators_are_right_through_torch_ops():
    rows = torch.randn(4, 3)
    for coefficient in (1.0, -0.5):
        cross, gram = negated(torch.ones(3, 3)), negated(torch.zeros(3, 3))
        torch.ops.thought_kernels.accumulate(cross, rows, rows, coefficient=coefficient, gram=gram)
        torch.testing.assert_close(gram.resolve_neg(), coefficient * (rows.T @ rows))
        torch.testing.assert_close(cross.resolve_neg(), 1 + coefficient * (rows.T @ rows))


REFUSED = {
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
    "sparse": Tensor.to_sparse,
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "conjugated": lambda tensor: tensor.to(torch.complex64).conj(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize")
@pytest.mark.parametrize("kind", [*REFUSED, "refuser"])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_no_kernel_takes_is_refused_with_a_sentence(name, kind):
    operator = OPERATORS[name]
    for changed in operator.arguments():
        arguments = operator.arguments()
        arguments[changed] = Refuser(arguments[changed]) if kind == "refuser" else REFUSED[kind](arguments[changed])
        before = {argument: tensor.clone() for argument, tensor in arguments.items() if argument != changed}
        sentence = f"^{name}: {re.escape(changed)} must .*, got " + (
            "a nested tensor; pad" * (kind in ("nested", "jagged"))
        )
        if kind == "refuser":  # torch's own sentence, which names the operator and the class
            sentence = rf"'torch._ops.thought_kernels.{name}.default'[\s\S]*Refuser"
        with pytest.raises(TypeError, match=sentence):
            operator.run(arguments, None)
        assert all(torch.equal(arguments[argument], tensor) for argument, tensor in before.items())


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_that_require_grad_leave_no_graph(name):
    operator = OPERATORS[name]
    for changed, tensor in operator.arguments().items():
        if changed in operator.written or not tensor.is_floating_point():
            continue
        arguments = operator.arguments()
        arguments[changed].requires_grad_()
        assert not any(output.requires_grad for output in operator.run(arguments, None))


@pytest.mark.parametrize("through_torch_ops", [False, True])
@pytest.mark.parametrize("name", ["accumulate", "accumulate_pair"])
def test_accumulators_that_require_grad_are_refused_while_gradients_are_recorded(name, through_torch_ops):
    operator = OPERATORS[name]
    kinds = {  # what the accumulator is, and what the error calls it
        "a leaf": lambda tensor: tensor.requires_grad_(),
        "a tensor": lambda tensor: tensor.requires_grad_().view(tensor.shape),
    }
    for changed in operator.written:
        for called, made in kinds.items():
            arguments = operator.arguments()
            plain = {argument: tensor.clone() for argument, tensor in arguments.items()}
            arguments[changed] = made(arguments[changed])
            call = getattr(torch.ops.thought_kernels if through_torch_ops else tk, name)
            sentence = (
                f"^{name}: {changed} must not require grad while gradients are recorded, got {called} that does; "
            )
            with pytest.raises(ValueError, match=sentence + r"call under torch.no_grad\(\), or pass"):
                call(**arguments)
            assert all(torch.equal(arguments[argument], tensor) for argument, tensor in plain.items())
            with torch.no_grad():
                call(**arguments)
            call(**plain)
            assert all(torch.equal(arguments[argument], tensor) for argument, tensor in plain.items())
            call(**{**arguments, changed: arguments[changed].detach()})  # shares the memory
            call(**plain)
            assert torch.equal(arguments[changed], plain[changed])
