"""The rows that a patch was fitted on, spoilt on purpose or solved in another way: controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.fitting.recipe import Recipe, ResolvedRecipe
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.pairing.batches import group_examples
from thought_kernels.pairing.pairings import PAIRINGS
from thought_kernels.pairing.run import Run
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.prompts.prompt import EncodedExample


class Shuffled(ThoughtAccumulator):
    """Sums in which every δ belongs to another token's activation: what both are alone stays, what joins them goes.

    Args:
        generator: of the permutations, one per call of update over its rows of nonzero weight.
        options: as ThoughtAccumulator's.
    """

    def __init__(self, generator: torch.Generator, **options: Any) -> None:
        super().__init__(**options)
        self._generator = generator

    def update(
        self, layer: int, site: str, delta: Tensor, activation: Tensor | None, weights: Tensor | None = None
    ) -> None:
        """As ThoughtAccumulator.update, delta's rows permuted first."""
        rows = delta.reshape(-1, delta.shape[-1])
        kept = torch.arange(len(rows)) if weights is None else weights.reshape(-1).cpu().nonzero()[:, 0]
        order = kept[torch.randperm(len(kept), generator=self._generator)].to(rows.device)
        shuffled = rows.clone()
        shuffled[kept.to(rows.device)] = rows[order]
        super().update(layer, site, shuffled.reshape(delta.shape), activation, weights)


class MeanDifferences(ThoughtAccumulator):
    """Sums of δ alone: every site is solved by its mean difference, v = λ Σ w δ / Ω, and no matrix is made."""

    matrix_sites = ()


def refit(
    decoder: Decoder, encoded: Sequence[EncodedExample], recipe: Recipe, *, batch_size: int,
    accumulator: ThoughtAccumulator | None = None,
) -> ThoughtPatch:  # fmt: skip
    """Runs a recipe's pairing over examples, with sums of one's own.

    Args:
        decoder: the model, described.
        encoded: the examples with their completions.
        recipe: how.
        batch_size: examples in a batch at most.
        accumulator: receives the rows, None for a plain one.

    Returns:
        The patch.
    """
    dtype = torch.float64 if decoder.dtype == torch.float64 else torch.float32
    resolved = recipe.for_model(decoder)
    own = accumulator or ThoughtAccumulator(normalization=resolved.normalization, dtype=dtype)
    solve = _Solve(own, resolved, {"hidden_size": decoder.hidden_size})
    layers, sites = frozenset(resolved.layers), frozenset(resolved.sites)
    run = Run(
        decoder=decoder, groups=group_examples(encoded, batch_size, resolved.tokens, dtype), layers=layers,
        sites=sites, accumulator=own, solve=solve, header_weight=resolved.header_weight, tick=lambda: None,
        mlp_activation=resolved.mlp_activation,
    )  # fmt: skip
    with torch.no_grad(), undisturbed(decoder.model):
        PAIRINGS[resolved.pairing](run)
    return solve(layers, sites)


class _Solve:
    """Solves blocks and sites once each, as the pairing comes to need them."""

    def __init__(self, sums: ThoughtAccumulator, recipe: ResolvedRecipe, provenance: dict[str, Any]) -> None:
        self._sums, self._recipe, self._provenance = sums, recipe, provenance
        self._solved: dict[tuple[int, str], SitePatch] = {}

    def __call__(self, layers: frozenset[int], sites: frozenset[str]) -> ThoughtPatch:
        wanted = [(layer, site) for layer in sorted(layers) for site in sorted(sites)]
        for layer, site in wanted:
            if (layer, site) not in self._solved:
                self._solved[layer, site] = self._one(layer, site)
                if self._recipe.pairing == "sequential":  # which comes back to no block: its sums fill memory
                    self._sums.drop(layer, site)
        return ThoughtPatch({key: self._solved[key] for key in wanted}, self._provenance)

    def _one(self, layer: int, site: str) -> SitePatch:
        recipe = self._recipe
        part = self._sums.solve_part(
            recipe.estimator, scale=recipe.scale, ridge=recipe.ridge, layers=[layer], sites=[site]
        )
        return part.entries[layer, site]


def recipe_of(patch: ThoughtPatch) -> Recipe:
    """The recipe that a patch remembers, the default where it remembers none, so that other fits are made like it.

    Raises:
        ValueError: a patch that was solved with a ridge for each input.
    """
    made: Mapping[str, Any] = patch.provenance.get("recipe", patch.provenance)
    if isinstance(made.get("ridge"), list):
        raise ValueError(
            f"evaluate: patch must have one ridge for all inputs where no recipe is given, got {len(made['ridge'])}; a "
            "fit of all sites has no ridge for each input to be repeated with: give recipe= for the other fits"
        )
    return Recipe(**{name: made[name] for name in Recipe() if made.get(name) is not None})


def known_recipe(patch: ThoughtPatch) -> Recipe:
    """As recipe_of, of a patch that remembers all that its rows were made and solved by.

    Raises:
        ValueError: a patch whose provenance does not say how it was fitted.
    """
    made: Mapping[str, Any] = patch.provenance.get("recipe", patch.provenance)
    needed = ("layers", "sites", "pairing", "estimator", "normalization", "scale", "tokens", "header_weight")
    missing = [name for name in needed if made.get(name) is None]
    if missing:
        raise ValueError(
            f"evaluate: patch must know how it was fitted to be fitted again, got none of {', '.join(missing)}; "
            "transmute records that"
        )
    return recipe_of(patch)


def split(patch: ThoughtPatch, *, part: str, sites: Sequence[str] | None = None) -> ThoughtPatch | None:
    """A patch's matrices alone, or its vectors alone, or both at some sites only; None where nothing is left.

    Args:
        patch: to take from.
        part: "matrix", "vector" or "both".
        sites: which to keep, None for all.
    """
    entries = {}
    for (layer, site), entry in patch.entries.items():
        has_matrix = entry.matrix is not None or entry.factors is not None
        if sites is not None and site not in sites:
            continue
        if part == "both":
            entries[layer, site] = entry
        elif part == "matrix" and has_matrix:
            entries[layer, site] = SitePatch(entry.matrix, entry.factors)
        elif part == "vector" and entry.vector is not None:
            entries[layer, site] = SitePatch(vector=entry.vector)
    return ThoughtPatch(entries, patch.provenance) if entries else None
