"""Where a patch's vectors may go in a model's weights: exactly into biases, or approximately into matrices.

    attention, mlp   W (a + v) + b: the bias W v of o_proj, or of every module that multiplies u
    down             W z + v + b: down_proj's bias v itself
    residual         y + v: down_proj's bias v/m where nothing but the residual multiplier m stands behind down_proj

Where there is no bias, v āᵀ/‖ā‖² may be added to Δ instead, ā being the fitted rows' mean activation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from thought_kernels.models.linear import bias_of
from thought_kernels.patches.apply import check_unshared, targets
from thought_kernels.patches.data import PatchData
from thought_kernels.patches.site import SitePatch


class Placed(NamedTuple):
    """One block's and site's part of a patch, and the modules whose weights can hold it.

    Attributes:
        key: (block, site); a residual vector's is (block, "down").
        entry: the part; its vector is None where it is zero.
        names: of the modules in the attention or the MLP.
        modules: the linear modules that Δ acts on.
        folds: whether there is a vector that no bias can hold.
    """

    key: tuple[int, str]
    entry: SitePatch
    names: tuple[str, ...]
    modules: tuple[Any, ...]
    folds: bool


class Placement(NamedTuple):
    """Where everything of a patch went.

    Attributes:
        parts: what modules' weights can hold.
        dropped: (block, site) of the vectors that were left out.
    """

    parts: list[Placed]
    dropped: tuple[tuple[int, str], ...]


def placed(
    function: str,
    patch: PatchData,
    model: Any,
    *,
    instead: str,
    fold: bool = False,
    drop: bool = False,
    biases: bool = True,
) -> Placement:
    """A patch's parts in modules of a model, each vector in the biases, to be folded, or left out.

    Args:
        function: opens the sentences of refusal.
        patch: the patch.
        model: a transformers model.
        instead: what else can be done with a vector that has no place, ends those sentences.
        fold: whether vectors may be folded.
        drop: whether vectors may be left out that no bias can hold and that are not folded.
        biases: whether there is a place for biases at all.

    Raises:
        ValueError: what `targets` and `check_unshared` refuse, a residual vector that no bias can hold, or a vector
            that has no bias to go to and cannot be folded or may not be, unless it may be left out.
    """
    found, dropped = [], []
    entries, without = _without_residual(function, patch, model, instead, drop=drop, biases=biases)
    dropped += without
    for key, (entry, block) in entries.items():
        names, modules = _modules(key[1], block)
        biased = biases and all(bias_of(module) is not None for module in modules)
        is_zero = entry.vector is None or not entry.vector.any()
        folds = not is_zero and not biased
        refusal = _why_not_folded(function, key, entry, fold, instead) if folds else ""
        if refusal and not drop:
            raise ValueError(refusal)
        if refusal:
            dropped.append(key)
        if is_zero or refusal:
            if entry.matrix is None and entry.factors is None:
                continue
            entry, folds = replace(entry, vector=None), False
        found.append(Placed(key, entry, names, modules, folds))
    check_unshared(function, model, [(part.key, module) for part in found for module in part.modules])
    return Placement(found, tuple(dropped))


def _modules(site: str, block: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    if site == "mlp":
        return block.parts.mlp_inputs, block.mlp_inputs
    name, module = (
        (block.parts.o_proj, block.o_proj) if site == "attention" else (block.parts.down_proj, block.down_proj)
    )
    return (name,), (module,)


def _without_residual(
    function: str, patch: PatchData, model: Any, instead: str, *, drop: bool, biases: bool
) -> tuple[dict[tuple[int, str], tuple[SitePatch, Any]], list[tuple[int, str]]]:
    """The patch's entries with their blocks, residual vectors as part of the down site's; those that were left out."""
    found = {key: (entry, block) for key, entry, block in targets(function, patch, model)}
    dropped = []
    for layer, site in list(found):
        if site != "residual":
            continue
        entry, block = found.pop((layer, site))
        if entry.vector is None or not entry.vector.any():
            continue
        obstacle = obstacle_behind_down(block) or _no_bias(block, biases)
        if obstacle and drop:
            dropped.append((layer, site))
            continue
        if obstacle:
            raise ValueError(
                f"{function}: patch must have no residual vector, got a nonzero one; block {layer}, site 'residual': "
                f"no weight adds a constant to the block's output, since {obstacle}; {instead}"
            )
        # In float64, so that two vectors are rounded once, where they are written.
        vector = entry.vector.to(torch.float64) / block.residual_multiplier
        down = found[layer, "down"][0] if (layer, "down") in found else SitePatch(vector=torch.zeros_like(vector))
        if down.vector is not None:
            vector = vector + down.vector.to(vector)
        found[layer, "down"] = replace(down, vector=vector, fit=None), block
    return found, dropped


def obstacle_behind_down(block: Any) -> str:
    """Why what is added to down_proj's output is no constant of the block's output, empty where it is."""
    if block.down_proj is None:
        return "its MLP is a mixture of experts"
    return f"a norm stands behind {block.parts.down_proj}" if block.post_feedforward_norm is not None else ""


def _no_bias(block: Any, biases: bool) -> str:
    if not biases:
        return "the format has no biases"
    return "" if bias_of(block.down_proj) is not None else f"{block.parts.down_proj} has no bias"


def _why_not_folded(function: str, key: tuple[int, str], entry: SitePatch, fold: bool, instead: str) -> str:
    """The refusal of a vector without a place, empty where it is to be folded."""
    where = f"block {key[0]}, site {key[1]!r}"
    if not fold:
        return (
            f"{function}: patch must have no vector where the modules have no bias, got a nonzero one; {where}: "
            f"{instead}, or give fold=True (--fold) to approximate it by a matrix, and measure what that costs"
        )
    if entry.activation_mean is None or not entry.activation_mean.any():
        return f"{function}: patch must know its mean activation to fold a vector, got none; {where}"
    return ""
