"""Intervals over inputs, which are what another run would draw anew: seeded bootstraps, and a share's from it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with the ends of its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int, level: float = LEVEL) -> Interval:
    """The mean of one number per input, with its percentile bootstrap interval.

    Where all inputs agree at 0 or at 1 every resample does too, and a bootstrap would claim certainty; the exact
    (Clopper-Pearson) bound α^(1/n), α = (1 − level)/2, takes the place of the end that would have collapsed.

    Args:
        values: one number per input, [n]; a NaN makes all three numbers NaN.
        seed: of the resampling.
        level: the interval's coverage.

    Returns:
        An Interval.

    Raises:
        ValueError: no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("mean_interval: values must hold at least one number, got none")
    mean = float(numbers.mean())
    if not np.isfinite(mean):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = _percentiles(numbers[_resamples(numbers.size, seed)].mean(axis=1), level)
    bound = ((1 - level) / 2) ** (1 / numbers.size)
    if np.all(numbers == 1):
        low = bound
    elif np.all(numbers == 0):
        high = 1 - bound
    return Interval(mean, low, high)


def share_interval(share: float, count: int, *, level: float = LEVEL) -> Interval:
    """A share of inputs with its binomial interval, for where the inputs' own numbers are not at hand::

        (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

    A mean of grades from 0 to 1 varies no more than a share does, so that it is at least as wide as it need be there.

    Args:
        share: p, from 0 to 1.
        count: n, of inputs, at least one.
        level: the interval's coverage.

    Returns:
        An Interval.

    Raises:
        ValueError: no inputs, or a share that is none.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"share_interval: share must be from 0 to 1 of at least one input, got {share} of {count}")
    square = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle, half = (
        share + square / (2 * count),
        math.sqrt(square * (share * (1 - share) + square / (4 * count)) / count),
    )
    low, high = ((middle + side * half) / (1 + square / count) for side in (-1, 1))
    return Interval(share, min(max(0.0, low), share), max(min(1.0, high), share))


def recovered_interval(patched: Sequence[float], bare: Sequence[float], *, seed: int, level: float = LEVEL) -> Interval:
    """The recovered effect 1 − Σ_i p_i / Σ_i b_i over inputs, with its percentile bootstrap interval.

    Args:
        patched: Σ_t KL(prompted ‖ patched) of each input, nats, [n].
        bare: Σ_t KL(prompted ‖ bare) of each input, the same inputs.
        seed: of the resampling, which draws inputs, both of an input's numbers together.
        level: the interval's coverage.

    Returns:
        An Interval; NaN where the bare model does what the prompted one does.

    Raises:
        ValueError: no inputs, or another number of them.
    """
    numerator, denominator = np.asarray(patched, dtype=np.float64), np.asarray(bare, dtype=np.float64)
    if numerator.size == 0 or numerator.size != denominator.size:
        raise ValueError(
            f"recovered_interval: patched and bare must be of the same inputs, got {numerator.size} and "
            f"{denominator.size}"
        )
    total = denominator.sum()
    if not total > 0 or not np.isfinite(numerator.sum()):
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = _resamples(numerator.size, seed)
    below = denominator[drawn].sum(axis=1)
    ratios = 1 - numerator[drawn].sum(axis=1)[below > 0] / below[below > 0]
    return Interval(float(1 - numerator.sum() / total), *_percentiles(ratios, level))


def per_token_interval(totals: Sequence[float], tokens: Sequence[int], *, seed: int, level: float = LEVEL) -> Interval:
    """The mean a token, Σ_i t_i / Σ_i n_i over texts, with its percentile bootstrap interval over texts.

    Args:
        totals: of each text, summed over its tokens, [n].
        tokens: how many each text has, at least one.
        seed: of the resampling, which draws texts, both of a text's numbers together.
        level: the interval's coverage.

    Returns:
        An Interval.

    Raises:
        ValueError: no texts, or another number of them.
    """
    rest = recovered_interval(totals, [float(count) for count in tokens], seed=seed, level=level)
    return Interval(1 - rest.value, 1 - rest.high, 1 - rest.low)


def _resamples(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))


def _percentiles(numbers: np.ndarray, level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    low, high = np.percentile(numbers, [tail, 100 - tail])
    return float(low), float(high)
