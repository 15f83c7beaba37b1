"""From an instruction and a few examples to a ThoughtPatch."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from thought_kernels.estimation import estimators
from thought_kernels.estimation.accumulator import NORMALIZATIONS
from thought_kernels.fitting.fit import Recipe, fit
from thought_kernels.generation.completions import ending_of, with_completions
from thought_kernels.models import in_memory
from thought_kernels.models.decoder import Decoder
from thought_kernels.pairing.pairings import MEMORY_BUDGET, PAIRINGS
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SITES
from thought_kernels.prompts.prompt import EncodedExample, Instruction, encode, load_examples

TOKENS = ("all", "answer")


@torch.no_grad()
def transmute(
    model: Any,
    tokenizer: Any,
    instruction: Instruction,
    examples: Any,
    *,
    without: Instruction | None = None,
    layers: Iterable[int] | None = None,
    sites: Iterable[str] | None = None,
    pairing: str = "sequential",
    estimator: str = "ridge",
    normalization: str = "none",
    scale: float | Mapping[str, float] = 1.0,
    ridge: float = estimators.DEFAULT_RIDGE,
    tokens: str = "all",
    header_weight: float = 0.0,
    separator: str = "\n",
    format: str | None = None,
    batch_size: int = 32,
    memory_budget: int = MEMORY_BUDGET,
    completions: int = 3,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> ThoughtPatch:
    """Turns an instruction into a weight update: the patched model follows it without being told. No training.

    Over the tokens i of e in every prompt [P, e], with δ_i = a'_i − a_i the activation with P minus that with P°, which
    is P without the instruction: in the plain case P = [H, I] and P° = H::

        C = Σ w_i δ_i a_iᵀ/ν_i      Z = Σ w_i a_i a_iᵀ/ν_i      ridge: Δ = C (Z + ε tr(Z)/d 1)⁻¹

    per block and site, and the patched module multiplies x + Δ x in place of x. At the "down" site, a is what down_proj
    multiplies, δ what the block's output still lacks, and Δ is added to down_proj's weight.

    Args:
        model: a transformers causal language model; it is only read.
        tokenizer: its fast tokenizer.
        instruction: a text, or chat turns (a system message, few-shot demonstrations) that come before the example's.
        examples: user texts, {"prompt", "completion"} dicts, message lists, a path (txt, csv, json, jsonl), or a
            dataset of these. Where there is no completion the prompted model writes some.
        without: what the prompt on the other side says in the instruction's place, such as another wording or the
            opposite; None for the same chat without it, with what the template may write then.
        layers: 0-based block indices, None for all. Only blocks up to the last of them are run.
        sites: of "attention", "mlp", "down", "residual"; None for "attention" and "down", the two output projections
            of a block, or for "attention" alone where there is a mixture of experts, which has neither "mlp" nor
            "down". Within a block they are fitted in this order, each after the earlier ones are applied ("residual"
            beside "mlp", "down" after both): each mends what the others left.
        pairing: "two_pass", "layerwise" or "sequential", see pairing/pairings.py.
        estimator: "mean", "exact", "ridge", "second_order" or "affine", see estimators.solve.
        normalization: ν, "none", "norm" (‖a‖) or "squared_norm" (‖a‖²).
        scale: λ, one number or one per site; "mean" needs it tuned, the others are made for 1.
        ridge: ε, in units of Z's mean eigenvalue.
        tokens: which tokens of e are summed, "all" or "answer" (the completion with its end-of-turn token).
        header_weight: H's rows join the fit with δ = 0 and this total weight, that of all examples being 1; it keeps
            the patch from moving the keys that e sees in H. 0 leaves them out.
        separator: between instruction and example text; part of I.
        format: of one turn, "{prompt} -> {completion}\\n" or the like, in place of a chat template.
        batch_size: examples in a batch at most. It changes the result by rounding only.
        memory_budget: bytes of hidden states, 2 GiB unless given. "sequential" keeps 2 · tokens · hidden size numbers
            between blocks, for all examples: first on the model's device and, where that is not the CPU, as many bytes
            again in CPU memory; what is left over lies in a temporary file. The others need none of it.
        completions: that the prompted model writes for an example without one: the first greedily, the others drawn
            from its own distribution, since a patch sees more of what an instruction does in several answers. They
            share the example's weight.
        max_new_tokens: longest completion that is generated.
        seed: of the completions that are drawn.
        progress: show a progress bar on stderr.

    Returns:
        A ThoughtPatch, float32 (float64 for a float64 model), with the settings in its provenance.

    Raises:
        ValueError: an unknown or unfit option, a prompt that does not align, an example longer than the model's
            context, or NaN or an infinity in the model's activations: the message names block and example.
        TypeError: a model without an adapter, or arguments of another type.

    Source: "Transmuting prompts into weights", Algorithm 1, eq. 5-8 and A.2; the attention site, the sequential pairing
        and the header's rows are ours.
    """
    decoder = in_memory("transmute", model)
    loaded = load_examples(examples)
    chosen_layers = _layers(layers, len(decoder.blocks))
    chosen_sites = _sites(sites, decoder, chosen_layers)
    for name, value, known in (
        ("pairing", pairing, PAIRINGS),
        ("estimator", estimator, estimators.ESTIMATORS),
        ("normalization", normalization, NORMALIZATIONS),
        ("tokens", tokens, TOKENS),
    ):
        _choice(name, value, known)
    batch_size, max_new_tokens = _count("batch_size", batch_size), _count("max_new_tokens", max_new_tokens)
    completions, seed = _count("completions", completions), _integer("seed", seed)
    memory_budget, header_weight = _count("memory_budget", memory_budget), _number("header_weight", header_weight)
    scales, ridge = _scales(scale, chosen_sites), _number("ridge", ridge)
    if header_weight < 0:
        raise ValueError(f"transmute: header_weight must not be negative, got {header_weight}")
    estimators.check_options(estimator, 1.0, ridge, normalization)
    recipe = Recipe(
        layers=chosen_layers, sites=chosen_sites, pairing=pairing, estimator=estimator, normalization=normalization,
        scales=scales, ridge=ridge, tokens=tokens, header_weight=header_weight, batch_size=batch_size,
        memory_budget=memory_budget,
    )  # fmt: skip
    encoded = [
        encode(tokenizer, instruction, example, without=without, separator=separator, format=format)._replace(
            number=number
        )
        for number, example in enumerate(loaded)
    ]
    if header_weight and any(row.replaced for row in encoded):
        raise ValueError(
            "transmute: header_weight must be 0 where the prompt without the instruction is no beginning of the prompt "
            f"with it, got {header_weight}; only rows that both have in common can join with δ = 0"
        )
    headless = [row.number for row in encoded if not row.header]
    if header_weight and headless:
        raise ValueError(
            f"transmute: header_weight must be 0 where nothing stands before the instruction, got {header_weight} with "
            f"examples[{headless[0]}]; there are no rows of a header to join"
        )
    _check_lengths(decoder, encoded)
    generated = sum(example.completion is None for example in loaded)
    if generated:
        ending = ending_of(decoder.model, tokenizer, loaded[0], format=format)
        encoded = with_completions(
            decoder.model, encoded, ending=ending, max_new_tokens=max_new_tokens, batch_size=batch_size,
            completions=completions, seed=seed,
        )  # fmt: skip
    described = {
        "instruction": _told(instruction),
        "without": None if without is None else _told(without),
        "separator": separator,
        "format": format,
        "model": getattr(decoder.config, "_name_or_path", "") or None,
        "model_type": decoder.config.model_type,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.blocks),
        "examples": len(loaded),
        "generated_completions": generated * completions,
        "completions": completions,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    return fit(decoder, recipe, encoded, provenance=described, progress=progress)


def _told(instruction: Instruction) -> str | list[dict[str, Any]]:
    return instruction if isinstance(instruction, str) else [dict(turn) for turn in instruction]


def _layers(layers: Iterable[int] | None, blocks: int) -> frozenset[int]:
    if layers is None:
        return frozenset(range(blocks))
    try:
        chosen = [operator.index(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"transmute: layers must be 0-based block indices or None, got {layers!r}") from None
    if not chosen or not all(0 <= layer < blocks for layer in chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"transmute: layers must be distinct 0-based block indices below {blocks}, got {chosen}; "
            "give layers= that this model has"
        )
    return frozenset(chosen)


def _sites(sites: Iterable[str] | None, decoder: Decoder, layers: frozenset[int]) -> frozenset[str]:
    experts = [layer for layer in sorted(layers) if not decoder.blocks[layer].mlp_inputs]
    if sites is None:
        return frozenset({"attention"} if experts else {"attention", "down"})
    chosen = [sites] if isinstance(sites, str) else list(sites) if isinstance(sites, Iterable) else [sites]
    if not chosen or not all(site in SITES for site in chosen):
        raise ValueError(f"transmute: sites must be among {', '.join(SITES)}, got {chosen}")
    inside = [site for site in ("mlp", "down") if site in chosen]
    if inside and experts:
        dense = [block.index for block in decoder.blocks if block.mlp_inputs]
        instead = f", or layers= of blocks with one MLP, such as {dense[0]}" if dense else ""
        raise ValueError(
            f"transmute: sites must be without {inside[0]!r} where the MLP is a mixture of experts, as at block "
            f"{experts[0]}, got {sorted(chosen)}; give sites=('attention',){instead}"
        )
    return frozenset(chosen)


def _scales(scale: float | Mapping[str, float], sites: frozenset[str]) -> dict[str, float]:
    if not isinstance(scale, Mapping):
        number = _number("scale", scale)
        return {site: number for site in SITES if site in sites}  # in one order, and so the patch's file
    if not sites <= set(scale) or not set(scale) <= set(SITES):
        raise ValueError(f"transmute: scale must have one entry for each of {sorted(sites)}, got {sorted(scale)}")
    return {site: _number("scale", value) for site, value in scale.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"transmute: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"transmute: {name} must be finite, got {value}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"transmute: {name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"transmute: {name} must be an integer, got {value!r}") from None


def _count(name: str, value: Any) -> int:
    count = _integer(name, value)
    if count < 1:
        raise ValueError(f"transmute: {name} must be at least 1, got {count}")
    return count


def _choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"transmute: {name} must be one of {', '.join(known)}, got {value!r}")


def _check_lengths(decoder: Decoder, encoded: list[EncodedExample]) -> None:
    limit = getattr(decoder.config, "max_position_embeddings", None)
    for example in encoded:
        if limit is not None and example.length > limit:
            raise ValueError(
                f"transmute: examples[{example.number}] must fit the model's context of {limit} tokens, got "
                f"{example.length} with the instruction; shorten it or drop it"
            )
