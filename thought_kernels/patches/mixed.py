"""Several patches at work in one model, each in the rows of a batch that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from thought_kernels.patches.apply import SiteHook, check_unshared, forget_compiled, hooked, targets
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch


class MixedPatches:
    """Serves a batch whose rows want different patches, or none, in one forward.

        x_b -> x_b + U_p V_pᵀ x_b + v_p        p = the patch of row b; at the down site added to down_proj's output

    Where every patch has factors at a site (``patch.truncate(64)``), those of the rows are laid side by side once for a
    choice, B · rank · (d_in + d_out) numbers a site, and the site is two batched products. Dense matrices are applied
    patch by patch to their own rows.

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
        for _, _, site in self._sites:
            site.forget()

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
        self._rows: list[int | None] = []
        self._laid: tuple[Tensor, Tensor, Tensor | None] | None = None

    def forget(self) -> None:
        """Drops what was laid out for another choice."""
        self._rows, self._laid = [], None

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        changed = x if y is None else y
        rows = self._owner.chosen(len(x))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if rows != self._rows or (self._laid is not None and self._laid[0].device != x.device):
            self._entries = [None if entry is None else entry.to(x.device, dtype) for entry in self._entries]
            self._rows, self._laid = rows, self._lay(rows)
        with torch.autocast(x.device.type, enabled=False):
            if self._laid is not None:
                left, right, vector = self._laid
                shift = torch.bmm(torch.bmm(x.to(dtype), right), left)
                shift = shift if vector is None else shift + vector
                return (changed.to(dtype) + shift).to(changed.dtype)
            return self._patch_by_patch(x.to(dtype), changed.to(dtype, copy=True)).to(changed.dtype)

    def _lay(self, rows: list[int | None]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Uᵀ [B, r, d_out], V [B, d_in, r] and v [B, 1, d_out] of the rows, with zeros; None where a Δ is dense."""
        present = [entry for entry in self._entries if entry is not None]
        if not all(entry.factors is not None for entry in present):
            return None
        rank = max(entry.factors[0].shape[1] for entry in present if entry.factors is not None)
        first = present[0].factors
        assert first is not None
        left = first[0].new_zeros(len(rows), rank, first[0].shape[0])
        right = first[1].new_zeros(len(rows), first[1].shape[0], rank)
        vector = left.new_zeros(len(rows), 1, left.shape[2])
        for place, index in enumerate(rows):
            entry = None if index is None else self._entries[index]
            if entry is None or entry.factors is None:
                continue
            own = entry.factors[0].shape[1]
            left[place, :own], right[place, :, :own] = entry.factors[0].T, entry.factors[1]
            if entry.vector is not None:
                vector[place, 0] = entry.vector
        return left, right, vector if any(entry.vector is not None for entry in present) else None

    def _patch_by_patch(self, x: Tensor, changed: Tensor) -> Tensor:
        for index, entry in enumerate(self._entries):
            places = [place for place, row in enumerate(self._rows) if row == index]
            if entry is not None and places:
                own = torch.tensor(places, device=x.device)
                changed.index_add_(0, own, entry.shift(x.index_select(0, own)).expand(len(own), *changed.shape[1:]))
        return changed
