"""What a patch should leave alone, for the sections that measure it: unrelated prompts, other instructions told."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.drift import Reading
from thought_kernels.evaluation.measures.intervals import Interval, mean_interval, per_token_interval
from thought_kernels.evaluation.sections.subject import Inputs, Intervention, Subject, sums
from thought_kernels.generation.completions import complete, ending_of, within_context
from thought_kernels.generation.logprobs import completion_logprobs, divergence

OTHER_INPUTS = 64

# For a model whose user names no unrelated prompts; nothing about them matters but that they are ordinary.
ORDINARY_PROMPTS = (
    "Hello! How are you today?", "What is the capital of Japan?", "Why is the sky blue?",
    "Write a short poem about autumn.", "Explain what a prime number is.", "Name three fruits.",
    "Who wrote Romeo and Juliet?", "How do I boil an egg?", "What does a carpenter do?",
    "Tell me about the Great Wall of China.", "What is the difference between a lake and a sea?",
    "Give me a tip for learning the piano.", "How many legs does a spider have?", "Describe a thunderstorm.",
    "What is photosynthesis?", "Recommend a book for a rainy day.",
)  # fmt: skip


class Bystander:
    """Unrelated prompts with the bare model's own continuations, against which any change is a side effect.

    Args:
        subject: with unrelated prompts; those with a completion are measured on it.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __len__(self) -> int:
        return len(self._subject.unrelated)

    @cached_property
    def _rows(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """(bare prompts, the same with the instruction, continuations) as token ids."""
        subject = self._subject
        chats = subject.unrelated
        asked = [subject.encode(chat._replace(completion=None)) for chat in chats]
        bare = [[*row.without_prefix, *row.tokens] for row in asked]
        told = [[*row.with_prefix, *row.tokens] for row in asked]
        ending = ending_of(subject.model, subject.tokenizer, chats[0], format=subject.format)
        written = complete(
            subject.model, bare, ending=ending, max_new_tokens=subject.max_new_tokens, batch_size=subject.batch_size
        )
        for index, chat in enumerate(chats):
            if chat.completion is not None:
                row = subject.encode(chat)
                written[index] = list(row.tokens[row.answer_start :])
        return bare, told, within_context(subject.model, told, written)

    def _logprobs(self, prompts: list[list[int]]) -> Any:
        _, _, written = self._rows
        return completion_logprobs(self._subject.model, prompts, written, batch_size=self._subject.batch_size)

    @cached_property
    def _bare(self) -> list[torch.Tensor]:
        return list(self._logprobs(self._rows[0]))

    def _surprise(self, rows: list[torch.Tensor]) -> float:
        """exp of the mean negative log-likelihood of the continuations' tokens."""
        written = self._rows[2]
        total = sum(float(row[range(len(ids)), ids].double().sum()) for row, ids in zip(rows, written, strict=True))
        return math.exp(min(-total / sum(map(len, written)), 700.0))

    def divergence(self, change: Intervention) -> Interval:
        """Mean KL(bare ‖ changed) a token, nats, with its interval over prompts."""
        return self._per_token(self._changed(change))

    def report(self, section: Section, name: str, change: Intervention | None) -> None:
        """Adds KL and perplexity of a changed model, or, with None, of the model told the instruction."""
        rows = list(self._logprobs(self._rows[1])) if change is None else self._changed(change)
        section.add(name, "unrelated KL", self._per_token(rows), inputs=len(self))
        section.add(name, "perplexity", self._surprise(rows), inputs=len(self))

    def report_bare(self, section: Section) -> None:
        """Adds the bare model's own perplexity."""
        section.add("bare", "perplexity", self._surprise(self._bare), inputs=len(self))

    def _changed(self, change: Intervention) -> list[torch.Tensor]:
        bare = self._bare  # before the change is at work
        with change.applied(self._subject.model):
            rows = list(self._logprobs(self._rows[0]))
        assert len(bare) == len(rows)
        return rows

    def _per_token(self, rows: list[torch.Tensor]) -> Interval:
        totals, counts = sums(divergence(self._bare, rows)), [len(ids) for ids in self._rows[2]]
        return per_token_interval(totals, counts, seed=self._subject.seed)


def bystander_of(subject: Subject) -> Bystander:
    """The subject's Bystander, whose prompts are answered and read once for all sections."""
    if subject.bystander is None:
        subject.bystander = Bystander(subject)
    found: Bystander = subject.bystander
    return found


def report_drift(
    subject: Subject, section: Section, name: str, change: Intervention, *, x: float | None = None
) -> Reading | None:
    """Adds KL(bare ‖ changed) on ordinary text, nats a token, and the changed model's perplexity there.

    Returns:
        What the changed model made of the text, None where it has no tokens for it, which a note says.
    """
    drift = subject.drift
    if not len(drift):
        section.note("No ordinary text was read: the tokenizer has no tokens for the package's passages.")
        return None
    with change.applied(subject.model):
        reading = drift.read(subject.model)
    interval = per_token_interval(reading.divergences, reading.tokens, seed=subject.seed)
    section.add(name, "text KL", interval, inputs=len(drift), x=x)
    section.add(name, "text perplexity", reading.perplexity, inputs=len(drift), x=x)
    return reading


def told_other(subject: Subject, name: str) -> tuple[Interval, Interval, int]:
    """Accuracy on another instruction, told, without the patch and with it, and how many inputs; measured once."""
    if name not in subject.told:
        other = subject.others[name]
        asked = other.inputs or Inputs(subject.held_out.questions, None)
        inputs = asked.first(min(OTHER_INPUTS, subject.sweep_inputs))
        trial = subject.new_trial(other.instruction, inputs, divergences=False)
        with subject.patch.applied(subject.model):
            grades = trial.grade(trial.answer_prompted(subject.model))
        off, on = (mean_interval(values, seed=subject.seed) for values in (trial.prompted_grades, grades))
        subject.told[name] = (off, on, len(trial))
    return subject.told[name]
