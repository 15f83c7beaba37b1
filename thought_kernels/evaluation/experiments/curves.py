"""Accuracy against the number of examples, for the paper's recipe and for transmute's defaults on the same axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.fitting.recipe import paper_recipe
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Instruction

PAPER_C1, PAPER_DIVISOR = 0.015, 300
C1_FACTORS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
PAPER_BLOCKS, PAPER_FIRST, PAPER_STOP = 26, 10, 20


@dataclass(frozen=True)
class Point:
    """Accuracy without the instruction after fitting on `steps` examples; effective_c1 is None for our recipe."""

    steps: int
    accuracy: float
    effective_c1: float | None = None


@dataclass(frozen=True)
class Sample:
    """One question of TP Tables 1 to 3: the prompted and the patched answer after `steps` examples."""

    steps: int
    effective_c1: float | None
    query: str
    prompted: str
    patched: str


def paper_layers(blocks: int) -> list[int]:
    """The paper's blocks 10..19 of 26 carried to another depth: the same share of it, 0-based, at least one block."""
    first = round(blocks * PAPER_FIRST / PAPER_BLOCKS)
    return list(range(first, max(round(blocks * PAPER_STOP / PAPER_BLOCKS), first + 1)))


def paper_steps(steps: int) -> list[int]:
    """Fifteen equal strides: every 40 examples up to 600."""
    return sorted({max(1, steps * k // 15) for k in range(1, 16)})


def default_steps(steps: int) -> list[int]:
    """A few examples, then doubling, up to 64 or all of them: most of what more examples bring comes before."""
    return [*itertools.takewhile(lambda n: n < min(steps, 64), (4, 8, 16, 32)), min(steps, 64)]


def effective_c1(c1: float, steps: int) -> float:
    """c1 · examples / 300: what the constant divisor makes of c1 (TP §4.1)."""
    return c1 * steps / PAPER_DIVISOR


def paper_patch(
    model: Any, tokenizer: Any, instruction: Instruction, examples: Sequence[Any], c1: float, c2: float = 0.0,
    *, layers: Iterable[int] | None = None, **options: Any,
) -> ThoughtPatch:  # fmt: skip
    """Algorithm 1 on some of the examples; the sum over all pieces is Algorithm 1 on all of them, to rounding.

    Args:
        model, tokenizer, instruction, examples: as transmute takes them.
        c1, c2: scales of matrices and vectors; the patch is linear in both.
        layers: 0-based blocks, None for paper_layers.
        options: further arguments of transmute.
    """
    blocks = paper_layers(len(describe(model).blocks)) if layers is None else list(layers)
    recipe = paper_recipe(c1=c1, c2=c2, steps=PAPER_DIVISOR, layers=blocks)
    return transmute(model, tokenizer, instruction, examples, **{"batch_size": 128, **options, **recipe})


def paper_line(
    model: Any, tokenizer: Any, instruction: Instruction, examples: Sequence[Any], steps: Iterable[int], c1: float,
    c2: float = 0.0, **options: Any,
) -> Iterator[tuple[int, ThoughtPatch]]:  # fmt: skip
    """Algorithm 1's patch after each number of steps, increasing; only what is new at a step is run.

    Further arguments are paper_patch's.
    """
    patch: ThoughtPatch | None = None
    fitted = 0
    for count in steps:
        piece = paper_patch(model, tokenizer, instruction, examples[fitted:count], c1, c2, **options)
        patch, fitted = piece if patch is None else patch + piece, count
        yield count, patch


def default_line(
    model: Any, tokenizer: Any, instruction: Instruction, examples: Sequence[Any], steps: Iterable[int], **options: Any
) -> Iterator[tuple[int, ThoughtPatch]]:
    """The patch of transmute's default recipe on the first examples, for each number of them."""
    for count in steps:
        yield count, transmute(model, tokenizer, instruction, examples[:count], **{"batch_size": 128, **options})


def own_examples(questions: Sequence[str], written: Sequence[str]) -> list[dict[str, Any]]:
    """Questions with what the prompted model wrote to them, as transmute takes examples."""
    return [{"prompt": q, "completion": answer or None} for q, answer in zip(questions, written, strict=True)]


def answered(
    model: Any, trial: Trial, patches: Iterable[tuple[int, ThoughtPatch]]
) -> Iterator[tuple[int, float, list[str]]]:
    """What each patch of a line makes of the trial's questions: (steps, accuracy, answers)."""
    for count, patch in patches:
        with patch.applied(model):
            accuracy, texts = trial.answer(model)
        yield count, accuracy, texts


def curve(
    rows: Iterable[tuple[int, float, Sequence[str]]], questions: Sequence[str], prompted: Sequence[str],
    c1: float | None = None,
) -> tuple[list[Point], list[Sample]]:  # fmt: skip
    """A line's points, and one question answered at each, the questions in turn.

    Args:
        rows: (steps, accuracy, answers), the bare model's first, at 0 steps.
        questions, prompted: what was asked, and the prompted model's answers.
        c1: of the paper's recipe, None for the default one.
    """
    points, samples = [], []
    for index, (steps, accuracy, texts) in enumerate(rows):
        effective, query = None if c1 is None else effective_c1(c1, steps), index % len(questions)
        points.append(Point(steps, accuracy, effective))
        samples.append(Sample(steps, effective, questions[query], prompted[query], texts[query]))
    return points, samples


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
