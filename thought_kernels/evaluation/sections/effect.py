"""Does the patch do what the instruction does: the exact replay, accuracy, recovered effect, harm, token by token."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.intervals import mean_interval, recovered_interval
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.sections.subject import Subject, sums
from thought_kernels.models import describe
from thought_kernels.pairing.batches import Group
from thought_kernels.pairing.replay import replay_group

REPLAYED = 4
# Up to this size a float64 copy of the model is made for the replay; beyond it the model's own dtype has to do.
MAX_FLOAT64_PARAMETERS = 50_000_000
POSITIONS = 16  # answer tokens shown one by one
SAMPLES = 8
LEVEL_WITH_BARE = 1e-4  # nats an input; a smaller difference is rounding


def replay(subject: Subject, section: Section) -> None:
    """The exactness theorem on this model: per-token patches in place of the instruction, and nothing in its place."""
    small = sum(parameter.numel() for parameter in subject.model.parameters()) <= MAX_FLOAT64_PARAMETERS
    model = copy.deepcopy(subject.model).double() if small else subject.model
    worst_blocks: Tensor | None = None
    logits, control = [], []
    count = min(REPLAYED, len(subject.trial))
    for index in range(count):
        example = subject.held_out.questions[index]._replace(completion=subject.trial.prompted_texts[index] or None)
        row = subject.encode(example)
        report = replay_group(describe(model), Group.of(row), row.tokens)
        blocks = report.block_error
        worst_blocks = blocks if worst_blocks is None else torch.maximum(worst_blocks, blocks)
        logits.append(report.logit_error)
        control.append(report.control_error)
    assert worst_blocks is not None
    for block, error in enumerate(worst_blocks.tolist()):
        section.add("replayed", "block error", error, inputs=count, x=block)
    section.add("replayed", "logit error", max(logits), inputs=count)
    section.add("unpatched control", "logit error", min(control), inputs=count)
    section.note(
        f"Worst of {count} held-out prompts with their answers, in {str(model.dtype).removeprefix('torch.')}; errors "
        "are max|x − x̂| / max|x|. The control is the smallest error without patches. This shows that the model's "
        "difference is read off exactly, before anything is averaged into one patch."
    )


def effect(subject: Subject, section: Section) -> None:
    """The evaluated patch on all held-out inputs."""
    trial = subject.trial
    score = subject.measure(subject.patch, trial)
    subject.report_references(section, trial)
    subject.report(section, "patched", score, trial)
    bare, patched = sums(trial.bare_divergences), sums(score.divergences)
    values = [float(score.values.patched), float(score.values.bare)]
    if values[1] > 0 and score.values.tokens < score.effect.tokens:
        section.add("patched, value tokens", "recovered", score.values.recovered, inputs=len(trial))
    _harm(subject, section, trial, score, bare, patched)
    _positions(subject, section, trial, score)
    _samples(section, trial, score)
    section.note(
        "Recovered effect: 1 − ΣKL(prompted‖patched)/ΣKL(prompted‖bare) over the tokens of the prompted model's greedy "
        "answers; 1 is the prompted model, 0 the bare one. Intervals: 95 %, bootstrap over inputs."
    )


def _harm(
    subject: Subject, section: Section, trial: Trial, score: Score, bare: Sequence[float], patched: Sequence[float]
) -> None:
    shares = {
        "moved away from prompted": [float(p > b + LEVEL_WITH_BARE) for p, b in zip(patched, bare, strict=True)],
        "right when prompted, wrong when patched": [
            max(0.0, p - s) for p, s in zip(trial.prompted_grades, score.grades, strict=True)
        ],
        "right when bare, wrong when patched": [
            max(0.0, b - s) for b, s in zip(trial.base_grades, score.grades, strict=True)
        ],
    }
    for subject_name, values in shares.items():
        section.add(subject_name, "harmed", mean_interval(values, seed=subject.seed), inputs=len(trial))
    section.note(
        "Harmed: share of inputs. “Moved away”: further from the prompted model, in KL, than the bare model is."
    )


def _positions(subject: Subject, section: Section, trial: Trial, score: Score) -> None:
    """Figures at the 1st, 2nd, ... token of the prompted model's answers."""
    longest = min(POSITIONS, max(map(len, trial.written)))
    for position in range(longest):
        rows = [index for index, ids in enumerate(trial.written) if len(ids) > position]
        patched = [float(score.divergences[index][position]) for index in rows]
        bare = [float(trial.bare_divergences[index][position]) for index in rows]
        interval = recovered_interval(patched, bare, seed=subject.seed)
        section.add("patched", "recovered", interval, inputs=len(rows), x=position + 1)
        for name, values in (("bare", bare), ("patched", patched)):
            mean = mean_interval(values, seed=subject.seed)
            section.add(name, "KL to prompted", mean, inputs=len(rows), x=position + 1)
        for name, follows in (("bare", trial.bare_follows), ("patched", score.follows)):
            same = [float(follows[index][position]) for index in rows]
            section.add(name, "same token", mean_interval(same, seed=subject.seed), inputs=len(rows), x=position + 1)


def _samples(section: Section, trial: Trial, score: Score) -> None:
    """Some failures first, then the first inputs."""
    wrong = [index for index, grade in enumerate(score.grades) if not grade >= 0.5]
    for index in dict.fromkeys([*wrong[: SAMPLES // 2], *range(len(trial))]):
        if len(section.samples) == SAMPLES:
            break
        section.samples.append({
            "input": trial.questions[index], "right": trial.answers[index], "bare": trial.base_texts[index],
            "prompted": trial.prompted_texts[index], "patched": score.texts[index],
            "grade": f"{score.grades[index]:g}",
        })  # fmt: skip
