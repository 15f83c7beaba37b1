"""One recipe on one set of encoded examples: the pairing's rows into sums, the sums into a patch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from thought_kernels.models.decoder import Decoder
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.transmute.accumulator import ThoughtAccumulator
from thought_kernels.transmute.batches import group_examples
from thought_kernels.transmute.pairing import MEMORY_BUDGET, PAIRINGS, Run, passes
from thought_kernels.transmute.patch import ThoughtPatch
from thought_kernels.transmute.prompt import EncodedExample
from thought_kernels.transmute.site import MATRIX_SITES, SitePatch
from thought_kernels.transmute.substitution import copies_described, with_substitutions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How rows are made and solved; everything of transmute's options but scale and ridge. See transmute."""

    layers: frozenset[int]
    sites: frozenset[str]
    pairing: str
    estimator: str
    normalization: str
    tokens: str
    header_weight: float
    batch_size: int
    memory_budget: int = MEMORY_BUDGET
    substitutions: int = 0
    substitutes: Sequence[int] | None = None
    seed: int = 0

    @property
    def solved_once(self) -> bool:
        """Whether no row depends on an earlier solution, so that one set of sums serves every scale and ridge."""
        return self.pairing != "sequential" and passes(self.pairing, self.sites) == 1

    def described(self) -> dict[str, Any]:
        """The part of a patch's provenance that is this recipe's."""
        return {
            "layers": sorted(self.layers),
            "sites": sorted(self.sites),
            "pairing": self.pairing,
            "tokens": self.tokens,
            "header_weight": self.header_weight,
            "substitutions": self.substitutions,
            "copies": copies_described() if self.substitutions else None,
        }


@dataclass(frozen=True)
class Setting:
    """What an estimator is told: λ per site, and ε."""

    scales: Mapping[str, float]
    ridge: float


def fit_each(
    decoder: Decoder,
    recipe: Recipe,
    examples: Sequence[EncodedExample],
    settings: Sequence[Setting],
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Iterator[ThoughtPatch | ValueError]:
    """Fits the same examples at each setting, in order.

    Sums that do not depend on the setting (Recipe.solved_once) are accumulated once and solved for each; otherwise the
    pairing runs once per setting.

    Args:
        decoder: the described model.
        recipe: how.
        examples: aligned, each with at least one summed token.
        settings: scale and ridge of each patch.
        provenance: what every patch should remember beside the recipe.
        progress: show a bar.

    Yields:
        A ThoughtPatch for each setting, or the ValueError by which the estimator refused it.
    """
    accumulator: ThoughtAccumulator | None = None
    for setting in settings:
        try:
            fitting = _Fitting(decoder, recipe, setting, provenance or {}, accumulator)
            patch = fitting.run(examples, progress)
        except ValueError as error:
            yield error
        else:
            yield patch
        if recipe.solved_once and fitting.filled:
            accumulator = fitting.accumulator


class _Fitting:
    """The sums of one fit, and what has been solved of them."""

    def __init__(
        self, decoder: Decoder, recipe: Recipe, setting: Setting, provenance: Mapping[str, Any],
        accumulator: ThoughtAccumulator | None,
    ) -> None:  # fmt: skip
        self._decoder, self._recipe, self._setting = decoder, recipe, setting
        self._dtype = torch.float64 if decoder.dtype == torch.float64 else torch.float32
        self.filled = accumulator is not None
        self.accumulator = accumulator or ThoughtAccumulator(normalization=recipe.normalization, dtype=self._dtype)
        self._described = {**recipe.described(), **provenance}
        self._solved: dict[tuple[int, str], SitePatch] = {}  # the pairings ask for parts on the way

    def run(self, examples: Sequence[EncodedExample], progress: bool) -> ThoughtPatch:
        if not self.filled:
            self.accumulate(examples, progress)
        return self._solve(self._recipe.layers, self._recipe.sites)

    def accumulate(self, examples: Sequence[EncodedExample], progress: bool) -> None:
        recipe = self._recipe
        examples = with_substitutions(examples, recipe.substitutions, recipe.substitutes, recipe.seed)
        groups = group_examples(examples, recipe.batch_size, recipe.tokens, self._dtype)
        log.info("%s", _memory(self._decoder, recipe, self._dtype))
        blocks = max(recipe.layers) + 1
        total = sum(len(group.batches) for group in groups) * blocks * passes(recipe.pairing, recipe.sites)
        with (
            undisturbed(self._decoder.model),
            tqdm(total=total, desc="transmute", unit="block", disable=not progress, leave=False) as bar,
        ):
            run = Run(
                decoder=self._decoder, groups=groups, layers=recipe.layers, sites=recipe.sites,
                accumulator=self.accumulator, solve=self._solve, header_weight=recipe.header_weight, tick=bar.update,
                memory_budget=recipe.memory_budget,
            )  # fmt: skip
            PAIRINGS[recipe.pairing](run)
        self.filled = True

    def _solve(self, layers: frozenset[int], sites: frozenset[str]) -> ThoughtPatch:
        wanted = [(layer, site) for layer in sorted(layers) for site in sorted(sites)]
        missing = [key for key in wanted if key not in self._solved]
        if missing:
            part = self.accumulator.solve(
                self._recipe.estimator, scale=self._setting.scales, ridge=self._setting.ridge,
                layers=sorted({layer for layer, _ in missing}), sites=sorted({site for _, site in missing}),
                provenance=self._described,
            )  # fmt: skip
            self._solved.update(part.entries)
            self._described.update(part.provenance)
        return ThoughtPatch({key: self._solved[key] for key in wanted}, self._described)


def sums_of(decoder: Decoder, recipe: Recipe, examples: Sequence[EncodedExample]) -> ThoughtAccumulator:
    """The sums of a recipe whose rows depend on no solution (Recipe.solved_once)."""
    fitting = _Fitting(decoder, recipe, Setting(dict.fromkeys(recipe.sites, 1.0), 1.0), {}, None)
    fitting.accumulate(examples, progress=False)
    return fitting.accumulator


def fit(
    decoder: Decoder,
    recipe: Recipe,
    examples: Sequence[EncodedExample],
    setting: Setting,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ThoughtPatch:
    """Fits the examples at one setting; arguments as fit_each's.

    Raises:
        ValueError: what the estimator refuses, or NaN in the model's activations.
    """
    (patch,) = fit_each(decoder, recipe, examples, [setting], provenance=provenance, progress=progress)
    if isinstance(patch, ValueError):
        raise patch
    return patch


def _memory(decoder: Decoder, recipe: Recipe, dtype: torch.dtype) -> str:
    """What the accumulators will hold: two square matrices per block and matrix site."""
    block = decoder.blocks[0]
    widths = {"attention": block.num_attention_heads * block.head_dim, "mlp": decoder.hidden_size}
    elements = sum(2 * widths[site] ** 2 for site in recipe.sites if site in MATRIX_SITES) * len(recipe.layers)
    return f"accumulators of {len(recipe.layers)} blocks take {elements * dtype.itemsize / 2**20:.1f} MiB"
