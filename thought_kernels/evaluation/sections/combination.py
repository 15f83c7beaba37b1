"""The patch together with others: added to another instruction's patch, and negated; foretold, and measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.intervals import Interval, mean_interval, recovered_interval
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.sections.subject import Inputs, Intervention, Subject, sums
from thought_kernels.generation.logprobs import completion_logprobs, divergence


def combination(subject: Subject, section: Section) -> None:
    """Patches added and negated, each beside what the patches do alone lets one expect."""
    trial, patch = subject.sweep, subject.patch
    _report(subject, section, "patched", subject.measure(patch), trial)
    if len(subject.examples) >= 2:
        for name in list(subject.others)[: subject.amounts.others]:
            _added(subject, section, name)
    if not subject.others or len(subject.examples) < 2:
        section.note("Adding needs another instruction and the examples; one of them was not given.")
    _negated(subject, section)
    section.note(
        "Added: the sum of both patches, held against the model that is told this instruction, that one, or both."
    )
    section.note(
        "Foretold: as if the log-probabilities of every next token changed by the sum of what each patch alone changes "
        "them by. Nothing of it was fitted, and the patches were not run together for it."
    )
    section.note(
        "Ten pairs of instructions: “thought-kernels experiment composition”; facts as instructions: “experiment "
        "knowledge” (docs/experiments.md)."
    )


def _report(subject: Subject, section: Section, name: str, score: Score, trial: Trial) -> None:
    section.add(name, "accuracy", mean_interval(score.grades, seed=subject.seed), inputs=len(trial))
    section.add(name, "recovered", _recovered(subject, trial, score.divergences), inputs=len(trial))


def _recovered(subject: Subject, trial: Trial, divergences: Sequence[Tensor]) -> Interval:
    return recovered_interval(sums(divergences), sums(trial.bare_divergences), seed=subject.seed)


def _added(subject: Subject, section: Section, name: str) -> None:
    """This patch and another's at once, measured on both instructions, and on both told at once."""
    other, ours, theirs = subject.others[name], subject.patch, subject.other_patch(name)
    both = ours + theirs
    inputs = (other.inputs or Inputs(subject.held_out.questions, None)).first(subject.sweep_inputs)
    trial = subject.new_trial(other.instruction, inputs)
    _report(subject, section, f"“{name}” alone", subject.measure(theirs, trial), trial)
    asked = {"this one told": subject.sweep, "that one told": trial}
    if isinstance(subject.instruction, str) and isinstance(other.instruction, str):
        told = f"{subject.instruction}{subject.separator}{other.instruction}"
        asked["both told"] = subject.new_trial(told, subject.held_out.first(subject.sweep_inputs))
    for where, tried in asked.items():
        label = f"“{name}” added, beside {where}"
        _report(subject, section, label, subject.measure(both, tried), tried)
        foretold = _recovered(subject, tried, _foretold(subject, tried, [ours, theirs]))
        section.add(label, "recovered, foretold", foretold, inputs=len(tried))


def _foretold(subject: Subject, trial: Trial, changes: Sequence[Intervention]) -> list[Tensor]:
    """KL(prompted ‖ foretold) at each token of the prompted answers, one tensor an input."""
    assert trial.prompted_logprobs is not None
    found = []
    for reference, prompt, answer in zip(trial.prompted_logprobs, trial.bare_prompts, trial.written, strict=True):
        bare = _read(subject, prompt, answer)
        moved = [_read(subject, prompt, answer, change) - bare for change in changes]
        found += divergence([reference], [summed(bare, moved).to(reference.device)])
    return found


def summed(logprobs: Tensor, moved: Sequence[Tensor]) -> Tensor:
    """The distribution whose log-probabilities are moved by all of these, log p + Σ_k m_k − log Z; [n, vocabulary]."""
    return (logprobs + sum(moved)).log_softmax(-1)


def _read(subject: Subject, prompt: list[int], answer: list[int], change: Intervention | None = None) -> Tensor:
    """The log-probabilities of one answer's tokens, [n_answer, vocabulary]."""
    if change is None:
        return next(completion_logprobs(subject.model, [prompt], [answer], batch_size=1))
    with change.applied(subject.model):
        return next(completion_logprobs(subject.model, [prompt], [answer], batch_size=1))


def _negated(subject: Subject, section: Section) -> None:
    """−P on the model that is told the instruction, which should then do what the bare one does."""
    trial, minus = subject.sweep, -subject.patch
    with minus.applied(subject.model):
        _, texts = trial.answer(subject.model)
        grades = trial.grade(trial.answer_prompted(subject.model))
    repeats = [float(a == b) for a, b in zip(texts, trial.base_texts, strict=True)]
    section.add("negated", "answers as bare", mean_interval(repeats, seed=subject.seed), inputs=len(trial))
    name = "negated, told the instruction"
    rows: list[list[Tensor]] = [[], [], []]
    for prompt, bare_prompt, answer in zip(trial.prompts, trial.bare_prompts, trial.bare_written, strict=True):
        bare, told = _read(subject, bare_prompt, answer), _read(subject, prompt, answer)
        moved = _read(subject, bare_prompt, answer, subject.patch) - bare
        for row, other in zip(rows, (told, _read(subject, prompt, answer, minus), summed(told, [-moved])), strict=True):
            row += divergence([bare], [other])
    kept, undone, foretold = (sums(row) for row in rows)
    section.add(name, "accuracy left", mean_interval(grades, seed=subject.seed), inputs=len(trial))
    section.add(name, "undone", recovered_interval(undone, kept, seed=subject.seed), inputs=len(trial))
    section.add(name, "undone, foretold", recovered_interval(foretold, kept, seed=subject.seed), inputs=len(trial))
    section.note(
        "Negated: without the instruction the bare model's answers should stay; told the instruction, the model should "
        "lose it. Undone: 1 − ΣKL(bare‖told, negated)/ΣKL(bare‖told) over the bare model's answers, 1 where all that "
        "being told does is taken back."
    )
