"""How each feature's spectral measure moves along training, from the checkpoints of a run.

The paper shows "jumps", Rayleigh quotients and "volatility" without defining the first and last; here they are

    jump_i(t)        W₁(μ_i(t), μ_i(t+1)) / mean of κ_i(t), κ_i(t+1)
    volatility_i(t)  standard deviation of log κ_i's increments over the last few checkpoints

with W₁ the Wasserstein distance on the axis of eigenvalues: how far mass had to move along the spectrum, in units of
the mean eigenvalue, whatever happens to the labels of eigenspaces. |κ_i(t+1) − κ_i(t)| ≤ W₁, so a feature can jump
without a change in its Rayleigh quotient but not the other way round.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.measure import features_of, measure_of, nonzero_spectrum

WINDOW = 5


class Evolution(NamedTuple):
    """One model's spectral measures at T checkpoints; float64.

    Attributes:
        steps: of training, [T], int64.
        eigenvalues: of F, largest first, [T, m]; 0 where the rank is less.
        rayleigh: κ_i, [T, n].
        saturation: Σ D_i / rank, [T].
        jump: between checkpoints, [T − 1, n].
        volatility: [T − 1, n]; over fewer increments than the window at the start, and 0 for the first.
    """

    steps: Tensor
    eigenvalues: Tensor
    rayleigh: Tensor
    saturation: Tensor
    jump: Tensor
    volatility: Tensor


def spectral_evolution(steps: Sequence[int], weights: Sequence[Tensor], *, window: int = WINDOW) -> Evolution:
    """The evolution of one model's spectral measures.

    Args:
        steps: T of them, ascending.
        weights: W [m, n] at each, finite and not all zero.
        window: how many increments a volatility is taken over, at least 2.

    Returns:
        The evolution. Zero features have κ = 0 and neither jump nor volatility.

    Raises:
        ValueError: fewer than two checkpoints, numbers that do not agree, or a window below 2.

    Source: SS appendix I, Fig. 19 to 39; definitions in this module's docstring.
    """
    if len(steps) != len(weights) or len(steps) < 2:
        raise ValueError(
            message("spectral_evolution", "steps and weights", "be two or more of each", (len(steps), len(weights)))
        )
    if window < 2:
        raise ValueError(message("spectral_evolution", "window", "be at least 2", window))
    eigenvalues, rayleigh, saturation, measures = [], [], [], []
    for W in weights:
        spectrum = nonzero_spectrum("spectral_evolution", W, 0.0, None)
        features = features_of(spectrum)
        values = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        values[: spectrum.rank] = spectrum.unscale(spectrum.all_eigenvalues)
        eigenvalues.append(values)
        rayleigh.append(features.rayleigh)
        saturation.append(features.dimensionality.sum() / spectrum.rank)
        measure = measure_of(spectrum)
        measures.append((measure.eigenvalues, measure.weights))
    kappa = torch.stack(rayleigh)
    alive = (kappa[:-1] > 0) & (kappa[1:] > 0)
    jump = torch.stack([wasserstein(*a, *b) for a, b in itertools.pairwise(measures)])
    middle = (kappa[:-1] + kappa[1:]) / 2
    jump = torch.where(alive, jump / torch.where(alive, middle, 1), 0)
    change = torch.where(alive, torch.where(kappa > 0, kappa, 1).log().diff(dim=0), 0)
    volatility = torch.zeros_like(change)
    for index in range(1, len(change)):
        volatility[index] = change[max(0, index + 1 - window) : index + 1].std(0)
    return Evolution(
        torch.tensor(list(steps)), torch.stack(eigenvalues), kappa, torch.stack(saturation), jump, volatility
    )


def wasserstein(values: Tensor, weights: Tensor, other_values: Tensor, other_weights: Tensor) -> Tensor:
    """W₁ between two families of measures on a line, ∫ |CDF − CDF'|.

    Args:
        values, other_values: atoms, [E] and [E'].
        weights, other_weights: their masses, [n, E] and [n, E']; equal sums, row by row.

    Returns:
        [n].
    """
    atoms, order = torch.cat([values, other_values]).sort()
    masses = torch.cat([weights, -other_weights], 1)[:, order]
    return (masses.cumsum(1)[:, :-1].abs() * atoms.diff()).sum(1)
