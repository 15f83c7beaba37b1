"""The patch against its scale, and against the number of examples it was made from."""

from __future__ import annotations

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.sections.amounts import COUNTS
from thought_kernels.evaluation.sections.bystanders import bystander_of, report_drift
from thought_kernels.evaluation.sections.cost import cost
from thought_kernels.evaluation.sections.subject import Subject


def scale(subject: Subject, section: Section) -> None:
    """Effect against side effect over the patch's scale: the Pareto curve."""
    bystander = bystander_of(subject)
    subject.report_references(section, subject.sweep)
    for factor in subject.amounts.scales:
        changed = factor * subject.patch
        subject.report(section, "patched", subject.measure(changed), x=factor)
        section.add("patched", "unrelated KL", bystander.divergence(changed), inputs=len(bystander), x=factor)
        report_drift(subject, section, "patched", changed, x=factor)
    section.note("The patch's matrices and vectors are multiplied by the scale; 1 is the patch as fitted.")


def data(subject: Subject, section: Section) -> None:
    """Accuracy and recovered effect against the number of examples, first examples first."""
    subject.need_examples("data-efficiency curve", COUNTS[0])
    subject.report_references(section, subject.sweep)
    counts = [count for count in subject.amounts.counts if count <= len(subject.pool)]
    if len(subject.pool) < COUNTS[-1]:
        section.note(
            f"Measured to {counts[-1]} examples: {len(subject.pool)} were given, {COUNTS[-1]} would complete the curve."
        )
    for count in counts:
        patch = subject.patch
        if count == len(subject.examples) and subject.making is not None:
            subject.making.report(section, "patched", x=count)
        else:
            with cost(section, "patched", subject.decoder.device, x=count):
                patch = subject.fit(subject.instruction, subject.pool[:count])
        subject.report(section, "patched", subject.measure(patch), x=count)
