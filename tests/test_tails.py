"""Power laws of spectral densities: exponents that are known, the published procedure step by step, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thought_kernels.spectral.tails import power_law_tail

# Two ways to take the same sums of logarithms in float64.
SUMS = 1e-9


def pareto(alpha: float, count: int, seed: int) -> Tensor:
    """Exact draws from p(x) ∝ x^-alpha, x ≥ 3."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * (1 - uniform) ** (-1 / (alpha - 1))


def by_hand(values: Tensor, min_tail: int) -> tuple[float, float, float, int]:
    """(alpha, x_min, distance, count) as Clauset, Shalizi and Newman describe it, one candidate at a time."""
    found = []
    for x_min in sorted(set(values.tolist())):
        tail = sorted(value for value in values.tolist() if value >= x_min)
        spread = sum(math.log(value / x_min) for value in tail)
        if len(tail) < min_tail or spread == 0:
            continue
        alpha = 1 + len(tail) / spread
        gaps = [abs(1 - (value / x_min) ** (1 - alpha) - below / len(tail)) for below, value in enumerate(tail)]
        found.append((max(gaps), alpha, x_min, len(tail)))
    distance, alpha, x_min, count = min(found)
    return alpha, x_min, distance, count


@pytest.mark.parametrize("alpha", [1.6, 2.5, 4.0])
def test_a_known_exponent_lies_in_the_interval(alpha: float) -> None:
    inside = 0
    for seed in range(20):
        tail = power_law_tail(pareto(alpha, 400, seed))
        assert tail is not None and tail.low < tail.alpha < tail.high
        inside += tail.low <= alpha <= tail.high
    # 95 % given x_min; that x_min is chosen as well costs a part of it.
    assert inside >= 15


@pytest.mark.parametrize("seed", range(4))
def test_the_published_procedure_step_by_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.linalg.svdvals(torch.randn(70, 90, generator=generator, dtype=torch.float64)).square()
    if seed % 2:
        values = torch.cat([values, pareto(2.0, 30, seed), values[:5]])  # ties too
    tail = power_law_tail(values, min_tail=12)
    assert tail is not None
    alpha, x_min, distance, count = by_hand(values, 12)
    assert tail.length == count
    assert (tail.alpha, tail.x_min, tail.distance) == pytest.approx((alpha, x_min, distance), rel=SUMS)
    assert tail.high - tail.alpha == pytest.approx(1.96 * (alpha - 1) / math.sqrt(count), rel=SUMS)


def test_scale_order_and_zeros_do_not_matter() -> None:
    values = pareto(2.2, 200, 0)
    tail = power_law_tail(values)
    shuffled = torch.cat([values[torch.randperm(200)] * 1e30, torch.zeros(40, dtype=torch.float64)])
    scaled = power_law_tail(shuffled)
    assert tail is not None and scaled is not None
    assert scaled.x_min == pytest.approx(tail.x_min * 1e30, rel=SUMS)
    assert scaled._replace(x_min=0) == pytest.approx(tail._replace(x_min=0), rel=SUMS)


def test_too_few_or_equal_eigenvalues_have_no_tail() -> None:
    assert power_law_tail(pareto(2.0, 49, 0)) is None
    assert power_law_tail(pareto(2.0, 49, 0), min_eigenvalues=40) is not None
    assert power_law_tail(torch.ones(500)) is None
    assert power_law_tail(torch.zeros(500)) is None
    assert power_law_tail(torch.empty(0)) is None


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (([1.0, 2.0],), TypeError, "eigenvalues must be a floating tensor \\[r\\], got list"),
        ((torch.arange(60),), TypeError, "eigenvalues must be a floating tensor \\[r\\], got torch.int64"),
        ((torch.ones(60, 2),), ValueError, "eigenvalues must be a vector \\[r\\], got \\[60, 2\\]"),
        ((torch.full((60,), math.nan),), ValueError, "eigenvalues must be finite and nonnegative"),
        ((-torch.ones(60),), ValueError, "eigenvalues must be finite and nonnegative"),
    ],
)
def test_refusals(arguments: tuple[Tensor, ...], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=f"^power_law_tail: {sentence}"):
        power_law_tail(*arguments)
    with pytest.raises(ValueError, match="^power_law_tail: min_tail must be an integer of at least 2, got 1"):
        power_law_tail(torch.ones(60), min_tail=1)
