"""Several patches at work in one model, each in the rows of a batch that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from thought_kernels.ops.gathered_low_rank import gathered
from thought_kernels.patches.apply import check_unshared, forget_compiled, hooked, targets
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch
from thought_kernels.patches.site_hook import SiteHook
from thought_kernels.patches.stack import Stack, is_differentiated


class MixedPatches:
    """Serves a batch whose rows want different patches, or none, in one forward.

        x_b -> x_b + U_p V_pᵀ x_b + v_p        p = the patch of row b; at the down site added to down_proj's output

    Where every patch has factors at a site (``patch.truncate(64)``), they are stacked once, each row reads those of its
    own patch where they lie, and rows of one patch read them together: `gathered_low_rank`. Another choice lays nothing
    out anew. The stack has as many ranks for each patch as the largest has, zeros where its own end (an infinite
    activation meets them as NaN). Where gradients are recorded torch's products take the place of that operator, which
    has none, and copy each row's factors. Dense matrices are applied patch by patch to their own rows.

        with MixedPatches(model, {"french": french, "pirate": pirate}) as mixed:
            mixed.choose(["french", None, "pirate"])
            model.generate(**batch)  # of three prompts

    Args:
        model: a transformers model; its weights are not touched.
        patches: by name.

    Raises:
        ValueError: no patches, or one that ``ThoughtPatch.applied`` refuses.
    """

    def __init__(self, model: Any, patches: Mapping[str, PatchData]) -> None:
        if not isinstance(patches, Mapping) or not patches:
            raise ValueError(
                f"MixedPatches: patches must be a dict with a patch at least, got {patches!r}; give each a name"
            )
        self._names = {name: index for index, name in enumerate(patches)}
        self._chosen: list[int | None] | None = None
        self._handles: list[RemovableHandle] = []
        entries: dict[tuple[int, str], list[SitePatch | None]] = {}
        modules = {}
        for index, patch in enumerate(patches.values()):
            for key, entry, block in targets("MixedPatches", patch, model):
                entries.setdefault(key, [None] * len(patches))[index] = entry
                modules[key] = hooked(key[1], block)
        check_unshared("MixedPatches", model, list(modules.items()))
        self._sites = [(key, modules[key], _Site(entries[key], self)) for key in entries]

    def choose(self, rows: Sequence[str | None]) -> None:
        """Says which patch each row of the following batches wants, by name; None for none.

        Where a batch holds several times as many rows, as in a search by beams, each of these stands for as many.

        Raises:
            ValueError: a name that no patch has.
        """
        unknown = [name for name in rows if name is not None and name not in self._names]
        if unknown or not rows:
            raise ValueError(
                f"choose: rows must be names among {', '.join(self._names)}, or None, one for each row, got "
                f"{unknown[0] if unknown else 'no row'!r}"
            )
        self._chosen = [None if name is None else self._names[name] for name in rows]

    @property
    def is_chosen(self) -> bool:
        """Whether some row wants a patch."""
        return any(row is not None for row in self._chosen or ())

    def chosen(self, count: int) -> list[int | None]:
        """Each of a batch's rows' patch, by number."""
        rows = self._chosen
        if rows is None or count % len(rows):
            told = "none were" if rows is None else f"{len(rows)} were"
            raise ValueError(
                f"MixedPatches: rows must be chosen for a batch of {count}, {told}; call choose with a name, or None, "
                "for each"
            )
        return [row for row in rows for _ in range(count // len(rows))]

    def __enter__(self) -> MixedPatches:
        self._handles = [change.hook(site, module) for (_, site), module, change in self._sites]
        forget_compiled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        forget_compiled()


class _Site(SiteHook):
    """One block's site: every patch's entry there, None where a patch has none."""

    def __init__(self, entries: list[SitePatch | None], owner: MixedPatches) -> None:
        self._entries, self._owner = entries, owner
        present = [entry for entry in entries if entry is not None]
        self._low_rank = all(entry.factors is not None for entry in present)
        self._stack: Stack | None = None
        self._rows: list[int | None] = []
        self._index: Tensor | None = None

    @property
    def acts(self) -> bool:
        return self._owner.is_chosen

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        changed = x if y is None else y
        rows = self._owner.chosen(len(x))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self._low_rank:
            return self._gathered(rows, x, changed, dtype)
        entries = [entry for entry in self._entries if entry is not None]
        tensors = [tensor for entry in entries for tensor in entry.tensors().values()]
        if any(tensor.device != x.device or tensor.dtype != dtype for tensor in tensors):
            self._entries = [None if entry is None else entry.to(x.device, dtype) for entry in self._entries]
        with torch.autocast(x.device.type, enabled=False):
            return self._patch_by_patch(rows, x.to(dtype), changed.to(dtype, copy=True)).to(changed.dtype)

    def _gathered(self, rows: list[int | None], x: Tensor, changed: Tensor, dtype: torch.dtype) -> Tensor:
        stack = self._stack
        if stack is None or stack.right.device != x.device or stack.right.dtype != dtype:
            self._stack = stack = Stack(self._entries, x.device, dtype)
            self._index = None
        if self._index is None or rows != self._rows:
            self._rows, self._index = rows, stack.index(rows)
        if not is_differentiated(x, changed):
            return gathered(x, stack.right, stack.left, self._index, stack.vector, changed)
        with torch.autocast(x.device.type, enabled=False):  # the operator has no gradient
            return (changed.to(dtype) + stack.shift(x.to(dtype), self._index)).to(changed.dtype)

    def _patch_by_patch(self, rows: list[int | None], x: Tensor, changed: Tensor) -> Tensor:
        for index, entry in enumerate(self._entries):
            places = [place for place, row in enumerate(rows) if row == index]
            if entry is not None and places:
                own = torch.tensor(places, device=x.device)
                changed.index_add_(0, own, entry.shift(x.index_select(0, own)).expand(len(own), *changed.shape[1:]))
        return changed
