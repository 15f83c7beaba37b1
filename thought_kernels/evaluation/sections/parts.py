"""The patch taken apart: which of its parts its effect lies in."""

from __future__ import annotations

from dataclasses import replace

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.rivals.refit import MeanDifferences, known_recipe, split
from thought_kernels.evaluation.sections.subject import Subject


def parts(subject: Subject, section: Section) -> None:
    """Each site alone, matrices and vectors alone, and mean differences where there are matrices only."""
    subject.report(section, "patched", subject.measure(subject.patch))
    _sites(subject, section)
    if split(subject.patch, part="vector") is not None:
        _kinds(subject, section)
    elif len(subject.examples) >= 2:
        _means(subject, section)
    else:
        section.note("Mean differences in the matrices' place need the examples, which were not given.")


def _sites(subject: Subject, section: Section) -> None:
    if len(subject.patch.sites) == 1:
        section.note(f"The patch has one site, {subject.patch.sites[0]}.")
        return
    for site in subject.patch.sites:
        alone = split(subject.patch, part="both", sites=[site])
        if alone is not None:
            subject.report(section, f"{site} site only", subject.measure(alone))
    section.note(
        "A site fitted after another mends what that one left: alone it was made for inputs that it does not get here."
    )


def _kinds(subject: Subject, section: Section) -> None:
    for part in ("matrix", "vector"):
        alone = split(subject.patch, part=part)
        if alone is not None:
            subject.report(section, f"{part} only", subject.measure(alone))
        else:
            section.note(f"The patch has no {part} to take alone.")


def _means(subject: Subject, section: Section) -> None:
    plain = replace(known_recipe(subject.patch), estimator="exact", scale=1.0, text_weight=0.0)
    wide = torch.float64 if subject.decoder.dtype == torch.float64 else torch.float32
    vectors = subject.refit(plain, accumulator=MeanDifferences(dtype=wide))
    subject.report(section, "mean differences instead", subject.measure(vectors))
    section.note(
        "Mean differences instead: at the patch's own sites the mean difference of the same rows is added, whatever "
        "the input; how much of the effect needs no matrix."
    )
