"""How much the sections sweep and try: what a budget makes smaller."""

from __future__ import annotations

from dataclasses import dataclass

SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Amounts:
    """How much is swept and tried beside the subject's own numbers of inputs.

    Attributes:
        scales: that the patch is multiplied by, 1 among them.
        counts: numbers of examples of the data-efficiency curve, as far as there are so many.
        others: other instructions whose patches are fitted, to be controls and to be added.
        diagnosed: other instructions whose patches are fitted for the diagnosis.
        paraphrases: wordings that the patch is compared with.
        paraphrase_patches: of these, how many get a patch of their own.
        baselines: that are made, None for all.
    """

    scales: tuple[float, ...] = SCALES
    counts: tuple[int, ...] = COUNTS
    others: int = 2
    diagnosed: int = 16
    paraphrases: int = 3
    paraphrase_patches: int = 3
    baselines: tuple[str, ...] | None = None
