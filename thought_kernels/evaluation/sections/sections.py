"""What fills each section of the report: a subject goes in, figures come out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.sections.baselines import baselines
from thought_kernels.evaluation.sections.combination import combination
from thought_kernels.evaluation.sections.controls import controls
from thought_kernels.evaluation.sections.diagnosis import diagnosis
from thought_kernels.evaluation.sections.effect import effect, replay
from thought_kernels.evaluation.sections.generalisation import generalisation
from thought_kernels.evaluation.sections.parts import parts
from thought_kernels.evaluation.sections.side_effects import side_effects
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.evaluation.sections.sweeps import data, scale


def patch(subject: Subject, section: Section) -> None:
    """The patch itself: made if need be, and what it consists of."""
    found = subject.patch
    if subject.making is not None:
        subject.making.report(section, "patched")
    for (layer, site), entry in found.entries.items():
        if entry.matrix is not None or entry.factors is not None:
            section.add(f"{site} matrix", "norm", entry.norm(), x=layer)
        if entry.vector is not None:
            section.add(f"{site} vector", "norm", float(torch.linalg.vector_norm(entry.vector.double())), x=layer)
        if entry.fit is not None and entry.fit.residual is not None:
            section.add(f"{site} fit", "residual", entry.fit.residual, x=layer)
    section.note(
        "Residual: the share of the examples' squared difference that the patch leaves in each block, by its own sums."
    )


SECTIONS: dict[str, Callable[[Subject, Section], None]] = {
    "patch": patch, "effect": effect, "controls": controls, "parts": parts, "baselines": baselines,
    "side_effects": side_effects, "combination": combination, "diagnosis": diagnosis, "scale": scale, "data": data,
    "generalisation": generalisation, "replay": replay,
}  # fmt: skip
