"""The published recipe on a model of any depth, with the c1 that suits the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from thought_kernels.estimation.scales import ScaleWarning
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.refit import refit
from thought_kernels.evaluation.rivals.rows import BATCH_SIZE, Rows
from thought_kernels.fitting.recipe import paper_recipe
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Instruction

PAPER_C1, PAPER_DIVISOR = 0.015, 300
C1_FACTORS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
PAPER_BLOCKS, PAPER_FIRST, PAPER_STOP = 26, 10, 20


def paper_layers(blocks: int) -> list[int]:
    """The paper's blocks 10..19 of 26 carried to another depth: the same share of it, 0-based, at least one block."""
    first = round(blocks * PAPER_FIRST / PAPER_BLOCKS)
    return list(range(first, max(round(blocks * PAPER_STOP / PAPER_BLOCKS), first + 1)))


def effective_c1(c1: float, steps: int) -> float:
    """c1 · examples / 300: what the constant divisor makes of c1 (TP §4.1)."""
    return c1 * steps / PAPER_DIVISOR


def paper_patch(
    model: Any, tokenizer: Any, instruction: Instruction, examples: Sequence[Any], c1: float, c2: float = 0.0,
    *, layers: Iterable[int] | None = None, mlp_activation: str = "input", **options: Any,
) -> ThoughtPatch:  # fmt: skip
    """Algorithm 1 on some of the examples; the sum over all pieces is Algorithm 1 on all of them, to rounding.

    Args:
        model, tokenizer, instruction, examples: as transmute takes them.
        c1, c2: scales of matrices and vectors; the patch is linear in both.
        layers: 0-based blocks, None for paper_layers.
        mlp_activation: which a, see paper_recipe.
        options: further arguments of transmute, none of them the recipe's.

    Raises:
        ValueError: an option that the recipe sets, or as paper_recipe.
    """
    blocks = paper_layers(len(describe(model).blocks)) if layers is None else list(layers)
    recipe = paper_recipe(c1=c1, c2=c2, steps=PAPER_DIVISOR, layers=blocks, mlp_activation=mlp_activation)
    if taken := sorted(recipe.keys() & options.keys()):
        raise ValueError(
            f"paper_patch: options must be none of the recipe's own, got {', '.join(taken)}; use transmute with "
            "{**paper_recipe(...), ...}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleWarning)  # it is scaled, or one of several pieces
        return transmute(model, tokenizer, instruction, examples, **{"batch_size": 128, **options, **recipe})


def sweep_c1(
    model: Any, unit: ThoughtPatch, trial: Trial, c1: float = PAPER_C1, factors: Sequence[float] = C1_FACTORS
) -> list[tuple[float, float, float]]:
    """Tries multiples of a c1 on a trial; the matrices are linear in c1, so one patch is fitted and scaled.

    Args:
        model: the trial's, unpatched.
        unit: Algorithm 1's patch with c1 = 1, of as many examples as the constant divisor where there are: the
            effective c1 is then c1.
        trial: inputs that nothing else is measured on, with divergences.
        c1: the published one.
        factors: what it is multiplied by.

    Returns:
        (c1, accuracy, recovered effect) for each factor.
    """
    tried = []
    for factor in factors:
        with (factor * c1 * unit).applied(model):
            score = trial.score(model)
        tried.append((factor * c1, score.accuracy, score.effect.recovered))
    return tried


def best_c1(tried: Sequence[Sequence[float]]) -> float:
    """The c1 of best accuracy, ties broken by recovered effect."""
    return max(tried, key=lambda row: tuple(row[1:]))[0]


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """Algorithm 1 on the rows, a step each, with the effective c1 that suits them, c2 = 0.

    Args:
        model: unpatched.
        rows: to fit.
        choice: rows that are read, to choose c1 by.

    Source: "Transmuting prompts into weights", Algorithm 1 and §4.1.
    """
    decoder = describe(model)
    layers = paper_layers(len(decoder.blocks))
    # Its matrices are linear in c1: one patch is fitted and scaled. Each example's completions share its weight.
    steps = round(sum(row.share for row in rows.encoded))
    unit = refit(decoder, rows.encoded, paper_recipe(c1=1.0, layers=layers, steps=steps), batch_size=BATCH_SIZE)
    candidates = [(f"c1 {factor * PAPER_C1:g}", factor * PAPER_C1 * unit) for factor in C1_FACTORS]
    found = choose(model, choice, candidates)
    where = f"Algorithm 1 on blocks {layers[0]} to {layers[-1]}, effective {found.settings}, c2 0"
    return found._replace(settings=where)
