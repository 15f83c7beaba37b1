"""Whether tensors share memory: what is written may overlap nothing else of the call."""

from __future__ import annotations

import math

from torch import Tensor

from thought_kernels.ops.checks import addresses
from thought_kernels.ops.library import message


def check_overlap(function: str, read: dict[str, Tensor | None], written: dict[str, Tensor | None]) -> None:
    """Raises if anything written shares memory with anything else of the call, or with itself.

    Args:
        function: stands first in the error.
        read: inputs by name; None is left out.
        written: outputs by name; None is left out.

    Raises:
        ValueError: naming the first two arguments that meet.
    """
    sources = [(name, tensor) for name, tensor in read.items() if tensor is not None]
    targets = [(name, tensor) for name, tensor in written.items() if tensor is not None]
    for name, tensor in targets:
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            actual = f"strides {list(tensor.stride())} for shape {list(tensor.shape)}"
            raise ValueError(message(function, name, "have one address for each element", actual))
    if not _may_overlap([tensor for _, tensor in sources], [tensor for _, tensor in targets]):
        return
    for index, (name, tensor) in enumerate(targets):
        for other_name, other in targets[index + 1 :] + sources:
            if _overlap(tensor, other):
                fix = f"pass {other_name}.clone()"
                raise ValueError(message(function, name, f"not overlap {other_name}", "shared memory", fix))


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _may_overlap(read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether the address range of anything written meets another: a quick no for the usual call."""
    ranges = [(*addresses(tensor), False) for tensor in read] + [(*addresses(tensor), True) for tensor in written]
    reach = written_reach = 0
    for start, end, is_written in sorted(ranges):
        if start < (reach if is_written else written_reach):
            return True
        reach = max(reach, end)
        if is_written:
            written_reach = max(written_reach, end)
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_start, a_end), (b_start, b_end) = addresses(a), addresses(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    # Interleaved but disjoint: columns side by side in one buffer, such as [cross | gram | delta_sum].
    (pitch, width), (other_pitch, other_width) = _columns(a), _columns(b)
    if pitch and pitch == other_pitch:
        shift = (b_start - a_start) % pitch
        return shift < width or shift + other_width > pitch
    # Or elements of one buffer in turn, such as buffer[..., 0] and buffer[..., 1].
    step = math.gcd(*(stride * x.element_size() for x in (a, b) for stride in _steps(x)))
    shift = (b_start - a_start) % step if step else 0
    return shift < a.element_size() or shift + b.element_size() > step


def _steps(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _columns(tensor: Tensor) -> tuple[int, int]:
    """Bytes from row to row and bytes in a row of a matrix with dense rows, or of a vector as one column; else 0, 0."""
    if tensor.dim() not in (1, 2) or (tensor.dim() == 2 and tensor.stride(1) != 1):
        return 0, 0
    width = tensor.shape[1] if tensor.dim() == 2 else 1
    return tensor.stride(0) * tensor.element_size(), width * tensor.element_size()
