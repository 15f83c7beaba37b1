"""Accuracy against the number of examples, for the paper's recipe and ours on the same axes (TP Figure 1, Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.demo.tasks import TASKS, Task
from thought_kernels.evaluation.experiments import curves
from thought_kernels.evaluation.experiments.curves import Point, Sample
from thought_kernels.evaluation.measures.trial import Trial, prompted_texts
from thought_kernels.evaluation.rivals import paper as published
from thought_kernels.models import describe

CURVES = ("sum", "multiply")
VALIDATION = "largest"  # c1 is chosen on this instruction, and reported on the others
CURVE_INPUTS = 64


@dataclass(frozen=True)
class Curve:
    """One instruction's curves.

    Attributes:
        name: of the task.
        prompted, base: accuracy with and without the instruction on the curve's inputs.
        paper: Algorithm 1 with the swept c1.
        default: transmute with its default settings.
        samples: of the paper's recipe.
        c1: of the paper's recipe.
        layers: 0-based blocks of the paper's recipe.
        inputs: how many inputs each point was measured on.
    """

    name: str
    prompted: float
    base: float
    paper: list[Point]
    default: list[Point]
    samples: list[Sample]
    c1: float
    layers: list[int]
    inputs: int


@dataclass(frozen=True)
class Sweep:
    """The choice of c1 on the validation instruction.

    Attributes:
        instruction: name of the validation task.
        steps: examples that the swept patches were fitted on.
        tried: (c1, accuracy, recovered effect) each.
        c1: the chosen one: best accuracy, ties broken by recovered effect.
    """

    instruction: str
    steps: int
    tried: list[tuple[float, float, float]]
    c1: float


def curve_points(steps: int) -> list[int]:
    """The examples of every point that draw_curve measures, the paper's and ours, in order."""
    return [*curves.paper_steps(steps), *curves.default_steps(steps)]


def sweep_c1(
    model: Any, tokenizer: Any, fit: Sequence[str], fresh: Sequence[str], steps: int, known: dict[str, list[int]],
    options: dict[str, Any],
) -> Sweep:  # fmt: skip
    """Tries C1_FACTORS times the paper's c1 on the validation instruction, where the effective c1 equals c1.

    That is with as many examples as the constant divisor (half of the curve's). The matrices are linear in c1, so one
    patch is fitted and scaled.
    """
    task, count = TASKS[VALIDATION], max(1, min(published.PAPER_DIVISOR, steps // 2))
    fresh = fresh[:CURVE_INPUTS]
    trial = Trial(model, tokenizer, task.instruction, fresh, [task.answer(x) for x in fresh], known=known, **options)
    tried = published.sweep_c1(
        model, published.paper_patch(model, tokenizer, task.instruction, fit[:count], 1.0), trial
    )
    return Sweep(VALIDATION, count, tried, published.best_c1(tried))


def draw_curve(
    model: Any, tokenizer: Any, task: Task, fit: Sequence[str], fresh: Sequence[str], steps: int, c1: float,
    known: dict[str, list[int]], options: dict[str, Any], ticker: Callable[[str], None],
) -> Curve:  # fmt: skip
    """Measures both recipes on prefixes of the same examples.

    Args:
        model, tokenizer: unpatched.
        task: the instruction.
        fit: examples to take prefixes of, at most `steps`.
        fresh: inputs to measure on; the first CURVE_INPUTS are used.
        steps: examples at the curve's end; fewer where `fit` is shorter.
        c1: of the paper's recipe.
        known: bare completions, see Trial.
        options: further arguments of Trial.
        ticker: called with what comes next.

    Source: "Transmuting prompts into weights", §4.1, §4.2, Figure 1 and Table 1.
    """
    ticker(f"{task.instruction}: examples")
    fresh, steps = list(fresh[:CURVE_INPUTS]), min(steps, len(fit))
    trial = Trial(
        model, tokenizer, task.instruction, fresh, [task.answer(x) for x in fresh], known=known, divergences=False,
        **options,
    )  # fmt: skip
    generation, told = {name: value for name, value in options.items() if name != "match"}, task.instruction
    # The prompted model's own answers for the paper's recipe, written once for all points; ours writes its own.
    answers = curves.own_examples(fit[:steps], prompted_texts(model, tokenizer, told, fit[:steps], **generation))
    ours = curves.default_line(model, tokenizer, told, fit, curves.default_steps(steps), **generation)
    found = []
    for name, patches, used in (
        ("paper's recipe", curves.paper_line(model, tokenizer, told, answers, curves.paper_steps(steps), c1), c1),
        ("default recipe", ours, None),
    ):
        rows = [(0, trial.base, trial.base_texts)]
        for row in curves.answered(model, trial, patches):
            ticker(f"{task.instruction}: {name}, {row[0]} examples read")
            rows.append(row)
        found.append(curves.curve(rows, fresh, trial.prompted_texts, used))
    (paper, answered), (default, _) = found
    samples = [sample for sample in answered if sample.steps in _sampled_steps(steps)]
    layers = published.paper_layers(len(describe(model).blocks))
    return Curve(task.name, trial.prompted, trial.base, paper, default, samples, c1, layers, len(fresh))


def _sampled_steps(steps: int) -> set[int]:
    """Where TP Table 1 shows answers: without any example, at 280 of 600, and at the end."""
    every = curves.paper_steps(steps)
    return {0, min(every, key=lambda count: abs(count - steps * 280 / 600)), every[-1]}
