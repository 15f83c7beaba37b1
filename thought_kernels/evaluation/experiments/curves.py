"""Accuracy against the number of examples, for the paper's recipe and for transmute's defaults on the same axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.rivals.paper import effective_c1, paper_patch
from thought_kernels.fitting.transmute import transmute
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Instruction


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


def paper_steps(steps: int) -> list[int]:
    """Fifteen equal strides: every 40 examples up to 600."""
    return sorted({max(1, steps * k // 15) for k in range(1, 16)})


def default_steps(steps: int) -> list[int]:
    """A few examples, then doubling, up to 64 or all of them: most of what more examples bring comes before."""
    return [*itertools.takewhile(lambda n: n < min(steps, 64), (4, 8, 16, 32)), min(steps, 64)]


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
    model: Any, tokenizer: Any, instruction: Instruction, inputs: Sequence[str], steps: Iterable[int], **options: Any
) -> Iterator[tuple[int, ThoughtPatch]]:
    """What transmute makes of the first inputs by itself, for each number of them.

    It is given no completions: with one of its own beside any input it would write no further inputs, and no draws.
    """
    for count in steps:
        yield count, transmute(model, tokenizer, instruction, inputs[:count], **options)


def own_examples(questions: Sequence[str], written: Sequence[str]) -> list[dict[str, Any]]:
    """Questions with what the prompted model wrote to them, for recipes that take one completion and no more inputs."""
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
