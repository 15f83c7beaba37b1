"""A patch at work in a model through hooks, its weights untouched."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thought_kernels.models import Block, describe
from thought_kernels.ops.caller import warn
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch, is_finite
from thought_kernels.patches.site_hook import Change, SiteHook


class AppliedPatch:
    """A patch at work in a model through hooks; ``ThoughtPatch.applied`` makes it, ``remove`` ends it.

    Args:
        patch: the patch.
        model: a transformers model.
    """

    def __init__(self, patch: PatchData, model: Any) -> None:
        checked = [(key, entry, hooked(key[1], block)) for key, entry, block in targets("applied", patch, model)]
        check_unshared("applied", model, [(key, module) for key, _, module in checked])
        self._handles: list[RemovableHandle] = []
        try:
            decoder = describe(model)
            if any(_acts(entry, module) for _, entry, module in checked):
                warn(_TWICE)
            watch = _Watch(decoder.model)
            for layer in sorted({layer for layer, _ in patch.entries}):
                self._handles.append(decoder.blocks[layer].layer.register_forward_pre_hook(watch.input_hook))
            for (_, site), entry, module in checked:
                self._handles.append(Change(entry).hook(site, module))
            forget_compiled()
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
            forget_compiled()

    def __enter__(self) -> AppliedPatch:
        if not self._active:
            raise ValueError("applied: handle must be active, got a removed one; call patch.applied(model) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def is_patched(model: nn.Module) -> bool:
    """Whether a patch acts in the model through hooks."""
    return any(isinstance(owner, SiteHook) and owner.acts for module in model.modules() for owner in _owners(module))


def _acts(entry: SitePatch, module: nn.Module) -> bool:
    """Whether this very entry acts in the module already."""
    return any(isinstance(owner, Change) and owner.is_of(entry) for owner in _owners(module))


def _owners(module: nn.Module) -> Iterator[Any]:
    """What the module's hooks are methods of."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        yield getattr(hook, "__self__", None)


def hooked(site: str, block: Block) -> Any:
    """The module whose input or output a site's patch changes."""
    modules = {"attention": block.o_proj, "mlp": block.mlp, "down": block.down_proj, "residual": block.layer}
    return modules[site]


def forget_compiled() -> None:
    """Makes torch.compile look at modules again: its graphs do not notice that hooks came or went.

    Nothing says which compiled functions hold a module, so all of them are compiled anew at their next call. Only their
    code is dropped: torch.compiler.reset would also drop CUDA graphs, callbacks and what exported graphs refer to.
    """
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch._dynamo.reset_code_caches()


_TWICE = (
    "applied: patch should act once, got one that acts in this model already and now acts twice; remove() the earlier "
    "handle, or use 2 * patch where that is meant"
)
_RUN_AGAIN = (
    "applied: model should not checkpoint gradients with use_reentrant=True, got a model that does; call backward "
    "before the patch is removed, or the gradients are silently those of no model: "
    "gradient_checkpointing_kwargs={'use_reentrant': False} raises there"
)


def _runs_again(module: nn.Module) -> bool:
    """Whether transformers would have a backward pass run the module again: once the patch is gone, without it."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None or not (module.training and getattr(module, "gradient_checkpointing", False)):
        return False
    return getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False


class _Watch:
    """Warns once of a model that runs blocks again, now or in a forward later on, whoever checkpoints them.

    A copy or a pickle of the model takes its hooks along; there they do nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._told = model is None
        if model is not None and any(map(_runs_again, model.modules())):
            self._tell()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, (None,)

    def _tell(self) -> None:
        self._told = True
        warn(_RUN_AGAIN)

    def input_hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Looks at a block that is about to run."""
        if self._told or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            again = _runs_again(module)
        else:  # as in a reentrant checkpoint, whose input does have gradients; a leaf may be a user's under no_grad
            again = any(isinstance(x, Tensor) and x.requires_grad and not x.is_leaf for x in args)
        if again:
            self._tell()


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


def check_unshared(function: str, model: Any, touched: Iterable[tuple[tuple[int, str], nn.Module]]) -> None:
    """Raises if a module that is to be changed is several blocks' at once: what is done for one would be done to all.

    Args:
        function: opens the error's sentence.
        model: a transformers model. Its weights may be tied.
        touched: ((block, site), module) each.
    """
    owners: dict[int, list[int]] = {}
    for block in describe(model).blocks:
        for module in block.layer.modules():
            owners.setdefault(id(module), []).append(block.index)
    for (layer, site), module in touched:
        if len(owners[id(module)]) > 1:
            raise ValueError(
                f"{function}: patch must not change a module that several blocks share, got one "
                f"{type(module).__name__} in the blocks {owners[id(module)]}; block {layer}, site {site!r}: give each "
                "block a copy of its own"
            )
