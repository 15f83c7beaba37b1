"""Controls: patches that should fail if the patch works for the reason claimed."""

from __future__ import annotations

import torch
from torch import Tensor

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.intervals import mean_interval, recovered_interval
from thought_kernels.evaluation.measures.trial import Score
from thought_kernels.evaluation.rivals.refit import Shuffled, known_recipe
from thought_kernels.evaluation.sections.subject import Subject, sums
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

DRAWS = 3  # of each random control; their inputs are pooled


def controls(subject: Subject, section: Section) -> None:
    """Random matrices of equal spectrum, shuffled δ, other instructions' patches."""
    subject.report_references(section, subject.sweep)
    subject.report(section, "patched", subject.measure(subject.patch))

    draws = [randomised(subject.patch, subject.generator(f"random {draw}")) for draw in range(DRAWS)]
    _pooled(subject, section, "random, equal norm and spectrum", [subject.measure(patch) for patch in draws])
    section.note(
        f"Random: U S Vᵀ with the patch's singular values S and random U, V; vectors of equal norm in random "
        f"directions; {DRAWS} draws pooled."
    )
    if len(subject.examples) >= 2:
        _refitted(subject, section)
        _of_others(subject, section)
    else:
        section.note("Shuffled δ and other instructions' patches need the examples, which were not given.")


def randomised(patch: ThoughtPatch, generator: torch.Generator) -> ThoughtPatch:
    """A patch of the same norms and singular values in random directions.

    Args:
        patch: to imitate.
        generator: of the directions, on the CPU.
    """
    entries = {}
    for key, entry in patch.entries.items():
        dense = entry.dense()
        matrix = None
        if dense is not None:
            singular = torch.linalg.svdvals(dense.double())
            left, right = (_orthonormal(size, len(singular), generator).to(dense.device) for size in dense.shape)
            matrix = ((left * singular) @ right.T).to(dense.dtype)
        vector = entry.vector
        if vector is not None:
            drawn = torch.randn(vector.shape, generator=generator, dtype=torch.float64).to(vector.device)
            norm = torch.linalg.vector_norm(vector.double()) / torch.linalg.vector_norm(drawn)
            vector = (drawn * norm).to(vector.dtype)
        entries[key] = SitePatch(matrix, None, vector)
    return ThoughtPatch(entries, patch.provenance)


def _orthonormal(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``[size, count]`` Haar-distributed orthonormal columns: QR's with the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


def _pooled(subject: Subject, section: Section, name: str, scores: list[Score]) -> None:
    """Figures of several draws as one; an input's grade is its mean over the draws, so that inputs are resampled."""
    grades = [sum(column) / len(column) for column in zip(*(score.grades for score in scores), strict=True)]
    patched = [sum(column) / len(column) for column in zip(*(sums(s.divergences) for s in scores), strict=True)]
    section.add(name, "accuracy", mean_interval(grades, seed=subject.seed), inputs=len(subject.sweep))
    recovered = recovered_interval(patched, sums(subject.sweep.bare_divergences), seed=subject.seed)
    section.add(name, "recovered", recovered, inputs=len(subject.sweep))


def _refitted(subject: Subject, section: Section) -> None:
    recipe = known_recipe(subject.patch)
    wide = torch.float64 if subject.decoder.dtype == torch.float64 else torch.float32
    shuffled = Shuffled(subject.generator("shuffle"), normalization=recipe.normalization, dtype=wide)
    subject.report(section, "shuffled δ", subject.measure(subject.refit(recipe, accumulator=shuffled)))
    section.note("Shuffled δ: the same rows, each difference paired with another token's activation.")


def _of_others(subject: Subject, section: Section) -> None:
    for name in list(subject.others)[: subject.amounts.others]:
        subject.report(section, f"patch of “{name}”", subject.measure(subject.other_patch(name)))
    if not subject.others:
        section.note("No other instruction was given, so no patch of one was tried.")
