"""How a patch is fitted: the options of transmute as one value, and the paper's choice of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from thought_kernels.estimation.estimators import DEFAULT_RIDGE, check_options
from thought_kernels.models.decoder import Decoder
from thought_kernels.ops.accumulate import NORMALIZATIONS
from thought_kernels.ops.checks import as_integer, as_number, check_choice, check_number
from thought_kernels.pairing.pairings import PAIRINGS
from thought_kernels.pairing.run import MLP_ACTIVATIONS
from thought_kernels.patches.site import SITES

TOKENS = ("all", "answer")


class SiteScales(dict[str, float]):
    """λ per site, in the order of SITES: a dict, which JSON takes, that cannot be changed, as a recipe is a value."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and copy would set the items of a dict one by one
        return SiteScales, (dict(self),)

    def _refuse(self, *args: Any, **named: Any) -> Any:
        raise TypeError(
            "Recipe: scale must stay as it is, got a change; make another recipe, as dataclasses.replace(recipe, "
            "scale={...}) does"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]


@dataclass(frozen=True)
class Recipe(Mapping[str, Any]):
    """How rows are made and solved: the options of transmute that decide what a patch is, checked and as one value.

    It is a mapping of its fields, so that `transmute(..., **recipe)` takes it. `dataclasses.replace(recipe, ridge=0.3)`
    changes a field; two recipes of equal fields are equal. transmute says what each field means.

    Args:
        layers: 0-based block indices, None for all.
        sites: of "attention", "mlp", "down", "residual", None for those that suit the model.
        pairing: "two_pass", "layerwise" or "sequential".
        estimator: "mean", "exact", "ridge", "second_order" or "affine".
        normalization: "none", "norm" or "squared_norm".
        mlp_activation: "input" or "residual", what a is at the mlp site; "residual" with the estimator "mean" alone.
        scale: λ, one number or one per site.
        ridge: ε, in units of Z's mean eigenvalue.
        tokens: "all" or "answer".
        header_weight: total weight of the header's rows.
        text_weight: total weight of ordinary text, which the patch is to leave as it is.
        written_inputs: inputs that the model writes beside the examples.
        completions: answers written for an example without one.

    Raises:
        ValueError: an unknown name, a number out of its range, or options that exclude each other.
        TypeError: a value of another type.
    """

    layers: Iterable[int] | None = None  # kept as sorted tuples
    sites: Iterable[str] | None = None
    pairing: str = "sequential"
    estimator: str = "ridge"
    normalization: str = "none"
    mlp_activation: str = "input"
    scale: float | Mapping[str, float] = 1.0
    ridge: float = DEFAULT_RIDGE
    tokens: str = "all"
    header_weight: float = 0.0
    text_weight: float = 0.0
    written_inputs: int = 64
    completions: int = 3

    def __post_init__(self) -> None:
        check_choice("transmute", "pairing", self.pairing, PAIRINGS)
        check_choice("transmute", "normalization", self.normalization, NORMALIZATIONS)
        check_choice("transmute", "mlp_activation", self.mlp_activation, MLP_ACTIVATIONS)
        check_choice("transmute", "tokens", self.tokens, TOKENS)
        read: dict[str, Any] = {
            "layers": _layers("transmute", self.layers),
            "sites": _sites(self.sites),
            "ridge": _ridge(self.ridge),
            "header_weight": as_number("transmute", "header_weight", self.header_weight),
            "text_weight": as_number("transmute", "text_weight", self.text_weight),
            "written_inputs": as_integer("transmute", "written_inputs", self.written_inputs, least=0),
            "completions": as_integer("transmute", "completions", self.completions, least=1),
        }
        check_options("transmute", self.estimator, read["ridge"], self.normalization)
        for name in ("header_weight", "text_weight"):
            if read[name] < 0:
                raise ValueError(f"transmute: {name} must not be negative, got {getattr(self, name)}")
        if read["text_weight"] and self.estimator == "mean":
            raise ValueError(
                f"transmute: text_weight must be 0 with estimator 'mean', got {self.text_weight}; it weighs no "
                "error of a patch, on text or elsewhere: take estimator='ridge'"
            )
        read["scale"] = _scale(self.scale, read["sites"])
        if self.mlp_activation == "residual":
            _check_residual_activation(read["sites"], self.estimator)
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def __getitem__(self, name: str) -> Any:
        if name not in (field.name for field in fields(self)):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        lists = {name: list(value) for name, value in self.items() if isinstance(value, tuple)}
        scale = dict(self.scale) if isinstance(self.scale, Mapping) else self.scale
        return {**self, **lists, "scale": scale}

    @staticmethod
    def from_dict(options: Mapping[str, Any]) -> Recipe:
        """The recipe of some fields, such as those of `to_dict`; the others have their defaults.

        Raises:
            ValueError: a name that is no field, or as Recipe.
            TypeError: as Recipe.
        """
        known = [field.name for field in fields(Recipe)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"Recipe: options must be among {', '.join(known)}, got {', '.join(unknown)}")
        return Recipe(**options)

    def check_blocks(self, blocks: int) -> None:
        """Raises ValueError where layers names blocks that a model of so many has not."""
        layers = () if self.layers is None else tuple(self.layers)
        if layers and layers[-1] >= blocks:
            raise ValueError(
                f"transmute: layers must be distinct 0-based block indices below {blocks}, got {list(layers)}; "
                "name blocks that this model has"
            )

    def for_model(self, decoder: Decoder) -> ResolvedRecipe:
        """This recipe for a model: its blocks and sites named, a scale for each site.

        Raises:
            ValueError: blocks that the model has not, or sites that they have not.
        """
        blocks = len(decoder.blocks)
        self.check_blocks(blocks)
        layers = tuple(range(blocks) if self.layers is None else self.layers)
        sites = _sites_of(self.sites, decoder, layers)
        parallel = [layer for layer in layers if decoder.blocks[layer].parallel]
        if self.mlp_activation == "residual" and parallel:
            raise ValueError(
                "transmute: mlp_activation must be 'input' where the MLP reads the block's own input, beside attention "
                f"and not after it, as at block {parallel[0]}, got 'residual'"
            )
        scale = self.scale if isinstance(self.scale, Mapping) else dict.fromkeys(sites, self.scale)
        return ResolvedRecipe(**{**self, "layers": layers, "sites": sites, "scale": scale})


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe for one model, in which nothing is left open. `Recipe.for_model` makes it."""

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    scale: Mapping[str, float]


def paper_recipe(
    *,
    c1: float = 0.015,
    c2: float = 0.0,
    layers: Iterable[int] | None = range(10, 20),
    steps: int = 300,
    mlp_activation: str = Recipe.mlp_activation,
) -> Recipe:
    """Algorithm 1 with the paper's practice, as arguments for transmute: `transmute(..., **paper_recipe())`.

        ΔW_l = c1/steps Σ_e (1/n_e) Σ_i δ_i a_iᵀ / ‖a_i‖          δb_l = c2/steps Σ_e (1/n_e) Σ_i δ_i

    `steps` is the constant that the paper divides by (300), not the number of examples, so that the effective c1,
    c1 · examples / steps, grows with the examples. An example without a completion gets one, the likeliest.

    A step is read as an example, as Algorithm 1 has it; §4.2 speaks of "demonstration tokens (i.e. steps)" instead, and
    the algorithm's test, s > steps, takes one example more than it names.

    The paper's a is A(x), the attention's output with its skip, which is what its W multiplies. Where a norm stands
    before the MLP the two part: W multiplies the normed u, and A(x) is h. Both readings are offered, a = u ("input",
    unless given) and a = h ("residual"); δ is the change of u, and the patch acts on u, in both. A c1 of one is not
    comparable with a c1 of the other, nor either with the paper's: to a token's own row its product adds c1/steps times
    δ ‖u‖, δ ‖u‖ cos(h, u), and in the paper's block δ ‖h‖. The published constants are a place to start from.

    Args:
        c1: scale of the matrices. The paper took 0.015 for addition and multiplication, 0.03 for translation.
        c2: scale of the vectors: 0 for addition and multiplication, 0.2 for translation.
        layers: 0-based block indices, None for all; the paper's "10 through 20" of 26 blocks, read as 10..19.
        steps: the constant divisor.
        mlp_activation: "input" for a = u, "residual" for a = h.

    Returns:
        A Recipe. The matrices act on the MLP inputs, the vectors on the block outputs.

    Raises:
        ValueError: if c1 or c2 is not finite or both are 0, steps is not positive, layers are no block indices, or
            mlp_activation is another.
        TypeError: if one of them is of another type.

    Source: "Transmuting prompts into weights", Algorithm 1 and §4.1 to §4.3.
    """
    check_number("paper_recipe", "c1", c1)
    check_number("paper_recipe", "c2", c2)
    check_number("paper_recipe", "steps", steps, positive=True)
    if not c1 and not c2:
        raise ValueError(f"paper_recipe: c1 or c2 must not be 0, got {c1} and {c2}; the patch would change nothing")
    check_choice("paper_recipe", "mlp_activation", mlp_activation, MLP_ACTIVATIONS)
    return Recipe(
        layers=_layers("paper_recipe", layers), sites=("mlp", "residual"), pairing="two_pass", estimator="mean",
        normalization="norm", mlp_activation=mlp_activation,
        scale={"mlp": c1 / steps, "residual": c2 / steps}, tokens="all", header_weight=0.0, written_inputs=0,
        completions=1,
    )  # fmt: skip


def _ridge(given: Any) -> float:
    """One number for all inputs: sites differ in theirs, so that a vector is the business of who solves one of them."""
    if isinstance(given, (Tensor, list, tuple)):
        raise TypeError(
            f"transmute: ridge must be one number, got a {type(given).__name__}; ThoughtAccumulator.solve takes one "
            "for each input of a site"
        )
    return as_number("transmute", "ridge", given)


def _layers(function: str, given: Any) -> tuple[int, ...] | None:
    """Block indices in order."""
    if given is None:
        return None
    try:
        if isinstance(given, (bytes, bytearray)):  # whose items are integers
            raise TypeError
        chosen = [_index(layer) for layer in given]
    except TypeError:
        raise TypeError(
            f"{function}: layers must be 0-based block indices or None, got {given!r}; give a list or range, such as "
            "[3] or range(10, 20)"
        ) from None
    if not chosen or min(chosen) < 0 or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"{function}: layers must be distinct 0-based block indices, one at least, got {chosen}; None means all"
        )
    return tuple(sorted(chosen))


def _index(layer: Any) -> int:
    if isinstance(layer, bool) or (isinstance(layer, Tensor) and layer.dtype == torch.bool):
        raise TypeError
    return operator.index(layer)


def _sites(given: Any) -> tuple[str, ...] | None:
    """Sites in the order of SITES."""
    if given is None:
        return None
    chosen = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not chosen or not all(site in SITES for site in chosen):
        raise ValueError(f"transmute: sites must be among {', '.join(SITES)}, got {chosen}")
    return tuple(site for site in SITES if site in chosen)


def _scale(given: Any, sites: tuple[str, ...] | None) -> float | SiteScales:
    """One number, or one for each site; not 0 everywhere."""
    if isinstance(given, Mapping):
        if not set(sites or ()) <= set(given) <= set(SITES):
            wanted = f"one entry for each of {sorted(sites)}" if sites else f"sites among {', '.join(SITES)}"
            raise ValueError(f"transmute: scale must have {wanted}, got {sorted(map(str, given))}")
        # In one order, and so the patch's file.
        scales = SiteScales((site, as_number("transmute", "scale", given[site])) for site in SITES if site in given)
        used = [scales[site] for site in sites or scales]
    else:
        used = [as_number("transmute", "scale", given)]
    if not any(used):
        raise ValueError(f"transmute: scale must not be 0 at every site, got {given}; the patch would change nothing")
    return scales if isinstance(given, Mapping) else used[0]


def _check_residual_activation(sites: tuple[str, ...] | None, estimator: str) -> None:
    if "mlp" not in (sites or ()):
        raise ValueError(
            f"transmute: mlp_activation must be 'input' where sites are without 'mlp', got 'residual' with sites "
            f"{'of the default' if sites is None else list(sites)}; only that site has another a to choose"
        )
    if estimator != "mean":
        raise ValueError(
            f"transmute: mlp_activation must be 'input' with estimator {estimator!r}, got 'residual'; it would "
            "fit Δ to h, and the patched module multiplies the normed u: take estimator='mean'"
        )


def _sites_of(sites: Iterable[str] | None, decoder: Decoder, layers: tuple[int, ...]) -> tuple[str, ...]:
    """The sites, or those that suit the blocks, which may be mixtures of experts."""
    experts = [layer for layer in layers if not decoder.blocks[layer].mlp_inputs]
    if sites is None:
        return ("attention",) if experts else ("attention", "down")
    inside = [site for site in ("mlp", "down") if site in sites]
    if inside and experts:
        dense = [block.index for block in decoder.blocks if block.mlp_inputs]
        instead = f", or layers= of blocks with one MLP, such as {dense[0]}" if dense else ""
        raise ValueError(
            f"transmute: sites must be without {inside[0]!r} where the MLP is a mixture of experts, as at block "
            f"{experts[0]}, got {sorted(sites)}; give sites=('attention',){instead}"
        )
    return tuple(sites)
