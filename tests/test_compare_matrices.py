"""Two matrices of one shape: the change between them, in any dtype and at any scale."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from thought_kernels import spectral
from thought_kernels.spectral.comparison import _AT_ONCE, compare_matrices


def normal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "features"),
    [*itertools.product([(6, 40), (40, 6), (7, 7)], ["rows", "columns"]), ((3, _AT_ONCE + 5), "columns")],
)
def test_figures_of_the_change(shape: tuple[int, int], features: str) -> None:
    W, step = normal(*shape), 0.1 * normal(*shape, seed=1)
    found = compare_matrices(W, W + step, features=features)
    assert found["change"] == pytest.approx(float(step.norm() / W.norm()), rel=1e-9)
    singular = torch.linalg.svdvals(step).square()
    assert found["stable_rank"] == pytest.approx(float(singular.sum() / singular[0]), rel=1e-9)
    side = W.T if features == "rows" else W
    left = torch.linalg.svd(side, full_matrices=False)[0][:, : max(1, round(0.1 * min(shape)))]
    inside = (left.T @ (step.T if features == "rows" else step)).square().sum() / step.square().sum()
    assert found["top_share"] == pytest.approx(float(inside), rel=1e-9)
    assert found["saturation"] == pytest.approx(spectral.saturation(side), rel=1e-9)


def test_saturation_is_of_the_range_alone() -> None:
    """A direction below the rank tolerance has neither a dimension nor a share in the rank."""
    W = torch.diag(torch.tensor([1.0, 1.0, 1e-8]))
    found = compare_matrices(W, W)
    assert found["saturation"] == found["other_saturation"] == pytest.approx(1) == spectral.saturation(W)
    assert found["change"] == found["top_share"] == found["spectral_distance"] == found["dimensionality_change"] == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_any_scale_gives_the_same_figures(scale: float) -> None:
    W, other = normal(5, 12), normal(5, 12, seed=1)
    assert compare_matrices(scale * W, scale * other) == pytest.approx(compare_matrices(W, other), rel=1e-9)
    far = compare_matrices(W, scale * other)
    assert far["change"] == pytest.approx(1 if scale < 1 else float(scale * other.norm() / W.norm()), rel=1e-9)


def test_the_matrix_that_is_zero_is_named() -> None:
    W = normal(3, 4)
    with pytest.raises(ValueError, match="compare_matrices: other must have rank at least 1, got rank 0"):
        compare_matrices(W, 0 * W)
    with pytest.raises(ValueError, match="compare_matrices: W must have rank at least 1, got rank 0"):
        compare_matrices(0 * W, W)
