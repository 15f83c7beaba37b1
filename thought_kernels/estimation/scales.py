"""Which λ leaves the least of δ, and a word about patches that leave more than there was."""

from __future__ import annotations

from collections.abc import Mapping

from thought_kernels.ops.caller import warn
from thought_kernels.patches.data import PatchData

_BISECTIONS = 60


class ScaleWarning(UserWarning):
    """A patch leaves more than all of the difference; no news to who scales or sums it afterwards."""


def linear_scale(scale: float, along: float, square: float) -> float | None:
    """The best λ of a patch that is linear in it; None for one that predicts nothing.

    With p the predictions at λ, Σ w ‖δ − (x/λ) p‖² is least at x = λ Σ w ⟨δ, p⟩ / Σ w ‖p‖²: for ``mean``,
    ⟨C, C⟩ / tr(C Z Cᵀ). Every x above 0 and up to it leaves less than none does.

    Args:
        scale: λ.
        along: Σ w ⟨δ, p⟩.
        square: Σ w ‖p‖².
    """
    best = scale * along / square if square > 0 else 0.0
    return best if best > 0 else None


def second_order_scale(traces: tuple[float, float, float, float]) -> float | None:
    """The best λ of ``second_order``; None for C = 0.

    Beside Σ w ‖δ‖², λ leaves −2 T₁ λ + 3 T₂ λ² − 2 T₃ λ³ + T₄ λ⁴. That is convex, since T₃² <= T₂ T₄, so that every λ
    above 0 and up to the best one leaves less than none does. The best lies below T₁/T₂; in units of that, the sign of
    the derivative is bisected.

    Args:
        traces: Tₖ = tr(C Zᵏ⁻¹ Cᵀ) for k = 1 to 4.
    """
    first, second, third, fourth = traces
    if first <= 0 or second <= 0:
        return None
    cubic, quartic = third * first / second**2, fourth * first**2 / second**3
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        x = (low + high) / 2
        if -1 + x * (3 - x * (3 * cubic - x * 2 * quartic)) < 0:
            low = x
        else:
            high = x
    return high * first / second


def warn_if_worse(function: str, patch: PatchData, estimator: str, scale: Mapping[str, float]) -> None:
    """Warns, in a function's name, of a patch that leaves more at some site than it was to take away.

    The scale that it names leaves less at every block and site of these rows. Rows that were made with earlier blocks
    patched change with it; a second warning may then name a smaller one.

    Args:
        function: opens the sentence.
        patch: as solved.
        estimator: by which.
        scale: λ of each of its sites.
    """
    left = {key: entry.fit.residual for key, entry in patch.entries.items() if entry.fit and entry.fit.residual}
    if not left or max(left.values()) <= 1:
        return
    layer, site = max(left, key=lambda key: left[key])
    other = ", or estimator='ridge', which is made for 1" if estimator in ("mean", "second_order") else ""
    warn(
        f"{function}: patch should leave less than all of the difference, got {left[layer, site]:.3g} times it at "
        f"block {layer}, site {site!r}, with estimator {estimator!r} and scale {scale[site]:g}; give "
        f"scale={_offered(patch, scale)}, which leaves less of these rows{other}",
        ScaleWarning,
    )


def _offered(patch: PatchData, scale: Mapping[str, float]) -> str:
    """A scale for every site at which each of its blocks is left with less: the smallest of their best ones."""
    offered = {}
    for site in patch.sites:
        fits = [entry.fit for (_, of), entry in patch.entries.items() if of == site]
        least = min((fit.best_scale for fit in fits if fit and fit.best_scale), default=scale[site])
        offered[site] = f"{scale[site] if 0 <= scale[site] <= least else least:.3g}"
    if len(set(offered.values())) == 1:
        return offered.popitem()[1]
    return "{" + ", ".join(f"{site!r}: {number}" for site, number in offered.items()) + "}"
