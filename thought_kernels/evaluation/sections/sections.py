"""The report's sections, in the page's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from thought_kernels.evaluation.sections.baselines import baselines
from thought_kernels.evaluation.sections.combination import combination
from thought_kernels.evaluation.sections.controls import controls
from thought_kernels.evaluation.sections.diagnosis import diagnosis
from thought_kernels.evaluation.sections.effect import effect, replay
from thought_kernels.evaluation.sections.generalisation import generalisation
from thought_kernels.evaluation.sections.report import Section
from thought_kernels.evaluation.sections.side_effects import side_effects
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.evaluation.sections.sweeps import data, scale


@dataclass(frozen=True)
class SectionKind:
    """A section's heading, what a reader should look for in it, and the function that fills it."""

    title: str
    reading: str
    run: Callable[[Subject, Section], None]


def patch(subject: Subject, section: Section) -> None:
    """The patch itself: made if need be, and what it consists of."""
    found = subject.patch
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


SECTIONS: dict[str, SectionKind] = {
    "patch": SectionKind("The patch", "How large it is in each block, and how well it fits its own examples.", patch),
    "effect": SectionKind("Effect", "Patched should be as good as prompted, and far from bare.", effect),
    "controls": SectionKind(
        "Controls",
        "All but parts of the patch itself should fail. One that does not fail explains the effect better.",
        controls,
    ),
    "baselines": SectionKind(
        "Baselines from the same examples", "The patch should be at least as good as simpler edits.", baselines
    ),
    "side_effects": SectionKind(
        "Side effects", "Nothing should change where the instruction was not meant.", side_effects
    ),
    "combination": SectionKind(
        "Together with other patches", "Added patches should each keep their effect.", combination
    ),
    "diagnosis": SectionKind(
        "What it touches in the weights",
        "The more of the strong directions it uses and the more features it moves, the more there is to disturb.",
        diagnosis,
    ),
    "scale": SectionKind("Scale", "Effect should be largest near 1, and flat around it.", scale),
    "data": SectionKind("Number of examples", "Where the curve has flattened, more examples buy nothing.", data),
    "generalisation": SectionKind(
        "Beyond the examples", "Patched should keep up with prompted in every row.", generalisation
    ),
    "replay": SectionKind(
        "Exact replay", "With one patch per token nothing is lost: an error at the level of rounding.", replay
    ),
}


def chosen_sections(names: str | Iterable[str]) -> list[str]:
    """Section names in the page's order.

    Raises:
        ValueError: an unknown one, or none.
    """
    if names == "all":
        return list(SECTIONS)
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown or not wanted:
        raise ValueError(f"evaluate: sections must be 'all' or among {', '.join(SECTIONS)}, got {unknown or wanted}")
    return [name for name in SECTIONS if name in wanted]
