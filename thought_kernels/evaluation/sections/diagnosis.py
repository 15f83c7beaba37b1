"""What the patch touches in the weights, and whom it should disturb, beside what it was measured to disturb."""

from __future__ import annotations

from statistics import fmean

from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.measures.overlap import rank_correlation
from thought_kernels.evaluation.sections.bystanders import told_other
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.spectral.diagnosis import diagnose, interference

LEADING = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of W's dimensions, strongest first


def diagnosis(subject: Subject, section: Section) -> None:
    """Spectrum and place of Δ at every block and site, the change of W's features, predicted interference."""
    if not _has_matrix(subject.patch):
        section.note("The patch has no matrices, and vectors have no spectrum: there is nothing to diagnose.")
        return
    for (layer, site), found in diagnose(subject.patch, subject.model).sites.items():
        changed = found.features.summary()
        for quantity, value in {
            "rank": found.rank, "stable rank": found.stable_rank, "effective rank": found.effective_rank,
            "‖WΔ‖/‖W‖": found.strength, "write gain": found.write_gain, "read gain": found.read_gain,
            "|ΔD|": changed["mean_absolute_dimensionality_change"],
            "largest |ΔD|": changed["largest_dimensionality_change"], "transport": changed["mean_transport"],
        }.items():  # fmt: skip
            section.add(site, quantity, value, x=layer)
        fit = subject.patch.entries[layer, site].fit
        if fit is not None and fit.anisotropy is not None and fit.spherical_scale is not None:
            section.add(site, "anisotropy", fit.anisotropy, x=layer)
            section.add(site, "spherical λ", fit.spherical_scale, x=layer)
        name = f"{site}, block {layer}"
        width = len(found.singular_values)
        for number in sorted({*(2**k for k in range(width.bit_length())), width}):
            section.add(name, "singular value", float(found.singular_values[number - 1]), x=number)
        for share in LEADING:
            section.add(name, "written", found.top_share("write", share), x=share)
            section.add(name, "read", found.top_share("read", share), x=share)
    section.note(
        "W is o_proj at the attention site, all that multiplies the MLP's input at the mlp site; its rows are "
        "features, and Δ makes each w to (1 + Δ)ᵀw; at the down site W is down_proj, and Δ is added to it. Effective "
        "rank: exp of the entropy of Δ's squared singular values. Write, read: how much more "
        "than an average direction W amplifies what Δ writes into, or reads from. ΔD: change of a feature's fractional "
        "dimensionality, which is 1 for one that shares its direction with none. Transport: share of a feature's norm "
        "that changed eigenspace of WᵀW. Means over all features. Anisotropy: from 0, where the second moment of the "
        "fitted activations is a multiple of 1, to 1; at 0 the estimator mean is least squares at the spherical λ."
    )
    section.note("Dotted: a Δ that prefers no direction. Curves that end below 100 %: the rest is in W's kernel.")
    _predicted(subject, section)


def _predicted(subject: Subject, section: Section) -> None:
    """Interference with other instructions' patches, from the weights alone, beside their accuracy under this patch."""
    if len(subject.examples) < 2 or not subject.others:
        section.note("Predicting interference needs other instructions and the examples; one of them was not given.")
        return
    named = {name: subject.other_patch(name) for name in list(subject.others)[: subject.amounts.diagnosed]}
    named = {name: patch for name, patch in named.items() if _has_matrix(patch)}
    caused, lost = [], []
    for name, found in zip(named, interference(subject.patch, list(named.values()), subject.model), strict=True):
        label = f"told “{name}”"
        section.add(label, "caused", found.caused)
        section.add(label, "felt", found.felt)
        for quantity, part in (("read overlap", "read"), ("write overlap", "write"), ("alignment", "alignment")):
            shared = [getattr(one, part) for one in found.sites.values()]
            section.add(label, quantity, fmean(shared or [0.0]))
        off, on, count = told_other(subject, name)
        section.add(label, "accuracy, patch off", off, inputs=count)
        section.add(label, "accuracy, patch on", on, inputs=count)
        caused.append(found.caused)
        lost.append(off.value - on.value)
    section.note(
        "Caused, felt: what this patch does, through W, to the inputs that the other instruction's patch reads, over "
        "what that one does itself; and the other way round. Read, write: overlap of what both read, and write, 1 if "
        "equal; alignment is negative where they undo each other. All from weights: no input was run."
    )
    rho = rank_correlation(caused, lost)
    section.note(
        ("Too few others, or too alike, for a rank correlation" if rho is None else f"Rank correlation {rho:.2f}")
        + f" of “caused” with the accuracy lost, over {len(caused)}. Trust it little: over 30 pairs of the "
        "shipped model's patches the prediction could not be told from none (docs/spectral_models.md)."
    )


def _has_matrix(patch: ThoughtPatch) -> bool:
    return any(entry.norm() > 0 for entry in patch.entries.values())
