"""What each baseline of the report has the model do, beside being measured: a count for every name of BASELINES."""

from __future__ import annotations

from thought_kernels.evaluation.budget.units import Work
from thought_kernels.evaluation.rivals.lora import BATCH, RATES
from thought_kernels.evaluation.rivals.paper import C1_FACTORS
from thought_kernels.evaluation.rivals.steering import PLACES
from thought_kernels.evaluation.sections.baselines import EDIT_SCALES, LORA_SHORT, MAX_LAYERS, VECTOR_SCALES
from thought_kernels.evaluation.sections.subject import CHOICE_EXAMPLES, Subject


def rival_works(subject: Subject) -> dict[str, Work]:
    """The work of making each baseline, its choice of settings included; what all share is not in it."""
    count, blocks = len(subject.examples), subject.decoder.blocks
    chosen, tried = min(CHOICE_EXAMPLES, count), min(len(blocks), MAX_LAYERS)
    steered = tried * len(PLACES) * len(VECTOR_SCALES) * chosen
    heads = sum(block.num_attention_heads for block in blocks) * chosen
    edits = 2 * 2 * tried * len(EDIT_SCALES) * chosen  # two sites, two kinds of rows
    steps = subject.lora_steps + len(RATES) * max(1, subject.lora_steps // LORA_SHORT)
    return {
        "mean-difference vector": Work(reads=steered + 2 * count),
        "function vector": Work(reads=steered + heads + count),
        "rank-one edit": Work(reads=edits, refits=4),
        "paper's recipe": Work(reads=len(C1_FACTORS) * chosen, fits=(count,)),
        "LoRA": Work(steps=steps * min(BATCH, count), reads=(1 + len(RATES)) * count),
    }
