"""Bytes, FLOPs and launches of a kernel, from the shapes that an operator is called with.

A kernel is one operator that is dispatched: each of PyTorch's that is no view, and each of ours with the kernels that
it launches. Libraries launch several for a factorisation; it counts as one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from machine import Machine
from torch import Tensor


@dataclass
class Work:
    """What was launched so far.

    Attributes:
        machine: that it is predicted for.
        flops: by path, such as "bfloat16".
        waits: times that the host waits for the device.
        device: seconds that the kernels take one after the other, each max(bytes / bandwidth, FLOPs / peak).
    """

    machine: Machine
    bytes: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    launches: float = 0
    waits: float = 0
    device: float = 0.0

    def add(self, kernel: Kernel) -> None:
        """One more operator."""
        m = self.machine
        self.bytes += kernel.bytes
        self.launches += kernel.launches
        seconds = kernel.bytes / (m.bandwidth * m.streamed)
        if kernel.flops:
            self.flops[kernel.path] = self.flops.get(kernel.path, 0.0) + kernel.flops
            seconds = max(seconds, kernel.flops / (m.peaks[kernel.path] * m.reached[kernel.owner]))
        self.device += seconds

    def seconds(self, *, replayed: bool = False) -> float:
        """Kernels and launches, one after the other: eager, or replayed from a CUDA graph, which waits for nothing."""
        if replayed:
            return self.device + self.launches * self.machine.replay
        return self.device + self.launches * self.machine.launch + self.waits * self.machine.wait

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """This and so many times another."""
        paths = {*self.flops, *other.flops}
        flops = {path: self.flops.get(path, 0.0) + times * other.flops.get(path, 0.0) for path in paths}
        names = ("launches", "waits", "bytes", "device")
        sums = {name: getattr(self, name) + times * getattr(other, name) for name in names}
        return Work(self.machine, flops=flops, **sums)

    def since(self, before: Work) -> Work:
        """What came after an earlier copy of this."""
        return self.plus(before, -1)

    def copy(self) -> Work:
        """As it is now."""
        return self.plus(Work(self.machine))


@dataclass(frozen=True)
class Kernel:
    """One operator's call: bytes read and written, FLOPs, their path, whose kernel it is, how many are launched."""

    bytes: float
    flops: float = 0.0
    path: str = ""
    owner: str = "library"
    launches: int = 1


# Neither views nor kernels: they hand out memory, or the same memory again.
NOTHING = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view",
    "aten::lift_fresh", "aten::detach", "aten::promote_types", "aten::resolve_conj", "aten::resolve_neg",
}  # fmt: skip
WRITE_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_"}
NORMS = {"aten::linalg_vector_norm"}  # sums of what is read once
GATHERS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}  # of a table, only what they return


def kernel_of(name: str, arguments: tuple[Any, ...], options: dict[str, Any], out: Any, machine: Machine) -> Kernel:
    """What a call of the operator ``name`` costs."""
    given = [value for option, value in options.items() if option != "out"]
    read, written = list(tensors(arguments)) + list(tensors(given)), list(tensors(out))
    if name in GATHERS:
        return Kernel(2.0 * sum(map(size, written)))
    moved = float(sum(map(size, read[name in WRITE_ONLY :])) + sum(map(size, written)))
    if name in OURS:
        return OURS[name](moved, arguments, options, machine)
    if name.startswith("aten::linalg_") and name not in {*FLOPS, *NORMS}:
        raise RuntimeError(f"kernel_of: {name} must have its FLOPs written down, got none; add it to FLOPS")
    if name in FLOPS:
        counted, owner = FLOPS[name]
        # The last factor: what is added to may be wider than the factors, and a factorisation has one operand.
        return Kernel(moved, counted(read), path(read[-1].dtype), owner)
    return Kernel(moved)


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(values.values())
    elif not isinstance(values, str):
        try:
            members = iter(values)
        except TypeError:
            return
        for value in members:
            yield from tensors(value)


def size(tensor: Tensor) -> int:
    """Bytes that lie in memory: what is spread counts once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def path(dtype: torch.dtype) -> str:
    """Products of float32 take ordinary instructions, as torch has it unless told otherwise."""
    return str(dtype).removeprefix("torch.")


def product(operands: list[Tensor]) -> float:
    """2 m k n of [.., m, k] and [.., k, n] or [k], the last two operands."""
    left, right = operands[-2:]
    return 2.0 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def added_product(operands: list[Tensor]) -> float:
    """As product; the first of three operands is added to."""
    return product(operands[:3])


def factorisation(operands: list[Tensor]) -> float:
    return operands[0].shape[-1] ** 3 / 3


def triangular(operands: list[Tensor]) -> float:
    """n² for each right-hand side."""
    return float(operands[0].shape[-1] * operands[1].numel())


def pairs(length: int, prefix: float, window: int | None) -> float:
    """Query-key pairs of a row of causal queries behind so many prefix keys."""
    if window is None or window >= length + prefix:
        return length * (length + 1) / 2 + length * prefix
    return float(sum(min(window, prefix + index + 1) for index in range(length)))


def flash_pairs(operands: list[Tensor], causal: bool) -> float:
    """FLOPs of flash attention: both products over the visible keys, the last query being the last key."""
    query, key = operands[:2]
    length, keys = query.shape[-2], key.shape[-2]
    seen = pairs(length, keys - length, None) if causal else float(length * keys)
    return 4.0 * query.numel() / length * seen


FLOPS: dict[str, tuple[Callable[[list[Tensor]], float], str]] = {
    "aten::mm": (product, "library"), "aten::bmm": (product, "library"), "aten::mv": (product, "library"),
    "aten::addmm": (added_product, "library"), "aten::addmm_": (added_product, "library"),
    "aten::baddbmm": (added_product, "library"), "aten::addmv": (added_product, "library"),
    "aten::linalg_cholesky_ex": (factorisation, "solve"), "aten::linalg_solve_triangular": (triangular, "solve"),
    "aten::cholesky_solve": (lambda operands: 2 * operands[1].shape[-1] * float(operands[0].numel()), "solve"),
}  # fmt: skip


def flash(moved: float, arguments: tuple[Any, ...], options: dict[str, Any], machine: Machine) -> Kernel:
    place = 4 if isinstance((*arguments, 0.0)[3], float) else 5  # flash attention alone has no mask before dropout
    causal = bool(arguments[place] if len(arguments) > place else options.get("is_causal", False))
    query, key = arguments[:2]
    return Kernel(moved, flash_pairs([query, key], causal), path(query.dtype))


def paired_attention(moved: float, arguments: tuple[Any, ...], options: dict[str, Any], machine: Machine) -> Kernel:
    query, _, _, *prefixes = arguments
    keys = sum(part.shape[1] for part in prefixes[::2] if part is not None)
    return attention(moved, query, keys, options)


def shared_prefix_attention(
    moved: float, arguments: tuple[Any, ...], options: dict[str, Any], machine: Machine
) -> Kernel:
    """Which row sees which prefix is on the device: all are taken to be seen equally often."""
    query, _, _, prefixes, *_ = arguments
    return attention(moved, query, sum(part.shape[1] for part in prefixes) / max(1, len(prefixes)), options)


def attention(moved: float, query: Tensor, keys: float, options: dict[str, Any]) -> Kernel:
    length = query.shape[2]
    flops = 4.0 * query.numel() / max(1, length) * pairs(length, keys, options.get("window"))
    return Kernel(moved, flops, path(query.dtype), "ours")


TILE, TILES_PER_PROCESSOR = 128, 4  # of triton/accumulate_plan.py and csrc/cuda/accumulate.cu


def accumulate(moved: float, arguments: tuple[Any, ...], options: dict[str, Any], machine: Machine) -> Kernel:
    """Row factors and sums, then tiles, each two kernels; the first pair reads the rows once more."""
    cross, delta, activation = arguments[:3]
    rows, (d_out, d_in) = activation.numel() // activation.shape[-1], cross.shape
    scaled = options.get("normalization", "none") != "none"
    statistics = scaled or any(options.get(name) is not None for name in ("delta_sum", "activation_sum", "moments"))
    gram = options.get("gram") is not None
    flops = 2.0 * rows * d_out * d_in + gram * rows * d_in * (d_in + 1.0)
    across, down = ceil(d_in / TILE), ceil(d_out / TILE)
    tiles = down * across + gram * across * (across + 1) // 2
    launches = 2 * ceil(tiles / (TILES_PER_PROCESSOR * machine.processors)) + 2 * statistics
    written = sum(map(size, tensors([cross, *(options.get(name) for name in ("gram", "delta_sum", "activation_sum"))])))
    moved += written + statistics * (size(delta) + size(activation))  # accumulators are read and written
    narrow = activation.dtype == torch.float16 and (scaled or options.get("weights") is not None)
    return Kernel(moved, flops, "tf32" if narrow else path(activation.dtype), "ours", launches)


OURS: dict[str, Callable[[float, tuple[Any, ...], dict[str, Any], Machine], Kernel]] = {
    "aten::_scaled_dot_product_flash_attention": flash,
    "aten::scaled_dot_product_attention": flash,
    "thought_kernels::paired_attention": paired_attention,
    "thought_kernels::shared_prefix_attention": shared_prefix_attention,
    "thought_kernels::accumulate": accumulate,
}
