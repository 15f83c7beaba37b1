"""What each baseline of the report has the model do, beside being measured: a count for every name of BASELINES."""

from __future__ import annotations

import random

from thought_kernels.evaluation.budget.units import Work, rows_of
from thought_kernels.evaluation.rivals.choice import CHOICE_ROWS, FEW_ROWS, FINALISTS, spread
from thought_kernels.evaluation.rivals.function_vector import TOLD_TRIALS, TRIALS, with_shuffled_answers
from thought_kernels.evaluation.rivals.lora import BATCH, RATES
from thought_kernels.evaluation.rivals.paper import C1_FACTORS
from thought_kernels.evaluation.rivals.rank_one import DEPTHS, STEPS, TEXTS, VALUE_ROWS
from thought_kernels.evaluation.rivals.rank_one import RATES as VALUE_RATES
from thought_kernels.evaluation.rivals.steering import PLACES, SCALES
from thought_kernels.evaluation.sections.baselines import LORA_SHORT
from thought_kernels.evaluation.sections.subject import Subject


def rival_works(subject: Subject) -> dict[str, Work]:
    """The work of making each baseline, its choice of settings included; what all share is not in it."""
    rows, blocks = rows_of(subject), subject.decoder.blocks
    vectors, values = len(spread(len(blocks))) * len(SCALES), len(DEPTHS) * len(VALUE_RATES)
    searched = min(VALUE_ROWS, rows)
    heads = sum(block.num_attention_heads for block in blocks)
    shuffled = with_shuffled_answers(subject.instruction, random.Random(0)) is not None
    trials = min(TRIALS if shuffled else TOLD_TRIALS, rows)
    steps = subject.lora_steps + len(RATES) * max(1, subject.lora_steps // LORA_SHORT)
    return {
        "mean-difference vector": Work(reads=2 * rows + _chosen(len(PLACES) * vectors, rows)),
        "function vector": Work(reads=rows + (1 + heads) * trials + _chosen(vectors, rows)),
        "rank-one edit": Work(
            steps=values * (STEPS + 1) * searched,
            writes=TEXTS,
            reads=rows + TEXTS + values * searched + _chosen(values, rows),
        ),
        "paper's recipe": Work(refits=1, reads=_chosen(len(C1_FACTORS), rows)),
        "LoRA": Work(steps=steps * min(BATCH, rows), reads=(2 + len(RATES)) * rows),
    }


def _chosen(candidates: int, rows: int) -> int:
    """Rows read by a choice among candidates."""
    rows = min(CHOICE_ROWS, rows)
    if candidates > FINALISTS and rows > FEW_ROWS:
        return candidates * FEW_ROWS + FINALISTS * rows
    return candidates * rows
