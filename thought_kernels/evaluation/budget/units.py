"""The kinds of work that are counted, and how they add up; the rows that much of it is done on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.prompts.ordinary import ORDINARY


@dataclass(frozen=True)
class Work:
    """Counts of what takes time.

    Attributes:
        reads: answers that are read behind a prompt.
        writes: answers that are written.
        fits: patches made from so many examples each.
        refits: patches made from the main patch's rows once more.
        steps: rows that a gradient is taken at.
        texts: readings of the ordinary text.
        drawn: random patches like the main one.
        diagnosed: patches whose spectra are taken.
        replayed: prompts replayed.
    """

    reads: int = 0
    writes: int = 0
    fits: tuple[int, ...] = ()
    refits: int = 0
    steps: int = 0
    texts: int = 0
    drawn: int = 0
    diagnosed: int = 0
    replayed: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> Work:
        return Work(*(times * getattr(self, field.name) for field in fields(self)))


def rows_of(subject: Subject, examples: int | None = None) -> int:
    """The rows that a patch of so many examples is fitted on: inputs and completions that the model writes are among
    them, and ordinary text.

    Args:
        subject: with the recipe.
        examples: how many; None for all that are given.
    """
    count = len(subject.examples) if examples is None else examples
    text = len(ORDINARY) if subject.recipe.text_weight else 0
    if any(example.completion is not None for example in subject.pool[:count]):
        return count + text
    return subject.recipe.completions * count + subject.recipe.written_inputs + text
