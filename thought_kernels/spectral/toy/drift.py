"""What gradient flow would do to the spectrum of a saved run, beside what training did between its checkpoints.

Appendix F is about gradient flow, Ẇ = −∇_W L. These models are trained by Adam on fresh samples, whose steps go
elsewhere: so the flow's prediction is held to both, to plain gradient descent from each checkpoint, where it must
hold, and to the next checkpoint, where it need not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.dynamics import GramFlow, gradient_kernel
from thought_kernels.spectral.toy.plans import build
from thought_kernels.spectral.toy.summary import RTOL, rounded
from thought_kernels.spectral.toy.sweeps import read_plan
from thought_kernels.spectral.toy.training import history

SAMPLES = 4096
_DESCENT = 1e-3  # how far plain descent goes, ‖ΔM‖ / ‖M‖
_NEARER = 10  # and this many times less far: what a derivative leaves out falls with the way, what is wrong does not
_STEPS = 10  # of each
_STILL = 1e-12  # of ‖M‖ in unit time: below this there is no flow to speak of


class Drift(NamedTuple):
    """One interval between checkpoints.

    Attributes:
        step, next_step: of training.
        gram: cosine between the predicted Ṁ and the M(next) − M that training made.
        eigenvalues: the same of F's eigenvalues, sorted.
        descent_error: ‖ΔM − T Ṁ‖ / ‖T Ṁ‖ for plain gradient descent over a time T from the checkpoint.
        descent_eigenvalues: the same of the eigenvalues, one by one where they are simple.
        nearer_error, nearer_eigenvalues: the same two over T/10.
        eigenvalue_share: ‖λ̇‖ / ‖Ṁ‖, how much of Ṁ moves eigenvalues; what is left turns eigenvectors.
        transport: of the predicted changes of Rayleigh quotients, the part that mass transport has beside eigenvalue
            drift, Σ|transport| / (Σ|transport| + Σ|drift|); eigenspaces are windows of 2 %.
        fixed_point: the largest ‖[E_e, Φ]‖ / ‖Φ‖: 0 where no eigenspace turns.
    """

    step: int
    next_step: int
    gram: float
    eigenvalues: float
    descent_error: float
    descent_eigenvalues: float
    nearer_error: float
    nearer_eigenvalues: float
    eigenvalue_share: float
    transport: float
    fixed_point: float


def measure_drift(
    steps: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor, importance: Tensor
) -> list[Drift]:
    """The flow's predictions for one model at each checkpoint but the last.

    Ṁ = −(MΦ + ΦM),  λ̇_e = −2 λ_e tr(E_eΦE_e) / dim E_e

    Args:
        steps: of the checkpoints, ascending.
        weights: W ``[m, n]`` at each.
        biases: b ``[n]`` at each.
        x: inputs ``[samples, n]`` that stand for the distribution.
        importance: I ``[n]``.

    Returns:
        A Drift for each interval; NaN where the prediction or the change is zero.

    Raises:
        ValueError: fewer than two checkpoints, or as GramFlow does.

    Source: SS appendix F, Theorems 18 and 20, Corollary 17.
    """
    if len(steps) < 2 or not len(steps) == len(weights) == len(biases):
        actual = (len(steps), len(weights), len(biases))
        raise ValueError(message("measure_drift", "steps, weights and biases", "be two or more of each", actual))
    x, importance = x.double(), importance.double()
    found = []
    for (step, W, b), (after, V, _) in itertools.pairwise(zip(steps, weights, biases, strict=True)):
        found.append(_interval(step, after, W.double(), V.double(), b.double(), x, importance))
    return found


def _interval(step: int, after: int, W: Tensor, V: Tensor, b: Tensor, x: Tensor, importance: Tensor) -> Drift:
    kernel = gradient_kernel(W, b, x, importance)
    flow = GramFlow(W, kernel, rtol=0.0)
    velocity, pulls = flow.gram_velocity(), _positive(flow, W)
    size = float(velocity.norm() / flow.gram.norm())
    grouped = GramFlow(W, kernel, rtol=RTOL)
    drift, transport = (part.abs().sum() for part in grouped.rayleigh_velocity())
    both = float(drift + transport)
    share, error, spectral_error, nearer_error, nearer_spectral = (float("nan"),) * 5
    if size > _STILL:
        share, time = float(pulls.norm() / velocity.norm()), _DESCENT / size
        far, near = (_descended(W, b, x, importance, way) for way in (time, time / _NEARER))
        eigenvalues = _eigenvalues(W)
        error = _error(far.T @ far - flow.gram, time * velocity)
        spectral_error = _error(_eigenvalues(far) - eigenvalues, time * pulls)
        nearer_error = _error(near.T @ near - flow.gram, time / _NEARER * velocity)
        nearer_spectral = _error(_eigenvalues(near) - eigenvalues, time / _NEARER * pulls)
    return Drift(
        step,
        after,
        _cosine(velocity, V.T @ V - flow.gram),
        _cosine(pulls, _eigenvalues(V) - _eigenvalues(W)),
        error,
        spectral_error,
        nearer_error,
        nearer_spectral,
        share,
        float(transport) / both if both else float("nan"),
        float(grouped.fixed_point_residual().max()),
    )


def _positive(flow: GramFlow, W: Tensor) -> Tensor:
    """λ̇ of the min(m, n) largest eigenvalues, those of a rank that is missing as 0."""
    velocities = flow.eigenvalue_velocity().repeat_interleave(flow.multiplicities)
    return velocities[: min(W.shape)]


def _eigenvalues(W: Tensor) -> Tensor:
    return torch.linalg.svdvals(W).square()


def _descended(W: Tensor, b: Tensor, x: Tensor, importance: Tensor, time: float) -> Tensor:
    """W after plain gradient descent on the given inputs, b held."""
    for _ in range(_STEPS):
        W = W - time / _STEPS * W @ gradient_kernel(W, b, x, importance)
    return W


def _error(found: Tensor, predicted: Tensor) -> float:
    return float((found - predicted).norm() / predicted.norm())


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else float("nan")


def drift_rows(folder: Path, dimensions: int) -> list[dict[str, Any]]:
    """The intervals of every model of one m in a sweep's folder, as rows of a table.

    Raises:
        ValueError: a folder without a sweep, without models of that m, or without checkpoints.
    """
    plan, groups = read_plan(folder)
    if dimensions not in plan.dimensions:
        raise ValueError(message("drift_rows", "dimensions", f"be one of {plan.dimensions}", dimensions))
    rows = []
    for group in groups:
        if group.dimensions != dimensions:
            continue
        kept, models = history(folder / group.name), build(plan, group)
        if len(kept) < 2:
            raise ValueError(message("drift_rows", "folder", "hold two checkpoints or more", len(kept), str(folder)))
        x = models.inputs(SAMPLES).at(-1)
        for index, (sparsity, seed) in enumerate(group.runs):
            steps, weights, biases = zip(*((step, W[index], b[index]) for step, W, b in kept), strict=True)
            importance = models.importance[index].expand(plan.features)
            for found in measure_drift(steps, weights, biases, x[index], importance):
                setting = {"dimensions": dimensions, "sparsity": sparsity, "seed": seed}
                rows.append({**setting, **{name: rounded(value) for name, value in found._asdict().items()}})
    return rows
