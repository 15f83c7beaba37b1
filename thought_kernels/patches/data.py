"""What a patch is: a matrix and a vector for each patched block and site, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from thought_kernels.patches.site import SITES, SitePatch


class PatchData:
    """A SitePatch per block and site with its provenance, checked; what is done with them is in the other files.

    Args:
        entries: a SitePatch per (0-based block index, site).
        provenance: where it comes from, JSON values only; ``hidden_size`` and ``model`` are read when it meets a model.

    Raises:
        ValueError: no entries, an unknown site or block index, a residual entry with a matrix, or unequal widths.
    """

    def __init__(
        self, entries: Mapping[tuple[int, str], SitePatch], provenance: Mapping[str, Any] | None = None
    ) -> None:
        _check_entries(entries)
        order = sorted(entries, key=lambda key: (key[0], SITES.index(key[1])))
        self.entries: Mapping[tuple[int, str], SitePatch] = MappingProxyType({key: entries[key] for key in order})
        self.provenance: dict[str, Any] = dict(provenance or {})
        _check_widths(self.entries)

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based indices of the patched blocks."""
        return tuple(sorted({layer for layer, _ in self.entries}))

    @property
    def sites(self) -> tuple[str, ...]:
        """The patched sites."""
        return tuple(site for site in SITES if any(site == patched for _, patched in self.entries))

    @property
    def hidden_size(self) -> int | None:
        """The model's hidden size; None if only the attention site is patched and the provenance does not say."""
        for (_, site), entry in self.entries.items():
            if site != "attention":
                return entry.output_width
        return self.provenance.get("hidden_size")

    def matrix(self, layer: int, site: str) -> Tensor | None:
        """Δ of a block and site, dense ``[d_out, d_in]``, or None; the two widths differ at ``down`` only."""
        entry = self.entries.get((layer, site))
        return None if entry is None else entry.dense()

    def vector(self, layer: int, site: str) -> Tensor | None:
        """v of a block and site, ``[d_out]``, or None."""
        entry = self.entries.get((layer, site))
        return None if entry is None else entry.vector

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self.entries), self.provenance)  # a mapping proxy cannot be copied or sent elsewhere


def _check_entries(entries: Mapping[tuple[int, str], SitePatch]) -> None:
    if not entries:
        raise ValueError("ThoughtPatch: entries must hold at least one block and site, got none")
    for (layer, site), entry in entries.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"ThoughtPatch: layer must be a 0-based block index, got {layer!r}")
        if site not in SITES:
            raise ValueError(f"ThoughtPatch: site must be one of {', '.join(SITES)}, got {site!r}")
        if site == "residual" and entry.vector is None:
            raise ValueError(f"ThoughtPatch: site 'residual' must have a vector, got none; block {layer}")
        if site == "residual" and (entry.matrix is not None or entry.factors is not None):
            raise ValueError(f"ThoughtPatch: site 'residual' must have a vector only, got a matrix; block {layer}")
        if site != "down" and entry.input_width not in (None, entry.output_width):
            raise ValueError(
                f"ThoughtPatch: site {site!r} must have one width, got {entry.output_width} from "
                f"{entry.input_width}; block {layer}"
            )


def _check_widths(entries: Mapping[tuple[int, str], SitePatch]) -> None:
    """One width among attention sites, one among the others, and one that down_proj reads."""
    widths = {(site == "attention", entry.output_width) for (_, site), entry in entries.items()}
    into_down = {entry.input_width or 0 for (_, site), entry in entries.items() if site == "down"} - {0}
    hidden, attention = ({width for inside, width in widths if inside == wanted} for wanted in (False, True))
    for found in (hidden, attention, into_down):
        if len(found) > 1:
            raise ValueError(f"ThoughtPatch: entries must share one width per site, got {sorted(found)}")
