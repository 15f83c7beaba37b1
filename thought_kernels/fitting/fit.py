"""One recipe on one set of encoded examples: the pairing's rows into sums, the sums into a patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.estimation.scales import warn_if_worse
from thought_kernels.fitting.checkpoint import Checkpoint
from thought_kernels.fitting.recipe import ResolvedRecipe
from thought_kernels.generation.processes import ALONE, Processes
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.pairing.batches import group_examples
from thought_kernels.pairing.pairings import MEMORY_BUDGET, PAIRINGS, Run, passes
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import MATRIX_SITES, SitePatch
from thought_kernels.prompts.prompt import EncodedExample

log = logging.getLogger(__name__)


def fit(
    decoder: Decoder,
    recipe: ResolvedRecipe,
    examples: Sequence[EncodedExample],
    *,
    batch_size: int,
    memory_budget: int = MEMORY_BUDGET,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
) -> ThoughtPatch:
    """Fits the examples.

    Args:
        decoder: the described model.
        recipe: how.
        examples: aligned, each with at least one summed token.
        batch_size: examples in a batch at most.
        memory_budget: bytes of hidden states that are kept in memory.
        provenance: what the patch should remember beside the recipe.
        progress: show a bar.
        checkpoint: where the state between blocks is kept, and read; None for nowhere. Of "sequential" alone.
        processes: which share the examples.

    Returns:
        A ThoughtPatch.

    Raises:
        ValueError: what the estimator refuses, or NaN in the model's activations.
    """
    dtype = torch.float64 if decoder.dtype == torch.float64 else torch.float32
    groups = group_examples(processes.share(examples), batch_size, recipe.tokens, dtype)
    log.info("%s", _memory(decoder, recipe, dtype))
    solution = _Solution(recipe, dtype, provenance or {}, processes)
    layers, sites = frozenset(recipe.layers), frozenset(recipe.sites)
    total = sum(len(group.batches) for group in groups) * (max(layers) + 1)
    with (
        undisturbed(decoder.model),
        tqdm(
            total=total * passes(recipe.pairing, sites), desc="transmute", unit="block", disable=not progress,
            leave=False,
        ) as bar,
    ):  # fmt: skip
        run = Run(
            decoder=decoder, groups=groups, layers=layers, sites=sites, accumulator=solution.accumulator,
            solve=solution.solve, header_weight=recipe.header_weight, tick=bar.update,
            memory_budget=memory_budget, mlp_activation=recipe.mlp_activation,
            keeper=None if checkpoint is None else _Keeper(checkpoint, solution, decoder),
        )  # fmt: skip
        PAIRINGS[recipe.pairing](run)
    patch = solution.solve(layers, sites)
    warn_if_worse("transmute", patch, recipe.estimator, recipe.scale)
    return patch


class _Solution:
    """The sums of one fit, and what has been solved of them: the pairings ask for parts on the way."""

    def __init__(
        self, recipe: ResolvedRecipe, dtype: torch.dtype, provenance: Mapping[str, Any], processes: Processes
    ) -> None:
        self._recipe, self._processes = recipe, processes
        self.accumulator = ThoughtAccumulator(normalization=recipe.normalization, dtype=dtype)
        self._described = {**_described(recipe), **provenance}
        self._solved: dict[tuple[int, str], SitePatch] = {}

    def solve(self, layers: frozenset[int], sites: frozenset[str]) -> ThoughtPatch:
        wanted = [(layer, site) for layer in sorted(layers) for site in sorted(sites)]
        missing = [key for key in wanted if key not in self._solved]
        if missing:
            parts: dict[str, Any] = {
                "layers": sorted({layer for layer, _ in missing}),
                "sites": sorted({site for _, site in missing}),
            }
            if self._processes.size > 1:
                with self._processes.connected():
                    self.accumulator.all_reduce(self._processes.group, **parts)
            part = self.accumulator.solve_part(
                self._recipe.estimator, scale=self._recipe.scale, ridge=self._recipe.ridge, **parts,
                provenance=self._described,
            )  # fmt: skip
            self._solved.update({key: self._told(key[1], entry) for key, entry in part.entries.items()})
            if self._recipe.pairing == "sequential":  # which comes back to no block: its sums are the bulk of memory
                for layer, site in missing:
                    self.accumulator.drop(layer, site)
            self._described.update(part.provenance)
        return ThoughtPatch({key: self._solved[key] for key in wanted}, self._described)

    def so_far(self) -> tuple[dict[tuple[int, str], SitePatch], dict[str, Any]]:
        """What has been solved, and what the patch will remember."""
        return self._solved, self._described

    def go_on(self, solved: Mapping[tuple[int, str], SitePatch], described: Mapping[str, Any]) -> None:
        """Takes what an earlier process has solved for its own."""
        self._solved.update(solved)
        self._described.update(described)

    def _told(self, site: str, entry: SitePatch) -> SitePatch:
        """An entry, without what sums over h would say of a patch that acts on u."""
        if site != "mlp" or self._recipe.mlp_activation == "input" or entry.fit is None:
            return entry
        fit = replace(entry.fit, residual=None, fold_residual=None, spherical_scale=None, best_scale=None)
        return replace(entry, activation_mean=None, fit=fit)


class _Keeper:
    """Keeps the streams of a run together with what has been solved of it."""

    def __init__(self, checkpoint: Checkpoint, solution: _Solution, decoder: Decoder) -> None:
        self._checkpoint, self._solution, self._decoder = checkpoint, solution, decoder

    def restore(self, streams: Sequence[Tensor]) -> int:
        """As Keeper.restore."""
        done, entries, described = self._checkpoint.restore(streams)
        placed = {key: entry.to(self._decoder.blocks[key[0]].device) for key, entry in entries.items()}
        self._solution.go_on(placed, described)
        return done

    def keep(self, blocks: int, streams: Sequence[Tensor]) -> None:
        """As Keeper.keep."""
        self._checkpoint.keep(blocks, streams, *self._solution.so_far())


def _described(recipe: ResolvedRecipe) -> dict[str, Any]:
    """A recipe in a patch's provenance: whole, and field by field; how it is solved is for the accumulator to say."""
    return {
        "recipe": recipe.to_dict(),
        "layers": list(recipe.layers),
        "sites": sorted(recipe.sites),
        "pairing": recipe.pairing,
        "tokens": recipe.tokens,
        "header_weight": recipe.header_weight,
        "text_weight": recipe.text_weight,
    }


def _memory(decoder: Decoder, recipe: ResolvedRecipe, dtype: torch.dtype) -> str:
    """What the accumulators will hold at most: two matrices per block and matrix site, of one block in sequential."""
    d, elements, blocks = decoder.hidden_size, 0, [decoder.blocks[layer] for layer in recipe.layers]
    for block in blocks[:1] if recipe.pairing == "sequential" else blocks:
        f = block.mlp_width or 0
        held = {"attention": 2 * block.attention_width**2, "mlp": 2 * d**2, "down": f * (d + f)}
        elements += sum(held[site] for site in recipe.sites if site in MATRIX_SITES)
    return f"accumulators of {len(blocks)} blocks take {elements * dtype.itemsize / 2**20:.1f} MiB at most"
