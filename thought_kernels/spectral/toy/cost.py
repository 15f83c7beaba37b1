"""What a sweep of toy models needs: memory, disk, arithmetic, and time, from a few steps of it."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from thought_kernels.spectral.toy.plans import Plan, build, groups
from thought_kernels.spectral.toy.training import Schedule, train

_ON_A_CPU = 32  # models at once: beyond that their tensors leave the cache, and nothing is gained
_TRIAL = 1e10  # floating-point operations of the steps that are timed on a CPU


class Estimate(NamedTuple):
    """What a sweep needs at most: bytes of memory while a group trains, bytes on disk, floating-point operations."""

    memory: int
    disk: int
    operations: float


def estimate(plan: Plan, models_at_once: int) -> Estimate:
    """The memory, disk and arithmetic of a sweep, in float32."""
    n, batch = plan.features, plan.schedule.batch
    largest, disk, operations = 0, 0, 0.0
    for group in groups(plan, models_at_once):
        m, count = group.dimensions, len(group.runs)
        weights = n * (m + 1)
        # W, its gradient, Adam's two moments, the hidden states and their gradients; x, errors and ReLU's mask.
        largest = max(largest, 4 * count * (4 * weights + 2 * batch * m + 3 * batch * n))
        disk += 4 * count * weights * (3 + plan.checkpoints)
        operations += 10.0 * count * batch * n * m * plan.schedule.steps
    return Estimate(largest, disk, operations)


def models_that_fit(plan: Plan, device: torch.device) -> int:
    """How many models to train at once: half of the free memory on a GPU, what the cache holds on a CPU."""
    if device.type != "cuda":
        return _ON_A_CPU
    free, _ = torch.cuda.mem_get_info(device)
    alone = estimate(plan, 1).memory
    return max(1, min(len(plan.sparsities) * plan.seeds, int(free / 2 / alone)))


def training_seconds(plan: Plan, device: torch.device, models_at_once: int, *, steps: int = 2) -> float:
    """How long the training of a plan takes here, from some steps of its smallest and its largest m.

    A step's time is taken to be a + b m for each model, which products of [batch, n] with m have.

    Args:
        plan: what to train.
        device: where.
        models_at_once: as the sweep will have it.
        steps: that are timed, of each; two more come before.
    """
    batch, known = plan.schedule.batch, {}
    for m in {min(plan.dimensions), max(plan.dimensions)}:
        fits = models_at_once
        if device.type == "cpu":  # whose rate a few models show already
            fits = max(1, min(fits, int(_TRIAL / (40 * batch * plan.features * m))))
        group = next(group for group in groups(plan, fits) if group.dimensions == m)
        models = build(plan, group, device)
        train(models, Schedule(2, batch))
        _wait(device)
        start = time.perf_counter()
        train(models, Schedule(steps, batch))
        _wait(device)
        known[m] = (time.perf_counter() - start) / steps / len(group.runs)
    low, high = min(known), max(known)
    slope = (known[high] - known[low]) / (high - low) if high > low else 0.0
    each = sum(known[low] + slope * (m - low) for m in plan.dimensions)
    return each * len(plan.sparsities) * plan.seeds * plan.schedule.steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
