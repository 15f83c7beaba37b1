"""A patch at work in a model through hooks, its weights untouched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thought_kernels.models import describe
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch, is_finite


class AppliedPatch:
    """A patch at work in a model through hooks; ``ThoughtPatch.applied`` makes it, ``remove`` ends it.

    Args:
        patch: the patch.
        model: a transformers model.
    """

    def __init__(self, patch: PatchData, model: Any) -> None:
        checked = list(targets("applied", patch, model))
        self._handles: list[RemovableHandle] = []
        try:
            for (_, site), entry, block in checked:
                change = _Change(entry)
                # prepend: the patch applied last changes the activation first, as W (1 + Δ₁)(1 + Δ₂) does.
                if site == "residual":
                    handle = block.layer.register_forward_hook(change.output_hook, prepend=True)
                elif site == "down":
                    handle = block.down_proj.register_forward_hook(change.added_hook, with_kwargs=True)
                else:
                    module = block.o_proj if site == "attention" else block.mlp
                    handle = module.register_forward_pre_hook(change.input_hook, prepend=True, with_kwargs=True)
                self._handles.append(handle)
            _forget_compiled()
        except BaseException:
            self.remove()
            raise
        self._active = True

    def remove(self) -> None:
        """Ends the patch; calling it again does nothing. The weights were never touched."""
        self._active = False
        had_hooks = bool(self._handles)
        while self._handles:
            self._handles.pop().remove()
        if had_hooks:
            _forget_compiled()

    def __enter__(self) -> AppliedPatch:
        if not self._active:
            raise ValueError("applied: handle must be active, got a removed one; call patch.applied(model) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _forget_compiled() -> None:
    """Makes torch.compile look at modules again: its graphs do not notice that hooks came or went.

    Nothing says which compiled functions hold a module, so all of them are compiled anew at their next call. Only their
    code is dropped: torch.compiler.reset would also drop CUDA graphs, callbacks and what exported graphs refer to.
    """
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch._dynamo.reset_code_caches()


class _Change:
    """x -> x + Δ x + v, or y -> y + Δ x + v, on whatever device and in whatever dtype x comes."""

    def __init__(self, entry: SitePatch) -> None:
        self._entry = entry

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if any(tensor.device != x.device or tensor.dtype != dtype for tensor in self._entry.tensors().values()):
            # Kept converted: the activations of one block do not change their device or dtype between calls.
            self._entry = self._entry.to(x.device, dtype)
        changed = x if y is None else y
        with torch.autocast(x.device.type, enabled=False):
            return (changed.to(dtype) + self._entry.shift(x.to(dtype))).to(changed.dtype)

    def input_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self(kwargs[name])}

    def added_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return self(args[0] if args else next(iter(kwargs.values())), output)

    def output_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


def targets(function: str, patch: PatchData, model: Any) -> Iterator[tuple[tuple[int, str], SitePatch, Any]]:
    """Each entry with its block, after checking all of them against the model."""
    decoder = describe(model)
    made_for = patch.provenance.get("model")
    origin = f"; it was made for {made_for}" if made_for else ""
    hidden_size = patch.hidden_size
    if hidden_size is not None and hidden_size != decoder.hidden_size:
        raise ValueError(
            f"{function}: patch must have the model's hidden size {decoder.hidden_size}, got {hidden_size}{origin}"
        )
    missing = [layer for layer in patch.layers if layer >= len(decoder.blocks)]
    if missing:
        raise ValueError(
            f"{function}: patch must have blocks 0 to {len(decoder.blocks) - 1} only, got {missing}, "
            f"which the model lacks{origin}"
        )
    for (layer, site), entry in patch.entries.items():
        block = decoder.blocks[layer]
        if (site == "mlp" and not block.mlp_inputs) or (site == "down" and block.down_proj is None):
            raise ValueError(
                f"{function}: patch must not have site {site!r} at block {layer}, whose MLP is a mixture of experts, "
                f"got one{origin}"
            )
        width = block.attention_width if site == "attention" else decoder.hidden_size
        input_width = block.mlp_width if site == "down" else width
        for actual, wanted in ((entry.output_width, width), (entry.input_width, input_width)):
            if actual not in (wanted, None):
                raise ValueError(
                    f"{function}: patch must have width {wanted} at block {layer}, site {site!r}, got {actual}; the "
                    f"model's hidden size is {decoder.hidden_size}, the patch's {hidden_size or 'unknown'}{origin}"
                )
        for name, tensor in entry.tensors().items():
            if not is_finite(tensor):
                raise ValueError(
                    f"{function}: {name} must be finite, got NaN or an infinity; block {layer}, site {site!r}"
                )
    return ((key, entry, decoder.blocks[key[0]]) for key, entry in patch.entries.items())
