"""What a sweep of toy models trains: the paper's plan and smaller ones, and their models in groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.toy.inputs import checked_count, mixed
from thought_kernels.spectral.toy.models import ToyModels, toy_models
from thought_kernels.spectral.toy.summary import RTOL
from thought_kernels.spectral.toy.training import Schedule


@dataclass(frozen=True)
class Plan:
    """What a sweep trains: every m with every S and seed.

    Attributes:
        features: n.
        dimensions: every m.
        sparsities: every S.
        seeds: runs of each (m, S), with their own weights; run r of every setting sees stream r of the inputs.
        schedule: of training.
        checkpoints: kept along each run, besides its end.
        spread: of activation probabilities 1 − S_i over the features of a model, geometric from (1 − S)/√spread to
            (1 − S)·√spread, at most 1; 1 is the uniform sparsity of the paper's main text.
        rtol: of grouped eigenvalues in summaries.
    """

    features: int
    dimensions: tuple[int, ...]
    sparsities: tuple[float, ...]
    seeds: int
    schedule: Schedule
    checkpoints: int = 0
    spread: float = 1.0
    rtol: float = RTOL

    def __post_init__(self) -> None:
        for name in ("dimensions", "sparsities"):
            if not getattr(self, name):
                raise ValueError(message("Plan", name, "name at least one", "none"))
        for name, least in (("features", 1), ("seeds", 1), ("checkpoints", 0)):
            object.__setattr__(self, name, checked_count("Plan", name, getattr(self, name), least))
        dimensions = tuple(checked_count("Plan", "dimensions", m, 1) for m in self.dimensions)
        object.__setattr__(self, "dimensions", dimensions)
        for sparsity in self.sparsities:
            check_number("Plan", "sparsities", sparsity, or_zero=True)
            if sparsity >= 1:
                raise ValueError(message("Plan", "sparsities", "be less than 1", sparsity))
        check_number("Plan", "spread", self.spread)
        if self.spread < 1:
            raise ValueError(message("Plan", "spread", "be at least 1", self.spread))

    def __len__(self) -> int:
        return len(self.dimensions) * len(self.sparsities) * self.seeds


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(round(first + (last - first) * index / (count - 1), 6) for index in range(count))


PRESETS = {
    # SS §4: 32 values of m, 50 of S, 2 seeds. Steps, batch and rate are those of Elhage et al. (2022).
    "paper": Plan(1024, tuple(range(16, 513, 16)), _evenly(0, 0.99, 50), 2, Schedule(10_000, 1024, 1e-3)),
    # Whose training SS appendix I draws (Fig. 19 to 39), at a dense, a middling and a sparse S.
    "paper-training": Plan(
        1024, (96, 112, 160, 208, 256), (0.0, 0.5, 0.9), 1, Schedule(10_000, 1024, 1e-3), checkpoints=24
    ),
    # The same m/n, from 1/64 on up to 1/2, and the same range of S.
    "reduced": Plan(
        128, (2, 4, 8, 16, 24, 32, 48, 64), _evenly(0, 0.99, 12), 2, Schedule(2500, 128, 3e-3), checkpoints=24
    ),
    "reduced-nonuniform": Plan(
        128, (8, 16, 32), _evenly(0, 0.99, 12), 2, Schedule(2500, 128, 3e-3), checkpoints=24, spread=16.0
    ),
}


class Group(NamedTuple):
    """Models that are trained together: one m, several (S, seed)."""

    name: str
    dimensions: int
    runs: tuple[tuple[float, int], ...]


def groups(plan: Plan, models_at_once: int) -> list[Group]:
    """The plan's models in groups of at most ``models_at_once``, sorted by seed so that streams are shared."""
    found = []
    for m in plan.dimensions:
        runs = [(sparsity, seed) for seed in range(plan.seeds) for sparsity in plan.sparsities]
        for index, start in enumerate(range(0, len(runs), models_at_once)):
            found.append(Group(f"m{m:04d}-{index:03d}", m, tuple(runs[start : start + models_at_once])))
    return found


def build(plan: Plan, group: Group, device: torch.device | str = "cpu") -> ToyModels:
    """A group's models, untrained. A model's weights depend on (m, S, seed), not on the group."""
    sparsity = torch.tensor([[value] for value, _ in group.runs], dtype=torch.float64)
    if plan.spread > 1:
        exponent = torch.linspace(-0.5, 0.5, plan.features, dtype=torch.float64)
        sparsity = 1 - ((1 - sparsity) * plan.spread**exponent).clamp(max=1)
    # S in millionths: a float would not tell apart seeds for long.
    seeds = [mixed(seed, group.dimensions, round(value * 1e6)) for value, seed in group.runs]
    return toy_models(
        plan.features, group.dimensions, sparsity, seeds=seeds, streams=[seed for _, seed in group.runs], device=device
    )


def changed(plan: Plan, **changes: Any) -> Plan:
    """A plan with other fields; steps, batch and learning_rate are the schedule's."""
    schedule = {name: changes.pop(name) for name in ("steps", "batch", "learning_rate") if name in changes}
    return replace(plan, schedule=replace(plan.schedule, **schedule), **changes)
