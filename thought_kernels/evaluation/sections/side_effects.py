"""What a patch does where it should do nothing: unrelated prompts, and other instructions given while it is on."""

from __future__ import annotations

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.figures.verdict import KNOWN, UNRELATED
from thought_kernels.evaluation.sections.bystanders import bystander_of, report_drift, told_other
from thought_kernels.evaluation.sections.subject import Subject


def side_effects(subject: Subject, section: Section) -> None:
    """KL and perplexity on unrelated prompts; accuracy on other instructions while the patch is on."""
    bystander = bystander_of(subject)
    bystander.report_bare(section)
    bystander.report(section, "prompted", None)
    bystander.report(section, "patched", subject.patch)
    section.note(
        "Unrelated prompts: divergence from the bare model and perplexity of its own continuations (or of the given "
        "ones); “prompted” is the model told the instruction there, for comparison."
    )
    _drift(subject, section)
    for name in subject.others:
        off, on, count = told_other(subject, name)
        section.add(f"told “{name}”", "accuracy, patch off", off, inputs=count)
        section.add(f"told “{name}”", "accuracy, patch on", on, inputs=count)
    if not subject.others:
        section.note("No other instruction was given, so none was tried with the patch on.")


def _is_liable(subject: Subject) -> bool:
    """Whether the patch was fitted in a way that text_weight could help, and without it."""
    return not subject.recipe.text_weight and subject.recipe.estimator != "mean"


def _drift(subject: Subject, section: Section) -> None:
    """Ordinary text, all of it and kind by kind."""
    reading = report_drift(subject, section, "patched", subject.patch)
    if reading is None:
        return
    drift = subject.drift
    section.add("bare", "text perplexity", drift.bare.perplexity, inputs=len(drift))
    for kind, total, tokens in zip(drift.kinds, reading.divergences, reading.tokens, strict=True):
        section.add(kind, "KL of a passage", total / tokens, inputs=1)
    section.note(
        f"Ordinary text: {len(drift)} passages of {sum(reading.tokens)} tokens that the package brings, each of "
        "another kind, without a chat around them. KL(bare ‖ patched) a token; the perplexity is that of the text."
    )
    if drift.bare.perplexity < KNOWN and reading.divergence > UNRELATED[0] and _is_liable(subject):
        section.note("A patch that is fitted with text_weight=0.3 moves such text less, and recovers a little less.")
