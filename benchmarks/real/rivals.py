"""The rivals on a task: each is made from the rows that transmute fits, and measured as the patch is.

Settings are chosen by the KL on some of these rows, never on held-out inputs; *fitted* is the recovered effect there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Measurement, Row, cost

from thought_kernels.evaluation.rivals import (
    function_vector,
    mean_difference,
    paper,
    principal_direction,
    probe_direction,
    rank_one,
    task_vector,
)
from thought_kernels.evaluation.rivals.choice import CHOICE_ROWS, Fitted
from thought_kernels.evaluation.rivals.lora import injected, optimised
from thought_kernels.evaluation.rivals.rows import Rows

RANK, RATES, CHECKPOINTS = 16, (3e-4, 1e-3, 3e-3), (25, 50, 100, 200)
LORA = f"LoRA of rank {RANK}"
AT_A_PROMPTS_END = ("task-vector",)  # they act there alone, and ordinary text holds none
FITS: dict[str, Callable[[Any, Rows, Rows], Fitted]] = {
    "mean-difference": mean_difference.fit,
    "function-vector": function_vector.fit,
    "task-vector": task_vector.fit,
    "principal-direction": principal_direction.fit,
    "probe-direction": probe_direction.fit,
    "rank-one": rank_one.fit,
    "paper": paper.fit,
}


def made(measurement: Measurement, name: str, inputs: int) -> Row:
    """What a rival made from the first inputs does on held-out ones; its seconds hold the choice of its settings."""
    model, (rows, generation) = measurement.model, measurement.rows(inputs)
    with cost(measurement.device) as found:
        choice = rows.first(CHOICE_ROWS).read(model)
        fitted = FITS[name](model, rows, choice)
    bare = choice.divergence(model)
    with fitted.change.applied(model):
        recovered = {"fitted": round(1 - choice.divergence(model) / bare, 5)}
        row = {**measurement.scored(), **found, **recovered, "generation": generation}
    if name in AT_A_PROMPTS_END:
        row["drift"] = ""  # it would be 0, whatever the vector
    return {**row, "choosing": round(fitted.choosing, 2), "settings": fitted.settings}


def trained(measurement: Measurement, inputs: int, rate: float) -> Iterator[Row]:
    """A LoRA distilled by gradient descent on the same rows, at each checkpoint; evaluation is not in its seconds.

    loss = mean over the answers' tokens of KL(prompted ‖ bare with LoRA)
    """
    model, (rows, generation) = measurement.model, measurement.rows(inputs)
    with cost(measurement.device) as found:
        rows = rows.read(model)
    choice = rows.first(CHOICE_ROWS)
    bare, seconds, peak = choice.divergence(model), found["seconds"], found["peak_mib"]
    with injected(model, rank=RANK):
        generator = torch.Generator().manual_seed(0)
        steps = optimised(model, rows, steps=max(CHECKPOINTS), rate=rate, generator=generator, falling=False)
        for checkpoint in CHECKPOINTS:
            with cost(measurement.device) as spent:
                while next(steps) < checkpoint:
                    pass
            seconds, peak = seconds + spent["seconds"], max(peak, found["peak_mib"] + spent["peak_mib"])
            yield {
                **measurement.scored(), "fitted": round(1 - choice.divergence(model) / bare, 5), "steps": checkpoint,
                "seconds": round(seconds, 2), "peak_mib": peak, "generation": generation,
            }  # fmt: skip
