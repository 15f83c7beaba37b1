"""What acts at a patched site: a hook on its module, and the change of one patch that it makes."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thought_kernels.models.sharded import part, part_of_rows, summed, whole
from thought_kernels.ops.eager import is_eager
from thought_kernels.ops.gathered_low_rank import gathered
from thought_kernels.patches.site import SitePatch
from thought_kernels.patches.stack import Stack, is_differentiated

_FEW = 64  # tokens of a batch: as many as gathered_low_rank reads factors once for


class SiteHook(ABC):
    """What changes the activations of a site: an input x, or an output y with its input x."""

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return True

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The changed x, or the changed y where there is one."""

    def hook(self, site: str, module: nn.Module) -> RemovableHandle:
        """Puts itself to work at the site's module, `hooked`."""
        # prepend: the patch applied last changes the activation first, as W (1 + Δ₁)(1 + Δ₂) does.
        if site == "residual":
            return module.register_forward_hook(self.output_hook, prepend=True)
        if site == "down":
            return module.register_forward_hook(self.added_hook, with_kwargs=True)
        return module.register_forward_pre_hook(self.input_hook, prepend=True, with_kwargs=True)

    def input_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._changed(module, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._changed(module, kwargs[name])}

    def added_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return self._added(module, args[0] if args else next(iter(kwargs.values())), output)

    def output_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)

    def _changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """An input, of which this process may have a part, after the change of the whole."""
        entire = whole(module, x, for_part=True)
        return self(entire) if entire is x else part(module, self(entire))

    def _added(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """An output after its change by the input, of which this process may have a part."""
        return self(whole(module, x), y)


class Change(SiteHook):
    """x -> x + Δ x + v, or y -> y + Δ x + v, on whatever device and in whatever dtype x comes.

    A copy or a pickle of the model takes its hooks along, and no handle could remove them there: theirs do nothing.
    """

    def __init__(self, entry: SitePatch | None) -> None:
        self._entry = entry
        self._source = None if entry is None else weakref.ref(entry)  # of what may be kept as a part alone
        self._vector = None if entry is None else entry.vector
        self._is_part = False
        self._stack: tuple[SitePatch | None, tuple[int, ...], Stack | None] = None, (), None

    @property
    def acts(self) -> bool:
        return self._source is not None

    def is_of(self, entry: SitePatch) -> bool:
        """Whether it was made of this very entry."""
        return self._source is not None and self._source() is entry

    def __reduce__(self) -> tuple[Any, ...]:
        return Change, (None,)

    # Where the model is divided among processes, each keeps the part of Δ that makes or meets its part of x.

    def _changed(self, module: nn.Module, x: Tensor) -> Tensor:
        entire = whole(module, x, for_part=True)
        if entire is x or self._entry is None:
            return self(x)
        if not self._is_part:
            self._entry, self._is_part = self._entry.part(partial(part_of_rows, module), outputs=True), True
        return self(entire, x)

    def _added(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        entry = self._entry
        if entry is None or (entry.matrix is None and entry.factors is None):  # which x does not enter
            return self(x, y)
        if not self._is_part and x.shape[-1] == entry.input_width:
            return self(x, y)
        if not self._is_part:
            self._entry, self._is_part = entry.part(partial(part_of_rows, module), outputs=False), True
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        shift = summed(module, self(x, torch.zeros_like(y, dtype=dtype)))
        if self._vector is not None:
            shift = shift + self._vector.to(shift)
        return (y.to(dtype) + shift).to(y.dtype)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        changed = x if y is None else y
        entry = self._entry  # read once: replicas of the model on several devices run in threads of their own
        if entry is None:
            return changed
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if any(tensor.device != x.device or tensor.dtype != dtype for tensor in entry.tensors().values()):
            # Kept converted: the activations of one block do not change their device or dtype between calls.
            self._entry = entry = entry.to(x.device, dtype)
        if _is_step(entry, x, changed):
            return self._stepped(entry, x, changed)
        with torch.autocast(x.device.type, enabled=False):
            return (changed.to(dtype) + entry.shift(x.to(dtype))).to(changed.dtype)

    def _stepped(self, entry: SitePatch, x: Tensor, changed: Tensor) -> Tensor:
        """The same of a few tokens, all in one operator."""
        of, written, stack = self._stack
        now = _versions(entry)
        if of is not entry or written != now or stack is None:
            stack = Stack([entry], x.device, entry.tensors()["left"].dtype)
            self._stack = entry, now, stack
        return gathered(x, stack.right, stack.left, x.new_zeros(len(x), dtype=torch.int64), stack.vector, changed)


def _versions(entry: SitePatch) -> tuple[int, ...]:
    """They rise when factors are changed in place, as an optimiser does; those of inference tensors are not kept."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in entry.tensors().values())


def _is_step(entry: SitePatch, x: Tensor, changed: Tensor) -> bool:
    """Whether low-rank factors meet so few tokens that they are waited for, more than what is done with them."""
    if entry.factors is None or not is_eager() or x.device.type != "cpu" or x.dim() != 3:
        return False
    return x.shape[:2].numel() <= _FEW and not is_differentiated(x, changed, *entry.tensors().values())
