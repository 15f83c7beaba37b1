"""Runs code for a GPU on tensors without data, and counts what a GPU would be given.

Tensors on torch's meta device stand for those of the GPU: code takes the same path as there, all shapes are real, and a
tensor that was left on the host shows as an error. What the code would read back from the device is made up: numbers
are 1, but 0 where they are integers (a factorisation's success) or a smallest element (a singular matrix, as rows of
random weights give), and every element of a mask is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from machine import Machine
from roofline import NOTHING, Kernel, Work, kernel_of, tensors
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@contextlib.contextmanager
def counting(machine: Machine) -> Iterator[Work]:
    """Within it, operators on meta tensors are counted."""
    work = Work(machine)
    without_autocast = mock.patch.object(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with without_autocast, _Whole(work), _Counting(work):  # autocast knows no meta device
        yield work


class _Whole(TorchFunctionMode):
    """torch's own attention and RMSNorm as one kernel each, as a GPU has them; meta tensors would see them in parts."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (scaled_dot_product_attention, rms_norm) or not args[0].is_meta:
            return func(*args, **kwargs)
        out = torch.empty_like(args[0])
        self.work.add(kernel_of(f"aten::{func.__name__}", args, kwargs, out, self.work.machine))
        return out


class _Counting(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.known: dict[Any, tuple[Kernel, dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, _described(args), _described(kwargs)) if _is_function(func) else None
        if key in self.known:  # meta kernels of torch take far longer than to make an output of the same kind
            kernel, layout = self.known[key]
            self.work.add(kernel)
            return torch.empty_strided(**layout, device="meta")
        given = list(tensors(args)) + list(tensors(kwargs))
        if any(tensor.is_meta for tensor in given):
            answered, out = self._read_back(func, args, kwargs)
            if answered:
                return out
        if func is aten.addmm.dtype_out and kwargs["out"].is_meta:  # of GPUs alone
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        if func is aten.min.default:
            out.answer = 0.0
        kernel = self._counted(func, args, kwargs, given, out)
        if kernel is not None and key is not None and all(tensor.is_meta for tensor in given) and out.is_meta:
            self.known[key] = kernel, {"size": out.shape, "stride": out.stride(), "dtype": out.dtype}
        return out

    def _counted(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], out: Any
    ) -> Kernel | None:
        """Counts a call, unless it is none of the device's."""
        name = func._schema.name
        silent = name in NOTHING or func.is_view or torch.Tag.inplace_view in func.tags
        if silent or not any(tensor.is_meta for tensor in (*given, *tensors(out))):
            return None
        self.work.waits += _from_host(name, given)
        kernel = kernel_of(name, args, kwargs, out, self.work.machine)
        self.work.add(kernel)
        return kernel

    def _read_back(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether the host would wait for what the device holds, and what it is told."""
        source = args[0]
        if func is aten._local_scalar_dense.default:
            told: Any = _number(source)
        elif func is aten.nonzero.default:
            told = torch.arange(source.numel(), device="meta")[:, None]
        elif func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            told = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif func is aten.copy_.default and not source.is_meta:
            told = source
        else:
            return False, None
        self.work.waits += 1
        self.work.launches += 1
        return True, told


def _is_function(func: Any) -> bool:
    """Whether an operator returns one new tensor and writes nowhere; not those of which something else is told."""
    returned = func._schema.returns
    one = len(returned) == 1 and returned[0].alias_info is None and str(returned[0].type) == "Tensor"
    return one and not func._schema.is_mutable and func not in (aten.min.default, aten.nonzero.default)


def _described(value: Any) -> Any:
    """All that a call's output depends on, to be hashed: 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta, value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return tuple((name, _described(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value


def _from_host(name: str, given: list[Tensor]) -> bool:
    """Whether a call copies from the host; as on a GPU only copies and indices may, but for a single number."""
    left = any(not tensor.is_meta and tensor.dim() for tensor in given)
    if left and name not in ("aten::_to_copy", "aten::copy_", "aten::index"):
        raise RuntimeError(f"counting: tensors of {name} must be on one device, got one on the host")
    return left


def _number(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return getattr(tensor, "answer", 1.0) if tensor.is_floating_point() else 0
