"""Patches added and negated: what becomes of each instruction, and whether overlap foretells it.

For two instructions A and B with patches P and Q, on the same fresh inputs:

    alone       accuracy and recovered effect of A under P, of B under Q
    added       of A and of B under P + Q, and under both in turn, W (1 + Δ_A)(1 + Δ_B); how many answers are B's of A's
                answer, or A's of B's, which is what two compatible instructions would ask for
    negated     how much of A's effect −P takes back from the model that is told A, in KL to the bare model

What overlap.py predicts from the patches and the activations stands beside what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.measures.overlap import Key, activation_moments, predictions
from thought_kernels.evaluation.measures.trial import Trial, prompted_texts
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.fitting.transmute import transmute
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.models import describe
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode


@dataclass(frozen=True)
class Behaviour:
    """An instruction with its right answers, a pure function of the input text."""

    name: str
    instruction: str
    answer: Callable[[str], str]


@dataclass(frozen=True)
class Alone:
    """One instruction by itself, and negated; fractions.

    Attributes:
        name: of the behaviour.
        base, prompted, patched: accuracy without it, with it, and under its patch.
        recovered: of the patch.
        negated_repeats: under −P and without the instruction, share of answers that are the bare model's.
        negated_prompted: accuracy of the model that is told the instruction while −P is applied.
        cancelled: 1 − KL(bare ‖ told, −P) / KL(bare ‖ told) over the bare model's own answers: 1 where −P takes back
            all that being told does.
    """

    name: str
    base: float
    prompted: float
    patched: float
    recovered: float | None
    negated_repeats: float
    negated_prompted: float
    cancelled: float | None


@dataclass(frozen=True)
class Together:
    """One instruction's lot when another's patch is added; fractions.

    Attributes:
        name, other: the behaviour that is measured, and the one whose patch is added.
        patched, recovered: under its own patch alone.
        added, added_recovered: under the sum.
        in_turn: accuracy under both patches, the other's applied last.
        lost: patched − added accuracy.
        kl_lost: added KL(prompted ‖ patched) − KL under its own patch alone, nats a token.
        predicted: overlap.PREDICTORS by name.
    """

    name: str
    other: str
    patched: float
    recovered: float | None
    added: float
    added_recovered: float | None
    in_turn: float
    lost: float
    kl_lost: float
    predicted: dict[str, float]


@dataclass(frozen=True)
class Both:
    """Two instructions at once: answers that are one's answer to the other's answer. None where that has no sense.

    Attributes:
        first, second: names; the right answer is second's of first's answer.
        added: share right under the sum of the patches.
        in_turn: under first's patch, then second's.
        prompted: told both, first's instruction before second's.
        sample: (input, right answer, answer under the sum).
    """

    first: str
    second: str
    added: float
    in_turn: float
    prompted: float
    sample: tuple[str, str, str]


class Composition:
    """Patches of several behaviours on one model, fitted once, and their measurements.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        behaviours: by name.
        examples: inputs that each patch is fitted on.
        fresh: inputs to measure on.
        recipe: of every patch, None for the default one.
        match, max_new_tokens, batch_size: as Trial takes them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, behaviours: Mapping[str, Behaviour], examples: Sequence[str],
        fresh: Sequence[str], *, recipe: Recipe | None = None, match: Any = "exact",
        max_new_tokens: int = 64, batch_size: int = 128,
    ) -> None:  # fmt: skip
        # Of a compiled model the one inside: each patch applied would have it compiled anew.
        self._model, self._tokenizer, self._behaviours = describe(model).model, tokenizer, behaviours
        self._examples, self._fresh, self._recipe = list(examples), list(fresh), recipe or Recipe()
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self._match = match
        self._known: dict[str, list[int]] = {}
        self._trials: dict[str, Trial] = {}
        self._patches: dict[str, ThoughtPatch] = {}
        self._moments: dict[str, dict[Key, Tensor]] = {}
        self._scores: dict[str, tuple[float, float, float]] = {}

    def patch(self, name: str) -> ThoughtPatch:
        """The behaviour's patch, fitted at the first call."""
        if name not in self._patches:
            told = self._behaviours[name].instruction
            self._patches[name] = transmute(self._model, self._tokenizer, told, self._examples, **self._recipe)
        return self._patches[name]

    def alone(self, name: str) -> Alone:
        """Measures one behaviour by itself and negated."""
        trial, patch = self._trial(name), self.patch(name)
        accuracy, recovered, _ = self._own_score(name)
        with (-patch).applied(self._model):
            _, negated = trial.answer(self._model)
            told = trial.answer_prompted(self._model)
        repeats = [a == b for a, b in zip(negated, trial.base_texts, strict=True)]
        grades = trial.grade(told)
        return Alone(
            name, trial.base, trial.prompted, accuracy, finite(recovered), sum(repeats) / len(repeats),
            sum(grades) / len(grades), finite(self._cancelled(name)),
        )  # fmt: skip

    def together(self, name: str, other: str) -> Together:
        """Measures one behaviour when another's patch is added to its own."""
        trial, ours, theirs = self._trial(name), self.patch(name), self.patch(other)
        accuracy, recovered, kl = self._own_score(name)
        with (ours + theirs).applied(self._model):
            score = trial.score(self._model)
        with ours.applied(self._model), theirs.applied(self._model):
            in_turn, _ = trial.answer(self._model)
        return Together(
            name, other, accuracy, finite(recovered), score.accuracy, finite(score.effect.recovered), in_turn,
            accuracy - score.accuracy, score.effect.patched / score.effect.tokens - kl,
            predictions(ours, theirs, self._activation_moments(name)),
        )  # fmt: skip

    def both(self, first: str, second: str) -> Both | None:
        """Measures how often the answer is second's of first's answer; None where first's is no input for second."""
        one, two = self._behaviours[first], self._behaviours[second]
        try:
            right = [two.answer(one.answer(text)) for text in self._fresh]
        except (ValueError, KeyError):  # the second instruction cannot be given what the first answers
            return None
        trial = self._trial(first)

        def share(texts: Sequence[str]) -> float:
            return sum(text.strip() == answer for text, answer in zip(texts, right, strict=True)) / len(right)

        with (self.patch(first) + self.patch(second)).applied(self._model):
            _, added = trial.answer(self._model)
        with self.patch(first).applied(self._model), self.patch(second).applied(self._model):
            _, in_turn = trial.answer(self._model)
        told = f"{one.instruction}\n{two.instruction}"
        prompted = prompted_texts(self._model, self._tokenizer, told, self._fresh, **self._options)
        # The first input on which the two together differ from either alone.
        shown = next(
            (i for i, text in enumerate(self._fresh) if right[i] not in (one.answer(text), two.answer(text))), 0
        )
        return Both(
            first, second, share(added), share(in_turn), share(prompted),
            (self._fresh[shown], right[shown], added[shown]),
        )  # fmt: skip

    def _trial(self, name: str) -> Trial:
        if name not in self._trials:
            behaviour = self._behaviours[name]
            self._trials[name] = Trial(
                self._model, self._tokenizer, behaviour.instruction, self._fresh,
                [behaviour.answer(text) for text in self._fresh], match=self._match, known=self._known,
                **self._options,
            )  # fmt: skip
        return self._trials[name]

    def _own_score(self, name: str) -> tuple[float, float, float]:
        """Accuracy, recovered effect and KL a token under the behaviour's own patch."""
        if name not in self._scores:
            with self.patch(name).applied(self._model):
                score = self._trial(name).score(self._model)
            self._scores[name] = (score.accuracy, score.effect.recovered, score.effect.patched / score.effect.tokens)
        return self._scores[name]

    def _cancelled(self, name: str) -> float:
        trial = self._trial(name)
        rows = [encode(self._tokenizer, self._behaviours[name].instruction, text) for text in self._fresh]
        told = [[*row.with_prefix, *row.tokens] for row in rows]
        read = partial(completion_logprobs, self._model, batch_size=self._options["batch_size"])
        reference = list(read([[*row.without_prefix, *row.tokens] for row in rows], trial.bare_written))
        without = sum(float(kl.sum()) for kl in divergence(reference, read(told, trial.bare_written)))
        with (-self.patch(name)).applied(self._model):
            negated = sum(float(kl.sum()) for kl in divergence(reference, read(told, trial.bare_written)))
        return 1 - negated / without if without > 0 else math.nan

    def _activation_moments(self, name: str) -> dict[Key, Tensor]:
        """Σ [a; 1][a; 1]ᵀ of the model under the behaviour's patch, over the tokens of bare prompts."""
        if name not in self._moments:
            patch = self.patch(name)
            rows = [encode(self._tokenizer, self._behaviours[name].instruction, text) for text in self._fresh[:32]]
            model, device = self._model, describe(self._model).device
            with undisturbed(model), patch.applied(model), activation_moments(model, patch) as moments:
                for row in rows:
                    ids = torch.tensor([[*row.without_prefix, *row.tokens]], device=device)
                    with torch.no_grad():
                        model(input_ids=ids, use_cache=False, logits_to_keep=1)
            self._moments[name] = moments
        return self._moments[name]


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
