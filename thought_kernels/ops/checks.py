"""Argument rules that several operators share, each with the project's error sentence, and where a tensor lies."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thought_kernels.ops.library import message

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _dense(function: str, name: str, rule: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(message(function, name, f"be {rule}", type(tensor).__name__))
    found = not_dense(tensor)
    if found is not None:
        raise TypeError(message(function, name, f"be {rule} that is dense", *found))
    return tensor


def not_dense(tensor: Tensor) -> tuple[object, str] | None:
    """What a tensor is that has no shape with a stride for each size, and what to do about it; None for a dense one."""
    if tensor.is_nested:
        return "a nested tensor", "pad it, as to_padded_tensor() does"
    if tensor.layout != torch.strided:
        return tensor.layout, ""
    return None


def check_float_tensor(function: str, name: str, tensor: object) -> None:
    """A dense tensor of one of the four floating dtypes that kernels take."""
    tensor = _dense(function, name, "a tensor", tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(message(function, name, "be float64, float32, bfloat16 or float16", tensor.dtype))


def check_like(function: str, name: str, tensor: object, other_name: str, other: Tensor) -> None:
    """A dense tensor of another's dtype, on its device."""
    tensor = _dense(function, name, "a tensor", tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(message(function, name, f"have {other_name}'s dtype {other.dtype}", tensor.dtype))
    check_device(function, name, tensor, other_name, other)


def check_device(function: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor on another's device."""
    if tensor.device != other.device:
        raise ValueError(message(function, name, f"be on {other_name}'s device {other.device}", tensor.device))


def check_row_integers(function: str, name: str, tensor: object, rows: Tensor, rows_name: str = "query") -> None:
    """An integer for each row of a batch, on its device."""
    tensor = _dense(function, name, "an integer tensor", tensor)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(message(function, name, "be an integer tensor", tensor.dtype))
    if tensor.dim() != 1 or tensor.shape[0] != rows.shape[0]:
        raise ValueError(message(function, name, f"be [B] with B = {rows.shape[0]}", list(tensor.shape)))
    check_device(function, name, tensor, rows_name, rows)


def check_range(function: str, name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Integers within low .. high. Not read while a CUDA graph is captured, where reading them is an error."""
    if tensor is None or tensor.numel() == 0 or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < low or largest > high:
        raise ValueError(
            message(function, name, f"be between {low} and {high}", smallest if smallest < low else largest)
        )


def addresses(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's elements, and the one after the last; the two are equal for an empty tensor."""
    start = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return start, start + tensor.numel() * tensor.element_size()
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (last + 1) * tensor.element_size()


def check_number(function: str, name: str, number: object, *, positive: bool = False, or_zero: bool = False) -> None:
    """A finite number, and positive, or not negative, where asked for."""
    if isinstance(number, torch.SymFloat):
        return
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(message(function, name, "be a number", type(number).__name__))
    rule = "be finite" + (" and at least 0" if or_zero else " and positive" if positive else "")
    if not _is_finite(number) or (or_zero and number < 0) or (positive and number <= 0):
        raise ValueError(message(function, name, rule, number))


def as_number(function: str, name: str, value: Any) -> float:
    """A finite number of any kind, numpy's too, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message(function, name, "be a number", repr(value)))
    if not _is_finite(value):  # type: ignore[arg-type]
        raise ValueError(message(function, name, "be finite", value))
    return float(value)


def as_integer(function: str, name: str, value: Any, *, least: int | None = None) -> int:
    """An integer of any kind, numpy's too, as an int, and at least some number where asked for."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    if integer is None:
        raise TypeError(message(function, name, "be an integer", repr(value)))
    if least is not None and integer < least:
        raise ValueError(message(function, name, f"be at least {least}", integer))
    return integer


def as_path(function: str, name: str, value: Any) -> Path:
    """A path, given as a text or as one."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(message(function, name, "be a path", type(value).__name__))
    return Path(value)


def check_choice(function: str, name: str, value: object, known: Iterable[str]) -> None:
    """One of some names."""
    if value not in tuple(known):
        raise ValueError(message(function, name, f"be one of {', '.join(known)}", repr(value)))


def _is_finite(number: float) -> bool:
    """Whether a number, which may be an int of any size, is finite as a float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
