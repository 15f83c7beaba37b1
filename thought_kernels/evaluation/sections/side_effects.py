"""What a patch does where it should do nothing: unrelated prompts, and other instructions given while it is on."""

from __future__ import annotations

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.sections.bystanders import Bystander, told_other
from thought_kernels.evaluation.sections.subject import Subject


def side_effects(subject: Subject, section: Section) -> None:
    """KL and perplexity on unrelated prompts; accuracy on other instructions while the patch is on."""
    bystander = Bystander(subject)
    bystander.report_bare(section)
    bystander.report(section, "prompted", None)
    bystander.report(section, "patched", subject.patch)
    section.note(
        "Unrelated prompts: divergence from the bare model and perplexity of its own continuations (or of the given "
        "ones); “prompted” is the model told the instruction there, for comparison."
    )
    for name in subject.others:
        off, on, count = told_other(subject, name)
        section.add(f"told “{name}”", "accuracy, patch off", off, inputs=count)
        section.add(f"told “{name}”", "accuracy, patch on", on, inputs=count)
    if not subject.others:
        section.note("No other instruction was given, so none was tried with the patch on.")
