"""The paper's 3,200 runs, or a reduced set of them, as one command that goes on where it stopped.

A sweep trains every (m, S, seed) of a plan, in groups of models of one m that share their products, and leaves in its
folder

    plan.json                     what was run
    m0016-000/state.safetensors   per group: trained weights and the optimizer's state
    m0016-000/step-*.safetensors  per group: checkpoints, where the plan asks for them
    m0016-000/rows.json           per group: its models' figures; a group that has this is done
    models.csv, clusters.csv      all of them, once the last group is done
    nulls.csv                     the same figures of each model untrained, and with its trained entries shuffled
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.nulls import shuffled
from thought_kernels.spectral.toy.inputs import checked_count, mixed
from thought_kernels.spectral.toy.models import ToyModels, toy_models
from thought_kernels.spectral.toy.summary import RTOL, as_row, represented, rounded, summarize
from thought_kernels.spectral.toy.training import Schedule, checkpoint_steps, history, train

PLAN, ROWS, MODELS, CLUSTERS, NULLS = "plan.json", "rows.json", "models.csv", "clusters.csv", "nulls.csv"
_TABLES = {"models": MODELS, "clusters": CLUSTERS, "nulls": NULLS}
_ON_A_CPU = 32  # models at once: beyond that their tensors leave the cache, and nothing is gained


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


class Estimate(NamedTuple):
    """What a sweep needs at most: bytes of memory while a group trains, bytes on disk, floating-point operations."""

    memory: int
    disk: int
    operations: float


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


def sweep(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    models_at_once: int | None = None,
    progress: bool = True,
) -> tuple[Path, Path, Path]:
    """Trains what is not yet trained of a plan, and writes the tables.

    A model's rows are those of its trained weights, of its untrained ones, and of its trained ones with their entries
    shuffled: what is no further from the second and third than they are from each other, training did not do.

    Args:
        plan: what to train.
        output: folder; a sweep of the same plan that was interrupted goes on, within a group too.
        device: "cpu" or a CUDA device.
        models_at_once: of one m; what fits if not given, or what the folder was begun with.
        progress: shows a bar of model steps.

    Returns:
        The paths of models.csv, clusters.csv and nulls.csv.

    Raises:
        ValueError: a folder that holds another plan's sweep or damaged records, or fewer than one model at once.

    Source: SS §4, "Experimental Setup".
    """
    device = torch.device(device)
    folder = Path(output)
    if models_at_once is not None and models_at_once < 1:
        raise ValueError(message("sweep", "models_at_once", "be at least 1", models_at_once))
    described = json.loads(json.dumps(asdict(plan)))
    path = folder / PLAN
    if path.exists():
        record = _read("sweep", path, ("plan", "models_at_once"))
        if record["plan"] != described:
            wrong = sorted(name for name in described if record["plan"].get(name) != described[name])
            fix = "choose another folder or the same plan"
            raise ValueError(message("sweep", "output", "hold this plan's sweep", f"another {', '.join(wrong)}", fix))
        models_at_once = record["models_at_once"]
    else:
        models_at_once = models_at_once or models_that_fit(plan, device)
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps({"plan": described, "models_at_once": models_at_once}, indent=1))
    todo = groups(plan, models_at_once)
    total = len(plan) * plan.schedule.steps
    pause = 1 if sys.stderr.isatty() else 30  # seconds: a log is not to be filled with the bar
    with tqdm(total=total, unit=" model steps", unit_scale=True, disable=not progress, mininterval=pause) as bar:
        for group in todo:
            bar.set_postfix_str(group.name)
            _run(plan, group, folder / group.name, device, bar)
    return _tables(folder, todo)


def _run(plan: Plan, group: Group, folder: Path, device: torch.device, bar: tqdm) -> None:
    """One group, unless it is done."""
    count, steps = len(group.runs), plan.schedule.steps
    if (folder / ROWS).exists():
        bar.update(count * steps)
        return
    seen = 0

    def advance(done: int) -> None:
        nonlocal seen
        seen += done
        bar.update(count * done)

    models = build(plan, group, device)
    untrained = models.weight.to("cpu", copy=True)
    kept = checkpoint_steps(steps, plan.checkpoints)
    losses = train(
        models, plan.schedule, folder=folder, checkpoints=kept, save_every=max(1, steps // 20), progress=advance
    )
    bar.update(count * (steps - seen))  # what an earlier start had done
    record: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for index, ((sparsity, seed), loss, W) in enumerate(
        zip(group.runs, losses.tolist(), models.weight.cpu(), strict=True)
    ):
        setting = {"features": plan.features, "dimensions": group.dimensions, "sparsity": sparsity, "seed": seed}
        summary, found = summarize(W, rtol=plan.rtol)
        extra = {} if plan.spread == 1 else {"most_varied": most_varied(W, models.sparsity[index].cpu())}
        record["models"].append({**setting, "loss": rounded(loss), **as_row(summary), **extra})
        record["clusters"] += [{**setting, **{name: rounded(value) for name, value in row.items()}} for row in found]
        for is_shuffled, null in enumerate((untrained[index], shuffled(W, seed))):
            summary, _ = summarize(null, rtol=plan.rtol)
            record["nulls"].append({**setting, "shuffled": is_shuffled, **as_row(summary)})
    _write(folder / ROWS, json.dumps(record))


def most_varied(W: Tensor, sparsity: Tensor) -> int:
    """How many of the k represented features are among the k whose inputs vary most.

    An input that is active with probability p, and then uniform on [0, 1], has variance p/3 − p²/4.

    Args:
        W: ``[m, n]``.
        sparsity: S of each feature ``[n]``.
    """
    kept, active = represented(W), 1 - sparsity
    top = (active / 3 - active.square() / 4).topk(int(kept.sum())).indices
    return int(kept[top].sum())


def _tables(folder: Path, todo: Sequence[Group]) -> tuple[Path, Path, Path]:
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for group in todo:
        record = _read("sweep", folder / group.name / ROWS, list(_TABLES))
        for name, rows in tables.items():
            rows += record[name]
    for name, rows in tables.items():
        write_table(folder / _TABLES[name], rows)
    return folder / MODELS, folder / CLUSTERS, folder / NULLS


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal columns as a CSV, complete before it takes its name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def _read(function: str, path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return {name: record[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        fix = f"{error}; remove it to run its part again"
        raise ValueError(message(function, str(path), "be a whole record of a sweep", "another file", fix)) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_plan(folder: str | os.PathLike[str]) -> tuple[Plan, list[Group]]:
    """The plan of a sweep's folder, and its groups.

    Raises:
        ValueError: a folder without a plan.
    """
    path = Path(folder) / PLAN
    if not path.exists():
        raise ValueError(message("read_plan", "folder", f"hold {PLAN}", "none", str(folder)))
    record = _read("read_plan", path, ("plan", "models_at_once"))
    fields = dict(record["plan"])
    fields["schedule"] = Schedule(**fields["schedule"])
    fields["dimensions"], fields["sparsities"] = tuple(fields["dimensions"]), tuple(fields["sparsities"])
    plan = Plan(**fields)
    return plan, groups(plan, record["models_at_once"])


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """A table of a sweep, all columns as numbers."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def trained(folder: str | os.PathLike[str], dimensions: int) -> Iterator[tuple[float, int, Path, int]]:
    """Where the models of one m are: (S, seed, the group's folder, the model's index in it)."""
    _, found = read_plan(folder)
    for group in found:
        if group.dimensions == dimensions:
            for index, (sparsity, seed) in enumerate(group.runs):
                yield sparsity, seed, Path(folder) / group.name, index


def changed(plan: Plan, **changes: Any) -> Plan:
    """A plan with other fields; steps, batch and learning_rate are the schedule's."""
    schedule = {name: changes.pop(name) for name in ("steps", "batch", "learning_rate") if name in changes}
    return replace(plan, schedule=replace(plan.schedule, **schedule), **changes)


def final_weights(folder: Path, index: int) -> Tensor:
    """W [m, n] of one trained model of a group, as its last checkpoint has it."""
    return history(folder)[-1][1][index]
