"""The patch together with others: added to another instruction's patch, and negated."""

from __future__ import annotations

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.intervals import mean_interval
from thought_kernels.evaluation.measures.overlap import activation_moments, predictions
from thought_kernels.evaluation.sections.subject import Inputs, Subject
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.patches.patch import ThoughtPatch

OTHERS = 2
MOMENT_INPUTS = 32


def combination(subject: Subject, section: Section) -> None:
    """Patches added and negated; the overlap of the patches beside what they do to each other."""
    trial, patch = subject.sweep, subject.patch
    alone = subject.measure(patch)
    section.add("patched", "accuracy", mean_interval(alone.grades, seed=subject.seed), inputs=len(trial))
    section.add("patched", "recovered", alone.effect.recovered, inputs=len(trial))
    if len(subject.examples) >= 2:
        for name in list(subject.others)[:OTHERS]:
            _added(subject, section, name)
    if not subject.others or len(subject.examples) < 2:
        section.note("Adding needs another instruction and the examples; one of them was not given.")
    with (-patch).applied(subject.model):
        _, texts = trial.answer(subject.model)
        told = trial.grade(trial.answer_prompted(subject.model))
    repeats = [float(a == b) for a, b in zip(texts, trial.base_texts, strict=True)]
    section.add("negated", "answers as bare", mean_interval(repeats, seed=subject.seed), inputs=len(trial))
    section.add("negated, told the instruction", "accuracy", mean_interval(told, seed=subject.seed), inputs=len(trial))
    section.note(
        "Negated: without the instruction the bare model's answers should stay; told the instruction, the model should "
        "lose it as far as the patch is its opposite. Ten pairs of instructions: “thought-kernels experiment "
        "composition”; facts as instructions: “experiment knowledge” (docs/experiments.md)."
    )


def _added(subject: Subject, section: Section, name: str) -> None:
    """This patch and another's at once, measured on both instructions."""
    other, theirs = subject.others[name], subject.other_patch(name)
    both = subject.patch + theirs
    ours = subject.measure(both)
    both_on = f"with “{name}” added"
    section.add(both_on, "accuracy", mean_interval(ours.grades, seed=subject.seed), inputs=len(ours.grades))
    section.add(both_on, "recovered", ours.effect.recovered, inputs=len(ours.grades))
    predicted = predictions(subject.patch, theirs, _moments(subject))
    section.add(both_on, "overlap", predicted["cosine"])
    section.add(both_on, "disturbance", predicted["disturbance"])

    inputs = (other.inputs or Inputs(subject.held_out.questions, None)).first(subject.sweep_inputs)
    trial = subject.new_trial(other.instruction, inputs)
    for label, change in ((f"“{name}” alone", theirs), (f"“{name}” with this patch added", both)):
        score = subject.measure(change, trial)
        section.add(label, "accuracy", mean_interval(score.grades, seed=subject.seed), inputs=len(trial))
        section.add(label, "recovered", score.effect.recovered, inputs=len(trial))
    section.note(
        "Overlap: cosine of the two patches' matrices and vectors. Disturbance: what the other patch does to this "
        "one's activations, squared, over what this one does; a prediction made without running the sum."
    )


def _moments(subject: Subject) -> dict[tuple[int, str], torch.Tensor]:
    """Second moments of what enters the patch's sites under the patch, over bare prompts."""
    patch: ThoughtPatch = subject.patch
    model = subject.model
    with undisturbed(model), patch.applied(model), activation_moments(model, patch) as moments, torch.no_grad():
        for prompt in subject.sweep.bare_prompts[:MOMENT_INPUTS]:
            ids = torch.tensor([prompt], device=subject.decoder.device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return moments
