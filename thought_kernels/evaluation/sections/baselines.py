"""Baselines from the same examples: what a patch must beat to be worth its matrices.

Every hyper-parameter (block, place, scale, c1, learning rate) is chosen by the KL to the prompted model on the
examples, the data that the patch itself was fitted on; no label and no held-out input is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.rivals import function_vector, mean_difference, paper, rank_one
from thought_kernels.evaluation.rivals.choice import Fitted, Intervention
from thought_kernels.evaluation.rivals.lora import BATCH, RANK, RATES, TrainedLora, train_lora
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.sections.bystanders import Bystander, bystander_of, report_drift
from thought_kernels.evaluation.sections.cost import cost
from thought_kernels.evaluation.sections.subject import Subject

LORA_SHORT = 4  # rates are compared after this fraction of the steps

Baseline = Callable[[Subject], tuple[str, Intervention]]


def baselines(subject: Subject, section: Section) -> None:
    """Steering vector, function vector, rank-one edit, the paper's recipe and a trained LoRA, beside the patch."""
    subject.need_examples("baselines")
    bystander = bystander_of(subject)
    subject.report_references(section, subject.sweep)
    _report(subject, section, bystander, "patched", subject.patch)
    if subject.making is not None:
        subject.making.report(section, "patched")
    else:
        with cost(section, "patched", subject.decoder.device):  # it was given, and is made once more
            subject.fit(subject.instruction, subject.examples)
    section.note(
        "Unrelated KL: KL(bare ‖ changed) on the unrelated prompts, nats a token; text KL: the same on ordinary text. "
        "Smaller is gentler."
    )
    section.note("Seconds and the process's peak memory are those of making each, its choice of settings included.")
    kept = subject.amounts.baselines
    for name, baseline in BASELINES.items():
        if kept is not None and name not in kept:
            section.note(f"{name[0].upper()}{name[1:]} was left out: it takes too large a part of the minutes given.")
            continue
        try:
            with cost(section, name, subject.decoder.device):
                label, intervention = baseline(subject)
        except Exception as error:  # peft not installed, or weights it cannot read: the others go on
            section.note(f"{name} was left out: {error}")
            continue
        _report(subject, section, bystander, name, intervention)
        section.note(f"{name[0].upper()}{name[1:]}: {label}.")


def _report(subject: Subject, section: Section, bystander: Bystander, name: str, change: Intervention) -> None:
    subject.report(section, name, subject.measure(change))
    section.add(name, "unrelated KL", bystander.divergence(change), inputs=len(bystander))
    report_drift(subject, section, name, change)


def _fitted(fit: Callable[[Any, Rows, Rows], Fitted]) -> Baseline:
    """A rival made from the subject's rows."""

    def made(subject: Subject) -> tuple[str, Intervention]:
        found = fit(subject.model, subject.rows, subject.choice)
        return found.settings, found.change

    return made


def _lora(subject: Subject) -> tuple[str, Intervention]:
    rows = subject.rows.read(subject.model)

    def train(steps: int, rate: float) -> TrainedLora:
        return train_lora(subject.model, rows, steps=steps, rate=rate, generator=subject.generator("lora"))

    short = max(1, subject.lora_steps // LORA_SHORT)
    tried = [train(short, rate) for rate in RATES]
    rate = min(tried, key=lambda one: one.divergence if math.isfinite(one.divergence) else math.inf).rate
    best = train(subject.lora_steps, rate)
    label = (
        f"rank {RANK} on every linear layer, {subject.lora_steps} steps of AdamW on {BATCH} examples each, on "
        f"KL(prompted ‖ LoRA) over the prompted model's {len(rows)} answers that the patch is fitted on; rate "
        f"{rate:g}, best of {len(RATES)} after {short} steps; {best.seconds:.1f} s of training"
    )
    return label, best


BASELINES: dict[str, Baseline] = {
    "mean-difference vector": _fitted(mean_difference.fit),
    "function vector": _fitted(function_vector.fit),
    "rank-one edit": _fitted(rank_one.fit),
    "paper's recipe": _fitted(paper.fit),
    "LoRA": _lora,
}
