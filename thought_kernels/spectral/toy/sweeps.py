"""The paper's 3,200 runs, or a reduced set of them, as one command that goes on where it stopped.

A sweep trains every (m, S, seed) of a plan, in groups of models of one m that share their products, and leaves in its
folder

    plan.json                     what was run
    m0016-000/state.safetensors   per group: trained weights and the optimizer's state
    m0016-000/step-*.safetensors  per group: checkpoints, where the plan asks for them
    m0016-000/rows.json           per group: its models' figures; a group that has this is done
    models.csv, clusters.csv      all of them, once the last group is done
    nulls.csv, null_clusters.csv  the same of each model untrained, and with its trained entries shuffled
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.ops.library import message
from thought_kernels.spectral.nulls import shuffled
from thought_kernels.spectral.toy.cost import models_that_fit
from thought_kernels.spectral.toy.plans import Group, Plan, build, groups
from thought_kernels.spectral.toy.summary import as_row, represented, rounded, summarize
from thought_kernels.spectral.toy.training import Schedule, checkpoint_steps, history, train

PLAN, ROWS, MODELS, CLUSTERS = "plan.json", "rows.json", "models.csv", "clusters.csv"
NULLS, NULL_CLUSTERS = "nulls.csv", "null_clusters.csv"
_TABLES = {"models": MODELS, "clusters": CLUSTERS, "nulls": NULLS, "null_clusters": NULL_CLUSTERS}
# Of a cluster of a null: there are many, and what else clusters.csv says of one is never held to theirs.
_OF_NULL_CLUSTERS = ("dimension", "members", "residual", "localization", "r_squared")


def sweep(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    models_at_once: int | None = None,
    progress: bool = True,
) -> list[Path]:
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
        The paths of models.csv, clusters.csv, nulls.csv and null_clusters.csv.

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
    if _is_whole(folder / ROWS):  # else trained weights that are there are summarised again
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
        sparsities = models.sparsity[index].cpu() if plan.spread > 1 else None
        row, found = _told(W, plan, sparsities)
        record["models"].append({**setting, "loss": rounded(loss), **row})
        record["clusters"] += [{**setting, **cluster} for cluster in found]
        for is_shuffled, null in enumerate((untrained[index], shuffled(W, seed))):
            null_setting = {**setting, "shuffled": is_shuffled}
            row, found = _told(null, plan, sparsities)
            record["nulls"].append({**null_setting, **row})
            few = [{name: cluster[name] for name in _OF_NULL_CLUSTERS} for cluster in found]
            record["null_clusters"] += [{**null_setting, **cluster} for cluster in few]
    _write(folder / ROWS, json.dumps(record))


def _is_whole(path: Path) -> bool:
    """Whether a group's record is there, with all the tables that a sweep has; of a damaged one _read says so."""
    if not path.exists():
        return False
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return True
    return not isinstance(record, dict) or not record or set(_TABLES) <= set(record)


def _told(W: Tensor, plan: Plan, sparsities: Tensor | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of one model, or of a null of it, and its clusters; with sparsities, whether it took what varies most."""
    summary, found = summarize(W, rtol=plan.rtol)
    extra = {} if sparsities is None else {"most_varied": most_varied(W, sparsities)}
    clusters = [{name: rounded(value) for name, value in cluster.items()} for cluster in found]
    return {**as_row(summary), **extra}, clusters


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


def _tables(folder: Path, todo: Sequence[Group]) -> list[Path]:
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for group in todo:
        record = _read("sweep", folder / group.name / ROWS, list(_TABLES))
        for name, rows in tables.items():
            rows += record[name]
    for name, rows in tables.items():
        write_table(folder / _TABLES[name], rows)
    return [folder / name for name in _TABLES.values()]


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


def final_weights(folder: Path, index: int) -> Tensor:
    """W [m, n] of one trained model of a group, as its last checkpoint has it."""
    return history(folder)[-1][1][index]
