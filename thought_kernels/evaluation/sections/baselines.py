"""Baselines from the same examples: what a patch must beat to be worth its matrices.

Every hyper-parameter (block, place, scale, c1, learning rate) is chosen by the KL to the prompted model on the
examples, the data that the patch itself was fitted on; no label and no held-out input is looked at.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from thought_kernels.estimation.scales import ScaleWarning
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.rivals.lora import BATCH, RANK, RATES, TrainedLora, train_lora
from thought_kernels.evaluation.rivals.paper import C1_FACTORS, PAPER_C1, paper_layers
from thought_kernels.evaluation.rivals.refit import rank_one
from thought_kernels.evaluation.rivals.steering import (
    PLACES,
    Steering,
    common_suffix,
    function_vector,
    mean_differences,
)
from thought_kernels.evaluation.sections.bystanders import Bystander, bystander_of, report_drift
from thought_kernels.evaluation.sections.cost import cost
from thought_kernels.evaluation.sections.subject import Intervention, Subject
from thought_kernels.fitting.recipe import Recipe, paper_recipe
from thought_kernels.patches.patch import ThoughtPatch

MAX_LAYERS = 8  # tried by the baselines that act on one block
VECTOR_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
LORA_SHORT = 4  # rates are compared after this fraction of the steps
EDIT_SCALES = (0.5, 1.0, 2.0, 4.0)

Baseline = Callable[[Subject, Section], tuple[str, Intervention]]


def baselines(subject: Subject, section: Section) -> None:
    """Steering vector, function vector, rank-one edit, the paper's recipe and a trained LoRA, beside the patch."""
    subject.need_examples("baselines")
    bystander = bystander_of(subject)
    subject.report_references(section, subject.sweep)
    _report(subject, section, bystander, "patched", subject.patch)
    with cost(section, "patched", subject.decoder.device):  # the patch may have been given: it is made once more
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
                label, intervention = baseline(subject, section)
        except Exception as error:  # peft not installed, or weights it cannot read: the others go on
            section.note(f"{name} was left out: {error}")
            continue
        _report(subject, section, bystander, name, intervention)
        section.note(f"{name[0].upper()}{name[1:]}: {label}.")


def _report(subject: Subject, section: Section, bystander: Bystander, name: str, change: Intervention) -> None:
    subject.report(section, name, subject.measure(change))
    section.add(name, "unrelated KL", bystander.divergence(change), inputs=len(bystander))
    report_drift(subject, section, name, change)


def _layers(subject: Subject) -> list[int]:
    """Block indices to try, evenly spread over the depth."""
    count = len(subject.decoder.blocks)
    tried = min(count, MAX_LAYERS)
    return sorted({round((index + 0.5) * count / tried - 0.5) for index in range(tried)})


def _steered(subject: Subject, vectors: dict[int, Tensor]) -> tuple[str, Intervention]:
    """The best of every block, place and scale: the best scale depends on the block, so none is fixed first."""
    suffix = common_suffix(subject.training.bare_prompts)
    (layer, place, scale), best = subject.rank(
        ((layer, place, scale), Steering(layer, scale * vector, suffix if place == "answer" else ()))
        for layer, vector in vectors.items()
        for place in (PLACES if suffix else PLACES[1:])
        for scale in VECTOR_SCALES
    )[0]
    return f"block {layer}, added {_WHERE[place]}, scale {scale:g}", best


_WHERE = {"answer": "from the last prompt token on", "everywhere": "everywhere"}


def _mean_difference(subject: Subject, section: Section) -> tuple[str, Intervention]:
    found = mean_differences(subject.training, subject.model)
    return _steered(subject, {layer: found[layer] for layer in _layers(subject)})


def _function_vector(subject: Subject, section: Section) -> tuple[str, Intervention]:
    suffix = common_suffix(subject.training.bare_prompts)
    vector, heads = function_vector(subject.choice, subject.model, suffix)
    label, steering = _steered(subject, dict.fromkeys(_layers(subject), vector))
    shown = ", ".join(f"{layer}.{head}" for layer, head in heads)
    return f"{label}; heads (block.head) {shown}", steering


def _rank_one(subject: Subject, section: Section) -> tuple[str, Intervention]:
    dense = [layer for layer in _layers(subject) if subject.decoder.blocks[layer].mlp_inputs]
    places = [(site, layers) for site, layers in (("attention", _layers(subject)), ("mlp", dense)) if layers]

    def edits() -> Iterator[tuple[Any, Intervention]]:
        for site, layers in places:
            for tokens in ("all", "answer"):
                recipe = Recipe(layers=layers, sites=(site,), pairing="two_pass", tokens=tokens)
                for (layer, _), entry in subject.refit(recipe, rank_one).entries.items():
                    for scale in EDIT_SCALES:
                        yield (site, tokens, layer, scale), scale * ThoughtPatch({(layer, site): entry})

    (site, tokens, layer, scale), best = subject.rank(edits())[0]
    return f"{site} site of block {layer}, rows of {tokens} tokens, scale {scale:g}", best


def _paper(subject: Subject, section: Section) -> tuple[str, Intervention]:
    layers = paper_layers(len(subject.decoder.blocks))
    # Its matrices are linear in c1: one patch is fitted and scaled.
    recipe = paper_recipe(c1=1.0, layers=layers, steps=len(subject.examples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleWarning)
        unit = subject.fit(subject.instruction, subject.examples, recipe)
    c1, patch = subject.rank((factor * PAPER_C1, factor * PAPER_C1 * unit) for factor in C1_FACTORS)[0]
    return f"Algorithm 1 on blocks {layers[0]} to {layers[-1]}, effective c1 {c1:g}, c2 0", patch


def _lora(subject: Subject, section: Section) -> tuple[str, Intervention]:
    def train(steps: int, rate: float) -> TrainedLora:
        generator = subject.generator("lora")
        return train_lora(subject.model, subject.training, steps=steps, rate=rate, generator=generator)

    short = max(1, subject.lora_steps // LORA_SHORT)
    tried = [train(short, rate) for rate in RATES]
    rate = min(tried, key=lambda one: one.divergence if math.isfinite(one.divergence) else math.inf).rate
    best = train(subject.lora_steps, rate)
    label = (
        f"rank {RANK} on every linear layer, {subject.lora_steps} steps of AdamW on {BATCH} examples each, on "
        f"KL(prompted ‖ LoRA) over the prompted model's answers to the {len(subject.training)} examples; rate "
        f"{rate:g}, best of {len(RATES)} after {short} steps; {best.seconds:.1f} s of training"
    )
    return label, best


BASELINES: dict[str, Baseline] = {
    "mean-difference vector": _mean_difference,
    "function vector": _function_vector,
    "rank-one edit": _rank_one,
    "paper's recipe": _paper,
    "LoRA": _lora,
}
