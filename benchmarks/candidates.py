"""Estimators that the package does not have, as rows of recipes.py: each changes one thing in the default recipe.

Every function here takes a Bench and returns a context in which transmute fits in that way. Several passes of the
sequential pairing are not among them: its rows at a block depend on the patches of earlier blocks only, so a second
pass over the model patched by the first makes the same rows and the same patch (tests/test_candidates.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import thought_kernels as tk
from thought_kernels.demo.tasks import TASKS, split_by_symbols
from thought_kernels.models import in_memory
from thought_kernels.transmute import fitting, substitution
from thought_kernels.transmute.accumulator import ThoughtAccumulator
from thought_kernels.transmute.batches import Batch, BlockPrefix, Group, embed
from thought_kernels.transmute.completions import complete, end_of_turn_id, stop_ids
from thought_kernels.transmute.estimators import exact, ridge_solve
from thought_kernels.transmute.examples import load_examples
from thought_kernels.transmute.pairing import Run, sequential
from thought_kernels.transmute.prompt import EncodedExample, encode
from thought_kernels.transmute.streams import attend, through_mlp

# (block, site) -> the estimator there and its ε.
Places = Callable[[int, str], tuple[str, float]]
Change = Callable[[Any], AbstractContextManager[Any]]  # of a Bench
Moments = Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # Σ w a aᵀ and Σ w a, with Σ w = 1

GENERIC_TEXTS = 64  # of numbers and of sentences each
SMALLEST_EIGENVALUE = 1e-6  # relative; below it a direction is rounding


def accumulated_by(accumulator: Callable[..., ThoughtAccumulator]) -> AbstractContextManager[Any]:
    return mock.patch.object(fitting, "ThoughtAccumulator", accumulator)


class ByPlace(ThoughtAccumulator):
    """Solves each block and site as a trial says, whatever estimator and ridge it is asked for."""

    def __init__(self, places: Places, **options: Any) -> None:
        super().__init__(**options)
        self._places = places

    def solve(self, *args: Any, layers: Any = None, sites: Any = None, **options: Any) -> tk.ThoughtPatch:
        entries = {}
        for layer, site in itertools.product(self.layers if layers is None else layers, sites or self.sites):
            estimator, options["ridge"] = self._places(layer, site)
            solved = super().solve(estimator, layers=[layer], sites=[site], **options)
            entries[layer, site] = solved.entries[layer, site]
        return tk.ThoughtPatch(entries, solved.provenance)


class OwnMatrix(ThoughtAccumulator):
    """Solves as it is asked to, and then puts a matrix of its own in place of each."""

    def matrix(self, layer: int, site: str, cross: Tensor, gram: Tensor, epsilon: float) -> Tensor:
        """Δ of the float64 sums C and Z."""
        raise NotImplementedError

    def solve(self, *args: Any, ridge: float, **options: Any) -> tk.ThoughtPatch:
        solved = super().solve(*args, ridge=ridge, **options)
        entries = {}
        for (layer, site), entry in solved.entries.items():
            sums = self.sums(layer, site)
            if entry.matrix is None or sums is None or sums.cross is None or sums.gram is None:
                entries[layer, site] = entry
                continue
            gram = sums.gram.double()
            matrix = self.matrix(layer, site, sums.cross.double(), (gram + gram.T) / 2, ridge)
            entries[layer, site] = replace(entry, matrix=matrix.to(entry.matrix), fit=None)
        return tk.ThoughtPatch(entries, solved.provenance)


def ridge_in(cross: Tensor, gram: Tensor, metric: Tensor, epsilon: float) -> Tensor:
    """C (Z + ε M)⁺ with M scaled to the trace of Z: least ‖Δa − δ‖² over the rows + ε tr(Δ M Δᵀ)."""
    penalised = gram + epsilon * float(gram.trace() / metric.trace()) * metric
    return exact(cross, penalised, rtol=SMALLEST_EIGENVALUE)


class ByHead(OwnMatrix):
    """At the attention site, what enters one head is foretold from other heads at a higher price, or not at all.

    Rows h of Δ: C_h (Z + ε tr(Z)/d D_h)⁻¹, D_h = 1 on the columns of the head itself and `price` on all others. With an
    infinite price Δ is block-diagonal: C_hh (Z_hh + ε tr(Z_hh)/d_h)⁻¹.

    Args:
        heads: equal slices of the attention output: the query heads, or the groups of them that share keys and values.
        price: of other heads' columns.
    """

    def __init__(self, heads: int, price: float, **options: Any) -> None:
        super().__init__(**options)
        self._heads, self._price = heads, price

    def matrix(self, layer: int, site: str, cross: Tensor, gram: Tensor, epsilon: float) -> Tensor:
        if site != "attention":
            return ridge_solve(cross, gram, epsilon)
        found = torch.zeros_like(cross)
        width = len(gram) // self._heads
        for start in range(0, len(gram), width):
            own = slice(start, start + width)
            if self._price == math.inf:
                found[own, own] = ridge_solve(cross[own, own], gram[own, own], epsilon)
                continue
            price = torch.full_like(gram[0], self._price)
            price[own] = 1
            penalised = gram + torch.diag(epsilon * gram.trace() / len(gram) * price)
            found[own] = torch.linalg.solve(penalised, cross[own].T).T
        return found


class InMetric(OwnMatrix):
    """Ridge in the metric of activations: C (Z + ε M)⁻¹, tr(M) = tr(Z).

    Args:
        moments: of the activations that Δ should leave alone, None for the rows themselves.
        centred: M is their covariance, so that Δ may do what it likes to their mean; otherwise their second moment.
    """

    def __init__(self, moments: Moments | None, centred: bool, **options: Any) -> None:
        super().__init__(**options)
        self._moments, self._centred = moments, centred

    def matrix(self, layer: int, site: str, cross: Tensor, gram: Tensor, epsilon: float) -> Tensor:
        if self._moments is None:
            sums = self._sums[layer, site]
            total = sums.moments[0].to(gram)
            second, mean = gram / total, sums.activation_sum.double() / total
        else:
            second, mean = self._moments[layer, site]
        return ridge_in(cross, gram, second - torch.outer(mean, mean) if self._centred else second, epsilon)


class TowardsMeanShift(OwnMatrix):
    """Ridge that shrinks towards the mean shift: ‖Δ − δ̄ kᵀ‖ in place of ‖Δ‖, with k·ā = 1.

    Args:
        fitted: k is the direction along which activations are most nearly constant, (Z + ε tr(Z)/d)⁻¹ ā up to a factor;
            otherwise ā itself up to a factor.
    """

    def __init__(self, fitted: bool, **options: Any) -> None:
        super().__init__(**options)
        self._fitted = fitted

    def matrix(self, layer: int, site: str, cross: Tensor, gram: Tensor, epsilon: float) -> Tensor:
        sums = self._sums[layer, site]
        total = sums.moments[0].to(gram)
        shift, mean = sums.delta_sum.double() / total, sums.activation_sum.double() / total
        direction = ridge_solve(mean[None], gram, epsilon)[0] if self._fitted else mean
        target = torch.outer(shift, direction / direction.dot(mean))
        return target + ridge_solve(cross - target @ gram, gram, epsilon)


def tilted(weights: Tensor, effect: Tensor) -> Tensor:
    """Weights [B, T], half of each example's total spread anew in proportion to weights · effect."""
    wanted = weights * effect.to(weights).clamp(min=0)
    total = wanted.sum(1, keepdim=True)
    spread = wanted * weights.sum(1, keepdim=True) / total.clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.where(total > 0, (weights + spread) / 2, weights)


class ByShift(ThoughtAccumulator):
    """Weighs an example's tokens by how far the instruction moves them at the site itself, ‖δ‖²."""

    def update(
        self, layer: int, site: str, delta: Tensor, activation: Tensor | None, weights: Tensor | None = None
    ) -> None:
        if weights is not None:
            weights = tilted(weights, delta.double().square().sum(-1))
        super().update(layer, site, delta, activation, weights)


def weighted_by_divergence(run: Run) -> None:
    """The sequential pairing, an example's tokens weighed by KL(prompted ‖ bare) of the next-token distributions."""
    groups = []
    for group, prefixes in zip(run.groups, run.prefixes, strict=True):
        batches = [replace(b, weights=tilted(b.weights, _divergence(run, group, prefixes, b))) for b in group.batches]
        groups.append(replace(group, batches=tuple(batches)))
    run.groups = groups
    sequential(run)


def _divergence(run: Run, group: Group, prefixes: list[BlockPrefix], batch: Batch) -> Tensor:
    """KL(prompted ‖ bare) at each token, [B, T]; of the last block's streams, which all of the model's must be."""
    x = embed(run.decoder, batch).repeat(2, 1, 1)
    for block, prefix in zip(run.decoder.blocks, prefixes, strict=True):
        o = attend(run, block, x, group, [prefix.with_context, prefix.without_context], batch)
        x = through_mlp(block, block.attention_residual(x, o.to(x.dtype)), x)
    prompted, bare = run.decoder.logits(x).float().log_softmax(-1).chunk(2)
    return (prompted.exp() * (prompted - bare)).sum(-1).cpu()


def generic_moments(model: Any, tokenizer: Any, texts: Sequence[str]) -> Moments:
    """Moments of the bare model's activations while it reads texts and answers them, every text weighing the same."""
    decoder = in_memory("generic_moments", model)
    encoded = [encode(tokenizer, "instruction", text) for text in texts]
    end = end_of_turn_id(tokenizer, "instruction", load_examples([texts[0]])[0], "\n")
    bare = [[*example.header, *example.tokens] for example in encoded]
    options: dict[str, Any] = {"stops": stop_ids(model, end), "max_new_tokens": 20, "batch_size": 256}
    answers = itertools.chain.from_iterable(complete(model, bare, **options))
    found: dict[tuple[int, str], list[Tensor]] = {}

    def watch(key: tuple[int, str], skipped: int, _: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0][0, skipped:].double()
        for total, value in zip(found[key], (rows.T @ rows, rows.sum(0)), strict=True):
            total += value / len(rows) / len(texts)

    sites = {(block.index, "attention"): block.o_proj for block in decoder.blocks}
    sites |= {(block.index, "mlp"): block.gate_proj for block in decoder.blocks}
    for key, module in sites.items():
        width = module.weight.shape[1]
        found[key] = [torch.zeros(width, width).double(), torch.zeros(width).double()]
    for example, prompt, answer in zip(encoded, bare, answers, strict=True):
        hooks = [
            module.register_forward_pre_hook(functools.partial(watch, key, len(example.header)))
            for key, module in sites.items()
        ]
        try:
            with torch.no_grad():
                model(torch.tensor([[*prompt, *answer]], device=model.device))
        finally:
            for hook in hooks:
                hook.remove()
    return {key: (second, mean) for key, (second, mean) in found.items()}


def generic_texts(seed: int = 0) -> list[str]:
    """Inputs of no task in particular, triples of 0-4 and sentences of one half of the lexicon: never outside ones."""
    rng = random.Random(f"generic {seed}")
    kinds = (split_by_symbols(TASKS[name])[0] for name in ("sum", "translate"))
    return [text for near in kinds for text in rng.sample(near, GENERIC_TEXTS)]


@functools.cache
def _generic(model: Any, tokenizer: Any) -> Moments:
    return generic_moments(model, tokenizer, generic_texts())


def with_constant(name: str, value: float) -> Change:
    """The copies made with another value of one of substitution.py's constants."""
    return lambda bench: mock.patch.object(substitution, name, value)


def by_place(places: Places) -> Change:
    return lambda bench: accumulated_by(functools.partial(ByPlace, places))


def by_head(price: float, *, groups: bool = False) -> Change:
    def change(bench: Any) -> AbstractContextManager[Any]:
        config = in_memory("by_head", bench.model).config
        heads = config.num_key_value_heads if groups else config.num_attention_heads
        return accumulated_by(functools.partial(ByHead, heads, price))

    return change


def in_generic_metric(*, centred: bool) -> Change:
    return lambda bench: accumulated_by(functools.partial(InMetric, _generic(bench.model, bench.tokenizer), centred))


def towards_mean_shift(*, fitted: bool) -> Change:
    return lambda bench: accumulated_by(functools.partial(TowardsMeanShift, fitted))


def with_own_answers(bench: Any) -> AbstractContextManager[Any]:
    """Copies of words end with what the prompted model writes after reading them.

    Random vectors could not: they are no words that a model could write, so its answer to them holds other ones. A
    completion that holds a number or word of the outside inputs is left out, and the copy stays as it was.
    """
    copied = fitting.with_substitutions
    end = end_of_turn_id(bench.tokenizer, "instruction", load_examples(["text"])[0], "\n")
    options: dict[str, Any] = {"stops": stop_ids(bench.model, end), "max_new_tokens": 20, "batch_size": 256}

    def answered(examples: Sequence[EncodedExample], *args: Any) -> list[EncodedExample]:
        found = copied(examples, *args)
        copies = found[len(examples) :]
        prompts = [[*copy.header, *copy.instruction, *copy.tokens[: copy.answer_start]] for copy in copies]
        answers = itertools.chain.from_iterable(complete(bench.model, prompts, **options))
        for index, (copy, answer) in enumerate(zip(copies, answers, strict=True), len(examples)):
            if not bench.outside_tokens & set(answer):
                found[index] = copy._replace(tokens=[*copy.tokens[: copy.answer_start], *answer])
        return found

    return mock.patch.object(fitting, "with_substitutions", answered)


COPIES: dict[str, Change] = {
    "copies of weight 2": with_constant("COPIES_SHARE", 2.0),
    "copies of weight 8": with_constant("COPIES_SHARE", 8.0),
    "vectors with nothing of the word": with_constant("MOST_LIKENESS", 0.0),
    "vectors with up to half of the word": with_constant("MOST_LIKENESS", 0.5),
}
CANDIDATES: dict[str, Change] = {
    "one matrix per head": by_head(math.inf),
    "one matrix per group of heads": by_head(math.inf, groups=True),
    "other heads at ten times the ridge": by_head(10.0),
    "ridge in the metric of other texts": in_generic_metric(centred=False),
    "ridge in the covariance of other texts": in_generic_metric(centred=True),
    "ridge in the rows' covariance": lambda bench: accumulated_by(functools.partial(InMetric, None, True)),
    "towards the mean shift": towards_mean_shift(fitted=True),
    "towards the mean shift, along the mean": towards_mean_shift(fitted=False),
    "weighted by KL": lambda bench: mock.patch.dict(fitting.PAIRINGS, {"sequential": weighted_by_divergence}),
    "weighted by shift": lambda bench: accumulated_by(ByShift),
}
