"""Small toy models, many seeds at once, and the figures their features settle in."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.spectral.geometry import identify_geometry
from thought_kernels.spectral.measure import features_of, nonzero_spectrum
from thought_kernels.spectral.scheme import association_scheme
from thought_kernels.spectral.toy.models import toy_models
from thought_kernels.spectral.toy.summary import rounded
from thought_kernels.spectral.toy.training import Schedule, train

TOLERANCE = 0.05  # of inner products of unit vectors, in a trained model


class Setting(NamedTuple):
    """n features in m dimensions at a sparsity where the figure named is one of the minima."""

    figure: str
    features: int
    dimensions: int
    sparsity: float


SETTINGS = (
    Setting("digon", 2, 1, 0.9),
    Setting("triangle", 3, 2, 0.4),
    Setting("tetrahedron", 4, 3, 0.4),
    Setting("pentagon", 5, 2, 0.9),
    Setting("square antiprism", 8, 3, 0.9),
)
SCHEDULE = Schedule(3000, batch=512, learning_rate=5e-3)


class Found(NamedTuple):
    """What the seeds of one setting came to.

    Attributes:
        setting: n, m, S.
        seeds: how many models.
        counts: models for each figure, most frequent first; "none" for no known figure.
        untrained: the same of the models before training.
        dimensionality: mean of D_i over the features of models with the setting's figure; NaN if there are none.
        eigenvalue_spread: mean of (λ_max − λ_min) / λ_max of those models: 0 for a tight frame.
        loss: their mean loss, and that of all models.
    """

    setting: Setting
    seeds: int
    counts: dict[str, int]
    untrained: dict[str, int]
    dimensionality: float
    eigenvalue_spread: float
    loss: tuple[float, float]


def find_geometries(setting: Setting, *, seeds: int = 64, schedule: Schedule = SCHEDULE) -> Found:
    """Trains a setting from many seeds at once and names what each comes to.

    Args:
        setting: shape and sparsity.
        seeds: models, from seeds 0, 1, ...; they see the same inputs.
        schedule: of training.

    Returns:
        How often each figure was found.

    Source: SS Theorem 4, §A.4; Elhage et al. (2022).
    """
    models = toy_models(setting.features, setting.dimensions, setting.sparsity, seeds=range(seeds), streams=[0] * seeds)
    before = _counted([figure(W) for W in models.weight])
    losses = train(models, schedule)
    names = [figure(W) for W in models.weight]
    chosen = [index for index, name in enumerate(names) if name == setting.figure]
    spectra = [nonzero_spectrum("find_geometries", models.weight[index], 0.0, None) for index in chosen]
    means = torch.tensor([float(features_of(spectrum).dimensionality.mean()) for spectrum in spectra])
    spreads = torch.tensor([1 - float(found.all_eigenvalues[-1] / found.all_eigenvalues[0]) for found in spectra])
    return Found(
        setting,
        seeds,
        _counted(names),
        before,
        float(means.mean()),
        float(spreads.mean()),
        (float(losses[chosen].mean()), float(losses.mean())),
    )


def _counted(names: list[str | None]) -> dict[str, int]:
    return dict(Counter(name or "none" for name in names).most_common())


def as_rows(found: Found) -> list[dict[str, Any]]:
    """One row for each figure found in a setting, trained or untrained."""
    expected = found.setting.figure
    rows = []
    for name in found.counts | found.untrained:
        chosen = name == expected and name in found.counts
        rows.append(
            {
                "features": found.setting.features,
                "dimensions": found.setting.dimensions,
                "sparsity": found.setting.sparsity,
                "seeds": found.seeds,
                "figure": name,
                "models": found.counts.get(name, 0),
                "untrained": found.untrained.get(name, 0),
                "dimensionality": rounded(found.dimensionality) if chosen else "",
                "eigenvalue_spread": rounded(found.eigenvalue_spread) if chosen else "",
                "loss": rounded(found.loss[0]) if chosen else "",
                "loss_of_all": rounded(found.loss[1]),
            }
        )
    return rows


def figure(W: Tensor, *, tol: float = TOLERANCE) -> str | None:
    """The figure that a small trained model's represented features form, tight frame or not.

    identify_geometry asks for a tight frame. Trained antiprisms are not tight, being flatter or taller than the one
    that is, so eight features in three dimensions are also told by the relation classes of their Gram matrix alone.

    Args:
        W: [m, n].
        tol: how far inner products of unit vectors may be off.

    Returns:
        As identify_geometry; None for no known figure.
    """
    norms = torch.linalg.vector_norm(W.double(), dim=0)
    kept = norms > 0.5 * norms.max()
    name = identify_geometry(W[:, kept], tol=tol)
    if name is None and int(kept.sum()) == 8 and W.shape[0] == 3:
        unit = W[:, kept].double() / norms[kept]
        scheme = association_scheme(unit.T @ unit, tol=tol)
        if scheme is not None and sorted(scheme.valencies.tolist()) == [1, 1, 2, 2, 2]:
            return "square antiprism"
    return name
