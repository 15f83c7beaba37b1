"""The report's sections by name, in the page's order: their headings, and what a reader should look for in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Heading(NamedTuple):
    """A section's title, and a sentence on how to read it."""

    title: str
    reading: str


HEADINGS: dict[str, Heading] = {
    "patch": Heading("The patch", "How large it is in each block, and how well it fits its own examples."),
    "effect": Heading("Effect", "Patched should be as good as prompted, and far from bare."),
    "controls": Heading(
        "Controls",
        "Patches that hold nothing of the instruction. All of them should fail: one that does not explains the effect "
        "better than the instruction does.",
    ),
    "parts": Heading("Parts of the patch", "The patch with the rest of it taken out: where its effect lies."),
    "baselines": Heading("Baselines from the same examples", "The patch should be at least as good as simpler edits."),
    "side_effects": Heading(
        "Side effects",
        "Nothing should change on other requests, on ordinary text, and where another instruction is told.",
    ),
    "combination": Heading(
        "Together with other patches",
        "Added patches should each keep their effect, a negated one should undo what being told does.",
    ),
    "diagnosis": Heading(
        "What it touches in the weights",
        "The more of the strong directions it uses and the more features it moves, the more there is to disturb.",
    ),
    "scale": Heading("Scale", "Effect should be largest near 1, and flat around it."),
    "data": Heading("Number of examples", "Where the curve has flattened, more examples buy nothing."),
    "generalisation": Heading("Beyond the examples", "Patched should keep up with prompted in every row."),
    "replay": Heading("Exact replay", "With one patch per token nothing is lost: an error at the level of rounding."),
}


def chosen_sections(names: str | Iterable[str]) -> list[str]:
    """Section names in the page's order.

    Raises:
        ValueError: an unknown one, or none.
    """
    if names == "all":
        return list(HEADINGS)
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in HEADINGS]
    if unknown or not wanted:
        raise ValueError(f"evaluate: sections must be 'all' or among {', '.join(HEADINGS)}, got {unknown or wanted}")
    return [name for name in HEADINGS if name in wanted]
