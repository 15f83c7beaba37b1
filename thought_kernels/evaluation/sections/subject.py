"""What is evaluated: a model, a patch and its data, with everything that several sections measure against."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.intervals import Interval, mean_interval, recovered_interval
from thought_kernels.evaluation.measures.scorers import Scorer, ScorerError
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.rivals.choice import CHOICE_ROWS, Intervention
from thought_kernels.evaluation.rivals.function_vector import shuffled_prompts
from thought_kernels.evaluation.rivals.places import prompt_end
from thought_kernels.evaluation.rivals.refit import refit
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.sections.amounts import Amounts
from thought_kernels.evaluation.sections.cost import Making
from thought_kernels.fitting.encoding import Prompt, Writing, completed, with_inputs
from thought_kernels.fitting.fit import fit
from thought_kernels.fitting.prepared import Prepared, prepared
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.models.decoder import Decoder
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.ordinary import ordinary_rows
from thought_kernels.prompts.prompt import EncodedExample, Example, Instruction, encode

FIT_BATCH = 32  # transmute's own


@dataclass(frozen=True)
class Inputs:
    """Examples with their right answers, None where agreement with the prompted model is all that can be asked."""

    questions: list[Example]
    answers: list[str] | None

    def first(self, count: int) -> Inputs:
        """The first of them."""
        return Inputs(self.questions[:count], None if self.answers is None else self.answers[:count])


@dataclass(frozen=True)
class Other:
    """Another instruction, with inputs of its own or None for those of the instruction that is evaluated."""

    instruction: Instruction
    inputs: Inputs | None


@dataclass(frozen=True)
class Outside:
    """Inputs unlike the examples, and the examples of a patch that is fitted to be judged on them, None for no such."""

    inputs: Inputs
    examples: list[Example] | None


class NotGivenError(ValueError):
    """A section needs data that the caller chose not to give, so leaving it out is no failure."""


class Tolerant:
    """A scorer whose failure costs the accuracies it was asked for and nothing else; the sentences are kept."""

    def __init__(self, scorer: Scorer) -> None:
        self.name, self._scorer = scorer.name, scorer
        self.failures: list[str] = []

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        """The scorer's grades, or NaN for each answer."""
        try:
            return self._scorer(texts, answers, questions)
        except ScorerError as error:
            self.failures.append(str(error))
            return [float("nan")] * len(texts)


@dataclass
class Subject:
    """The evaluated patch with its surroundings; expensive parts are computed once, when first asked for.

    Attributes:
        model, tokenizer: unpatched.
        instruction: what the patch stands for.
        given_patch: the user's patch; None fits one on the examples.
        recipe: of every fit.
        examples: what patches and baselines are fitted on; empty where only a patch was given.
        pool: more examples, `examples` first, for the data-efficiency curve.
        held_out: what is measured on.
        paraphrases: other wordings of the instruction.
        others: other instructions by name.
        outside: inputs unlike the examples.
        longer: longer inputs.
        unrelated: prompts that the patch should not change.
        scorer: grades answers.
        separator, without, format: of the prompts, as transmute's.
        seed: of everything random.
        sweep_inputs: how many held-out inputs the sweeps, controls and baselines are measured on.
        lora_steps: optimiser steps of the LoRA baseline.
        amounts: of what is swept and tried.
    """

    model: Any
    tokenizer: Any
    instruction: Instruction
    given_patch: ThoughtPatch | None
    recipe: Recipe
    examples: list[Example]
    pool: list[Example]
    held_out: Inputs
    paraphrases: list[str]
    others: dict[str, Other]
    outside: Outside | None
    longer: Inputs | None
    unrelated: list[Example]
    scorer: Tolerant
    separator: str
    without: Instruction | None
    format: str | None
    seed: int
    sweep_inputs: int
    lora_steps: int
    batch_size: int
    max_new_tokens: int
    amounts: Amounts = field(default_factory=Amounts)
    known: dict[str, list[int]] = field(default_factory=dict)
    other_patches: dict[str, ThoughtPatch] = field(default_factory=dict)
    told: dict[str, tuple[Interval, Interval, int]] = field(default_factory=dict)  # see bystanders.told_other
    bystander: Any = None  # see bystanders.bystander_of
    making: Making | None = None  # of the patch; None where it was given, or not made yet

    @cached_property
    def decoder(self) -> Decoder:
        """The model, described."""
        return describe(self.model)

    @cached_property
    def patch(self) -> ThoughtPatch:
        """The patch that is evaluated."""
        if self.given_patch is not None:
            return self.given_patch
        with Making(self.decoder.device) as self.making:
            found = self._prepared
            rows = [*found.rows, *found.text]
            return fit(found.decoder, found.recipe, rows, batch_size=FIT_BATCH, provenance=found.provenance)

    @cached_property
    def _prepared(self) -> Prepared:
        prompt = Prompt(self.instruction, self.without, self.separator, self.format)
        writing = Writing(self.recipe.completions, batch_size=FIT_BATCH, **self.writing)
        return prepared(self.model, self.tokenizer, prompt, self.examples, self.recipe, writing)

    @cached_property
    def trial(self) -> Trial:
        """The held-out inputs."""
        return self.new_trial(self.instruction, self.held_out)

    @cached_property
    def sweep(self) -> Trial:
        """The held-out inputs of the sweeps, controls and baselines."""
        return self.trial.first(self.sweep_inputs)

    @cached_property
    def rows(self) -> Rows:
        """What baselines are made from: the rows that the patch was fitted on.

        Raises:
            ValueError: without examples.
        """
        self.need_examples("baselines")
        asked = self.examples[0]._replace(completion=None)

        def ask(text: str) -> EncodedExample:
            return self.encode(asked._replace(messages=(*asked.messages[:-1], {"role": "user", "content": text})))

        shuffled = shuffled_prompts(self.encoded, self.instruction, lambda other: self.encode(asked, other))
        return Rows.of(self.encoded, prompt_end(ask), shuffled)

    @cached_property
    def choice(self) -> Rows:
        """The rows that hyper-parameters are chosen on."""
        return self.rows.first(CHOICE_ROWS).read(self.model)

    @cached_property
    def drift(self) -> Drift:
        """Ordinary text, as the bare model reads it."""
        return Drift(self.model, self.tokenizer, batch_size=self.batch_size)

    @property
    def writing(self) -> dict[str, Any]:
        """How fits write completions: as the given patch's did, so that they are made like it."""
        made: Mapping[str, Any] = {} if self.given_patch is None else self.given_patch.provenance
        return {
            "max_new_tokens": made.get("max_new_tokens", self.max_new_tokens),
            "seed": made.get("seed", 0),
        }

    @cached_property
    def encoded(self) -> list[EncodedExample]:
        """The rows that the patch was fitted on: of one that was given, written again as its provenance says."""
        self.need_examples("controls")
        if self.given_patch is None:
            return self._prepared.rows
        made = self.given_patch.provenance
        writing = Writing(made.get("completions", 1), batch_size=self.batch_size, **self.writing)
        prompt = Prompt(self.instruction, self.without, self.separator, self.format)
        rows, _ = with_inputs(
            self.decoder, self.tokenizer, prompt, self.examples, list(map(self.encode, self.examples)),
            made.get("written_inputs", []), made.get("written_share", 1.0),
        )  # fmt: skip
        return completed(self.decoder, self.tokenizer, prompt, self.examples[0], rows, len(self.examples), writing)

    def encode(self, example: Example, instruction: Instruction | None = None) -> EncodedExample:
        """An example as token ids, with the evaluated instruction or another one."""
        told = self.instruction if instruction is None else instruction
        return encode(self.tokenizer, told, example, without=self.without, separator=self.separator, format=self.format)

    def need_examples(self, what: str, count: int = 2) -> None:
        """Raises ValueError where there are too few examples for something, NotGivenError where there are none."""
        if len(self.examples) < count:
            raise (ValueError if self.examples else NotGivenError)(
                f"evaluate: examples must be at least {count} for the {what}, got {len(self.examples)}; "
                "give the ones the patch was fitted on"
            )

    def fit(self, instruction: Instruction, examples: Sequence[Example], recipe: Recipe | None = None) -> ThoughtPatch:
        """transmute with the subject's recipe, or another one."""
        return transmute(
            self.model, self.tokenizer, instruction, list(examples), without=self.without, separator=self.separator,
            format=self.format, **self.writing, **(self.recipe if recipe is None else recipe),
        )  # fmt: skip

    def refit(self, recipe: Recipe, accumulator: ThoughtAccumulator | None = None) -> ThoughtPatch:
        """The examples fitted by a recipe, with sums of one's own; see rivals.refit."""
        text = ordinary_rows(self.tokenizer, self.encoded, recipe.text_weight, self.decoder.context)
        rows = [*self.encoded, *text]
        return refit(self.decoder, rows, recipe, batch_size=self.batch_size, accumulator=accumulator)

    def other_patch(self, name: str) -> ThoughtPatch:
        """Another instruction's patch from the same examples, fitted once."""
        if name not in self.other_patches:
            asked = [one._replace(completion=None) for one in self.examples]
            self.other_patches[name] = self.fit(self.others[name].instruction, asked)
        return self.other_patches[name]

    def new_trial(self, instruction: Instruction, inputs: Inputs, *, divergences: bool = True) -> Trial:
        """A Trial with the evaluation's settings."""
        return Trial(
            self.model, self.tokenizer, instruction, inputs.questions, inputs.answers, match=self.scorer,
            separator=self.separator, without=self.without, format=self.format, batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens, known=self.known, divergences=divergences,
        )  # fmt: skip

    def measure(self, intervention: Intervention, trial: Trial | None = None) -> Score:
        """The score of the model with something applied, on the sweep's inputs where no trial is named."""
        with intervention.applied(self.model):
            return (self.sweep if trial is None else trial).score(self.model)

    def report(
        self, section: Section, subject: str, score: Score, trial: Trial | None = None, *, x: float | None = None
    ) -> None:
        """Adds accuracy and recovered effect of a score, with their intervals."""
        trial = self.sweep if trial is None else trial
        section.add(subject, "accuracy", mean_interval(score.grades, seed=self.seed), inputs=len(trial), x=x)
        interval = recovered_interval(sums(score.divergences), sums(trial.bare_divergences), seed=self.seed)
        section.add(subject, "recovered", interval, inputs=len(trial), x=x)

    def report_references(self, section: Section, trial: Trial) -> None:
        """Adds the accuracies without and with the instruction."""
        for name, grades in (("bare", trial.base_grades), ("prompted", trial.prompted_grades)):
            section.add(name, "accuracy", mean_interval(grades, seed=self.seed), inputs=len(trial))

    def generator(self, purpose: str) -> torch.Generator:
        """A random generator for one purpose."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {purpose}").getrandbits(62))


def sums(divergences: Sequence[torch.Tensor]) -> list[float]:
    """Each input's divergence, summed over its tokens, nats."""
    return [float(row.double().sum()) for row in divergences]
