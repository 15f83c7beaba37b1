"""ThoughtAccumulator: the streaming sums of every targeted block and site, and what they are solved into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thought_kernels.estimation import estimators
from thought_kernels.estimation.agreement import agreed
from thought_kernels.estimation.kept_rows import KeptRows
from thought_kernels.estimation.rows import add_vectors, check_rows, check_shapes, check_weights, checked_place
from thought_kernels.estimation.scales import warn_if_worse
from thought_kernels.estimation.state import read_state, state_of
from thought_kernels.estimation.sums import Sums, copied, zeros
from thought_kernels.ops.accumulate import NORMALIZATIONS, accumulate
from thought_kernels.ops.checks import check_number
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import MATRIX_SITES, SITES, is_finite
from thought_kernels.version import __version__


class ThoughtAccumulator:
    """Streams rows (δ, a, w) of many blocks and sites into sums small enough to solve.

    Formula: C += Σ w δ aᵀ/ν, Z += Σ w a aᵀ/ν, b += Σ w δ, ā += Σ w a, Ω += Σ w, with ν = 1, ‖a‖ or ‖a‖².
    The residual site keeps b and Ω only. Sums of a block and site are created by its first rows, on their device. While
    those rows are fewer than a is wide they are kept as they are, which takes less memory and less time to solve.

    Args:
        normalization: ν, ``"none"``, ``"norm"`` or ``"squared_norm"``.
        dtype: of the sums, float32 or float64; claims of exact interpolation need float64.
        device: where all sums are kept; None keeps each on the device of its first rows.

    Raises:
        ValueError: unknown normalization or dtype.

    Source: "Transmuting prompts into weights", Algorithm 1 and eq. 8.
    """

    matrix_sites: tuple[str, ...] = MATRIX_SITES  # whose rows are summed with their activations

    def __init__(
        self,
        *,
        normalization: str = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"ThoughtAccumulator: normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"ThoughtAccumulator: dtype must be torch.float32 or torch.float64, got {dtype}")
        self.normalization = normalization
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        self._sums: dict[tuple[int, str], Sums | KeptRows] = {}

    def __repr__(self) -> str:
        return (
            f"ThoughtAccumulator(normalization={self.normalization!r}, dtype={self.dtype}, "
            f"{len(self._sums)} block sites, blocks {list(self.layers)})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based indices of the blocks that hold sums."""
        return tuple(sorted({layer for layer, _ in self._sums}))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that hold sums."""
        return tuple(site for site in SITES if any(site == held for _, held in self._sums))

    def sums(self, layer: int, site: str) -> Sums | None:
        """The live sums of one block and site, None before its first rows; kept rows are summed for it."""
        return self._summed((layer, site)) if (layer, site) in self._sums else None

    def drop(self, layer: int, site: str) -> None:
        """Forgets one block and site, so that its memory is free."""
        self._sums.pop((layer, site), None)

    @torch.no_grad()
    def update(
        self, layer: int, site: str, delta: Tensor, activation: Tensor | None, weights: Tensor | None = None
    ) -> None:
        """Adds rows to the sums of one block and site.

        Rows of weight zero are padding: they add nothing, whatever they hold.

        Args:
            layer: 0-based block index.
            site: ``"attention"``, ``"mlp"``, ``"down"`` or ``"residual"``.
            delta: with-context minus without-context activation, ``[..., d_out]``, any float dtype.
            activation: without-context activation, ``[..., d_in]``, d_in = d_out but at ``"down"``; ignored, and may be
                None, at ``"residual"``.
            weights: w ≥ 0, shape = the leading dimensions of delta, None for all ones.

        Raises:
            ValueError: unknown site, mismatched shapes, a width other than earlier rows', negative weights, or NaN or
                an infinity in a row of nonzero weight. Nothing is written then.
            TypeError: an input that is not a floating-point tensor.
        """
        where = checked_place(layer, site)
        matrix = site in self.matrix_sites
        rows = {"delta": delta, "activation": activation} if matrix else {"delta": delta}
        check_shapes(rows, delta, where, one_width=site != "down")
        widths = (delta.shape[-1], (activation if matrix and activation is not None else delta).shape[-1])
        held = self._sums.get((layer, site))
        for name, width, before in zip(("delta", "activation"), widths, held.widths if held else widths, strict=True):
            if width != before:
                raise ValueError(f"update: {name} must have width {before} as before, got {width}; {where}")
        device = held.device if held else self.device or delta.device
        check_weights(weights, delta.shape[:-1], where)
        weights = None if weights is None else weights.to(device)
        moved = {name: tensor.to(device) for name, tensor in rows.items() if tensor is not None}
        for name, tensor in moved.items():
            check_rows(name, tensor, weights, where)

        if held is None:
            held = KeptRows(widths, self.dtype, device) if matrix else self._zeros(site, widths, device)
            self._sums[layer, site] = held
        if isinstance(held, KeptRows) and held.takes(delta.shape[:-1].numel()):
            held.add(moved["delta"], moved["activation"], weights)
        else:
            self._add(self._summed((layer, site)), moved["delta"], moved.get("activation"), weights)

    def merge(self, other: ThoughtAccumulator) -> None:
        """Adds another accumulator's sums to these: the same as having been given its rows too.

        Raises:
            ValueError: another normalization, dtype or width, or rows or sums that are not finite. Nothing is written
                then.
            TypeError: something other than a ThoughtAccumulator.
        """
        if not isinstance(other, ThoughtAccumulator):
            raise TypeError(f"merge: other must be a ThoughtAccumulator, got {type(other).__name__}")
        if other is self:
            raise ValueError("merge: other must be another accumulator, got this one; its rows would count twice")
        for name in ("normalization", "dtype"):
            if getattr(other, name) != getattr(self, name):
                raise ValueError(f"merge: other must have {name} {getattr(self, name)}, got {getattr(other, name)}")
        for key, theirs in other._sums.items():
            ours = self._sums.get(key)
            if ours is not None and ours.widths != theirs.widths:
                raise ValueError(
                    f"merge: other must have width {_words(ours.widths)}, got {_words(theirs.widths)}; "
                    f"block {key[0]}, site {key[1]!r}"
                )
            held = theirs.joined() if isinstance(theirs, KeptRows) else theirs.tensors().values()
            if not all(map(is_finite, held)):
                raise ValueError(
                    f"merge: other must hold finite numbers, got NaN or an infinity; block {key[0]}, site {key[1]!r}; "
                    f"its rows overflowed {self.dtype}"
                )
        for key, theirs in other._sums.items():
            if isinstance(theirs, KeptRows):
                self.update(*key, *theirs.joined())
            elif key not in self._sums:
                self._sums[key] = copied(theirs.tensors(), self.device)
            else:
                added = theirs.tensors()
                for name, tensor in self._summed(key).tensors().items():
                    tensor.add_(added[name].to(tensor.device))

    def all_reduce(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        layers: Iterable[int] | None = None,
        sites: Iterable[str] | None = None,
    ) -> None:
        """Sums over the processes of a group, in place, so that every process can solve for the same patch.

        Processes may hold different blocks and sites, or none. Call it once for each, after the last update: a second
        call would count every row once more per process. A broken connection half-way leaves some sums reduced.

        Args:
            group: of torch.distributed, None for the default one.
            layers, sites: 0-based block indices and sites to reduce; None for all.

        Raises:
            ValueError: no process group, or processes that disagree in normalization, dtype or width; raised on all
                of them, before anything is written.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("all_reduce: group must be initialised, got none; call torch.distributed first")
        chosen = [None if among is None else set(among) for among in (layers, sites)]
        held = {
            key: (sums.widths, sums.device.type)
            for key, sums in self._sums.items()
            if all(among is None or part in among for part, among in zip(key, chosen, strict=True))
        }
        for key, (widths, device) in agreed(held, self.normalization, self.dtype, group).items():
            if key not in self._sums:
                self._sums[key] = self._zeros(key[1], widths, self.device or device)
            for tensor in self._summed(key).tensors().values():
                dist.all_reduce(tensor, group=group)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums and settings, made of tensors, strings and numbers: it loads under weights_only=True."""
        return state_of({key: self._summed(key) for key in self._sums}, self.normalization, self.dtype)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the sums by those of a state_dict.

        Raises:
            ValueError: no state_dict, another version, normalization or dtype, or sums that are missing, unknown,
                misshapen or not finite. Nothing is written then.
        """
        self._sums = dict(read_state(state, self.normalization, self.dtype, self.matrix_sites, self.device))

    def solve(
        self,
        estimator: str,
        *,
        scale: float | Mapping[str, float] = 1.0,
        ridge: float | Tensor = estimators.DEFAULT_RIDGE,
        layers: Iterable[int] | None = None,
        sites: Iterable[str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> ThoughtPatch:
        """Solves every block and site for its patch; see ``estimators.solve`` for the formulas.

        Args:
            estimator: ``"mean"``, ``"exact"``, ``"ridge"``, ``"second_order"`` or ``"affine"``.
            scale: λ, one number or one per site.
            ridge: ε > 0 in units of Z's mean eigenvalue, for ``ridge`` and ``affine``; one number, or one for each
                input of the sites that are solved, ``[d_in]``.
            layers: 0-based block indices to solve, None for all that hold sums.
            sites: the sites to solve, None for all that hold sums.
            provenance: what the patch should remember beside the options of this call, such as the instruction and
                the model's ``hidden_size``; values that JSON can hold.

        Returns:
            A ThoughtPatch in the sums' dtype, on their devices.

        Raises:
            ValueError: bad options, no sums at all, or a layer or site without sums.

        Warns:
            ScaleWarning: a patch that leaves more of the difference than there was, with the scale that would not.
        """
        patch = self.solve_part(estimator, scale=scale, ridge=ridge, layers=layers, sites=sites, provenance=provenance)
        scales = scale if isinstance(scale, Mapping) else dict.fromkeys(patch.sites, scale)
        warn_if_worse("solve", patch, estimator, scales)
        return patch

    @torch.inference_mode(False)
    @torch.no_grad()
    def solve_part(
        self,
        estimator: str,
        *,
        scale: float | Mapping[str, float],
        ridge: float | Tensor,
        layers: Iterable[int] | None = None,
        sites: Iterable[str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> ThoughtPatch:
        """As ``solve``, without its warning: for a part that the caller joins to others, or scales."""
        chosen_layers = self._chosen("layers", layers, self.layers)
        chosen_sites = self._chosen("sites", sites, self.sites)
        scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(SITES, scale)
        if not set(chosen_sites) <= set(scales) <= set(SITES):
            raise ValueError(f"solve: scale must have an entry for each of {list(chosen_sites)}, got {list(scales)}")
        estimators.check_options("solve", estimator, ridge, self.normalization)
        for site in chosen_sites:
            check_number("solve", "scale", scales[site])
        entries = {}
        for layer, site in sorted(self._sums):
            if layer not in chosen_layers or site not in chosen_sites:
                continue
            try:
                entries[layer, site] = estimators.solve(
                    self._sums[layer, site],
                    estimator,
                    scale=scales[site],
                    ridge=ridge,
                    normalization=self.normalization,
                )
            except ValueError as error:
                raise ValueError(f"{error} (block {layer}, site {site!r})") from error
        recorded = ridge.tolist() if isinstance(ridge, Tensor) else ridge
        described = {
            "estimator": estimator,
            "normalization": self.normalization,
            "scale": dict(scale) if isinstance(scale, Mapping) else scale,
            "ridge": recorded if estimator in ("ridge", "affine") else None,
            "version": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return ThoughtPatch(entries, {**described, **(provenance or {})})

    def _summed(self, key: tuple[int, str]) -> Sums:
        """The sums of a block and site, in place of its rows from now on."""
        held = self._sums[key]
        if isinstance(held, KeptRows):
            rows = held.joined()
            held = self._sums[key] = self._zeros(key[1], held.widths, held.device)
            self._add(held, *rows)
        return held

    def _add(self, sums: Sums, delta: Tensor, activation: Tensor | None, weights: Tensor | None) -> None:
        if sums.cross is None or activation is None:
            add_vectors(sums, delta, weights)
            return
        accumulate(
            sums.cross,
            delta,
            activation,
            weights=weights,
            normalization=self.normalization,
            gram=sums.gram,
            delta_sum=sums.delta_sum,
            activation_sum=sums.activation_sum,
            moments=sums.moments,
        )

    def _zeros(self, site: str, widths: tuple[int, int], device: torch.device) -> Sums:
        return zeros(widths, matrix=site in self.matrix_sites, dtype=self.dtype, device=device)

    def _chosen(self, name: str, wanted: Iterable[Any] | None, held: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._sums:
            raise ValueError("solve: accumulator must hold rows, got none; call update first")
        chosen = held if wanted is None else tuple(wanted)
        if not chosen or not set(chosen) <= set(held):
            raise ValueError(f"solve: {name} must be among those accumulated, {list(held)}, got {list(chosen)}")
        return chosen


def _words(widths: tuple[int, int]) -> str:
    return str(widths[0]) if widths[0] == widths[1] else f"{widths[0]} from {widths[1]}"
