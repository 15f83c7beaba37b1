"""What a unit of work takes on this machine: each kind is done once, on the run's own prompts, and timed."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from thought_kernels.evaluation.budget.units import Work, rows_of
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.rivals.lora import injected, optimised
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.sections.controls import randomised
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.fitting.fit import fit
from thought_kernels.generation.completions import complete, ending_of, within_context
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.pairing.batches import Group
from thought_kernels.pairing.replay import replay_group
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import EncodedExample
from thought_kernels.spectral.diagnosis import diagnose

PROBED = 16  # held-out inputs that are answered
TRAINED = 4  # of these, rows of a gradient step
FIT_BATCH = 32  # transmute's own


class _Answered(NamedTuple):
    """Inputs that the prompted model has answered, and seconds an answer."""

    rows: list[EncodedExample]
    told: list[list[int]]
    bare: list[list[int]]
    written: list[list[int]]
    seconds: float


class Rates:
    """Seconds of each kind of work, measured when first asked for.

    Args:
        subject: with its model, data and settings; nothing of it is changed.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def seconds(self, work: Work) -> float:
        """What some work will take."""
        units: list[tuple[int, Callable[[], float]]] = [
            (work.reads, lambda: self.read), (work.writes, lambda: self._answered.seconds),
            (work.refits, lambda: self._fit(rows_of(self._subject))), (work.steps, lambda: self._step),
            (work.texts, lambda: self._text), (work.drawn, lambda: self._drawn),
            (work.diagnosed, lambda: self._diagnosed), (work.replayed, lambda: self._replayed),
        ]  # fmt: skip
        return sum(count * rate() for count, rate in units if count) + sum(map(self._transmute, work.fits))

    @cached_property
    def read(self) -> float:
        """An answer that is read behind its prompt, and compared."""
        asked = self._answered

        def run() -> None:
            for row in self._logprobs(asked.bare, asked.written):
                divergence([row], [row])

        return _timed(run) / len(asked.written)

    @property
    def answer_tokens(self) -> float:
        """The mean length of an answer."""
        return sum(map(len, self._answered.written)) / len(self._answered.written)

    @cached_property
    def _answered(self) -> _Answered:
        subject = self._subject
        asked = subject.held_out.questions[:PROBED]
        rows = [subject.encode(question) for question in asked]
        told = [[*row.with_prefix, *row.tokens] for row in rows]
        bare = [[*row.without_prefix, *row.tokens] for row in rows]
        ending = ending_of(subject.model, subject.tokenizer, asked[0], format=subject.format)
        limits = {"max_new_tokens": subject.max_new_tokens, "batch_size": subject.batch_size}
        started = time.monotonic()
        written = complete(subject.model, told, ending=ending, **limits)
        seconds = (time.monotonic() - started) / len(rows)
        return _Answered(rows, told, bare, within_context(subject.model, bare, written), seconds)

    def _logprobs(self, prompts: list[list[int]], written: list[list[int]]) -> Any:
        return completion_logprobs(self._subject.model, prompts, written, batch_size=self._subject.batch_size)

    def _transmute(self, examples: int) -> float:
        """A patch from so many examples: what the model writes for it, a line or an answer a row, and the fit."""
        rows = rows_of(self._subject, examples)
        written = rows if rows > examples else 0
        return written * self._answered.seconds + self._fit(rows)

    def _fit(self, rows: int) -> float:
        """Blocks are alike: one of them is fitted on all rows, and on a quarter, and a line drawn through both."""
        most = rows_of(self._subject)
        (few, short), (many, long) = self._one_block
        slope = max(0.0, (long - short) / (many - few)) if many > few else long / many
        recipe = self._subject.recipe.for_model(self._subject.decoder)
        return (max(recipe.layers) + 1) * max(short, long + slope * (rows - most))

    @cached_property
    def _one_block(self) -> list[tuple[int, float]]:
        most = rows_of(self._subject)
        return [(count, self._fit_block(count)) for count in (max(1, most // 4), most)]

    def _fit_block(self, count: int) -> float:
        subject, asked = self._subject, self._answered
        layer = min(subject.recipe.for_model(subject.decoder).layers)
        recipe = replace(subject.recipe, layers=[layer]).for_model(subject.decoder)
        rows = [
            row._replace(tokens=[*row.tokens, *answer])
            for row, answer in zip(asked.rows, asked.written, strict=True) if answer
        ]  # fmt: skip
        rows = list(itertools.islice(itertools.cycle(rows), count))

        def run() -> None:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # what a block does to the rows of a few inputs is nobody's concern
                self._patch = fit(subject.decoder, recipe, rows, batch_size=FIT_BATCH)

        return _timed(run) / (layer + 1)

    def _block_patch(self) -> tuple[ThoughtPatch, int]:
        """A patch of one block, and how many blocks the whole one has."""
        if self._subject.given_patch is not None:
            given = self._subject.given_patch
            first = given.layers[0]
            entries = {key: entry for key, entry in given.entries.items() if key[0] == first}
            return ThoughtPatch(entries, given.provenance), len(given.layers)
        assert self._one_block
        return self._patch, len(self._subject.recipe.for_model(self._subject.decoder).layers)

    @cached_property
    def _step(self) -> float:
        """A row of a gradient step, the second one: the first makes what later ones use again."""
        subject, asked = self._subject, self._answered
        told, bare, written = asked.told[:TRAINED], asked.bare[:TRAINED], asked.written[:TRAINED]
        rows = Rows([], told, bare, written, (), [], list(self._logprobs(told, written)))
        try:
            with injected(subject.model):
                steps = optimised(subject.model, rows, steps=2, rate=1e-4, generator=subject.generator("probe"))
                next(steps)
                return _timed(lambda: next(steps)) / len(rows)
        except ValueError:  # peft is not installed: no LoRA will be trained
            return 0.0

    @cached_property
    def _text(self) -> float:
        drift = Drift(self._subject.model, self._subject.tokenizer, batch_size=self._subject.batch_size)
        return _timed(lambda: drift.read(self._subject.model)) if len(drift) else 0.0

    @cached_property
    def _drawn(self) -> float:
        patch, blocks = self._block_patch()
        return blocks * _timed(lambda: randomised(patch, self._subject.generator("probe")))

    @cached_property
    def _diagnosed(self) -> float:
        patch, blocks = self._block_patch()
        if not any(entry.norm() > 0 for entry in patch.entries.values()):
            return 0.0
        return blocks * _timed(lambda: diagnose(patch, self._subject.model))

    @cached_property
    def _replayed(self) -> float:
        asked = self._answered
        row = asked.rows[0]._replace(tokens=[*asked.rows[0].tokens, *asked.written[0]])
        return _timed(lambda: replay_group(self._subject.decoder, Group.of(row), row.tokens))


def _timed(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started
