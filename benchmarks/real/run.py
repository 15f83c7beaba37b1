"""What patches of real pretrained models are worth: a row of ../results/real.csv for each task, seed and recipe.

    python benchmarks/real/run.py --development --models gemma=DIR smol=DIR qwen=DIR [--seeds 0 1 2]
    python benchmarks/real/run.py --reserved ...            the report; no recipe or default may be chosen by it
    python benchmarks/real/run.py ... --recipe ridge=0.3 "sites=('attention', 'down')"         a study
    python benchmarks/real/run.py ... --rival all --seeds 0 --inputs 32              or some of rivals.FITS, and lora

A model is a folder or a .gguf file; those not given are skipped. Rows that are there are kept: delete the file, or
some of its rows, to measure them again.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import Measurement, Row
from results import Results
from rivals import CHECKPOINTS, FITS, LORA, RATES, made, trained
from tasks import Task, names, task
from tqdm import tqdm

from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.models.load import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from harness import device_name

OUTPUT = Path(__file__).parents[1] / "results" / "real.csv"
KINDS = {"gemma": ("word",), "smol": ("instruction",), "qwen": ("instruction", "system", "arithmetic")}
RIVALS = (*FITS, "lora")
KEY = ("model", "task", "seed", "inputs", "method", "recipe", "rate", "steps", "device")
COLUMNS = (
    "model", "task", "kind", "reserved", "seed", "inputs", "method", "recipe", "rate", "steps",
    "prompted", "bare", "patched", "recovered", "tokens", "seconds", "generation",
    "device", "threads", "torch", "transformers", "date",
    "peak_mib", "drift", "fitted", "choosing", "settings",
)  # fmt: skip
SHOWN = (
    "task", "seed", "inputs", "method", "rate", "steps", "prompted", "bare", "patched", "recovered", "fitted", "drift",
    "seconds", "generation", "peak_mib", "settings",
)  # fmt: skip


def wanted(options: argparse.Namespace, model: str, of: Task, device: str) -> Iterator[Row]:
    """The first columns of a task's rows; a LoRA's row stands for its last checkpoint, which is written last."""
    recipe = " ".join(options.recipe) or "default"
    for inputs in options.inputs:
        row = {
            "model": model, "task": of.name, "kind": of.kind, "reserved": of.reserved, "seed": of.seed,
            "inputs": inputs, "device": device,
        }  # fmt: skip
        for rival in options.rival:
            if rival != "lora":
                yield {**row, "method": rival}
                continue
            for rate in options.rates:
                yield {**row, "method": LORA, "rate": rate, "steps": max(CHECKPOINTS)}
        if not options.rival:
            yield {**row, "method": "patch", "recipe": recipe}


def measured(measurement: Measurement, row: Row, recipe: dict[str, Any]) -> Iterator[Row]:
    versions = {name: version(name) for name in ("torch", "transformers")}
    method, inputs = row["method"], row["inputs"]
    if method == LORA:
        rows = trained(measurement, inputs, row["rate"])
    else:
        rows = iter([made(measurement, method, inputs) if method in FITS else measurement.patched(inputs, recipe)])
    for found in rows:
        today = datetime.date.today().isoformat()
        yield {**row, **found, **versions, "threads": torch.get_num_threads(), "date": today}


def parsed(settings: list[str]) -> dict[str, Any]:
    """Keyword arguments of transmute: Python values, or else texts."""
    recipe = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            recipe[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            recipe[name] = value
    return recipe


def chosen(options: argparse.Namespace, model: str) -> Iterator[Task]:
    """The tasks of one model, a seed after the other."""
    for kind in KINDS[model]:
        for of in names(kind, options.reserved):
            if of in (options.tasks or [of]):
                yield from (task(of, seed=seed, inputs=max(options.inputs)) for seed in options.seeds)


def run(options: argparse.Namespace, name: str, path: str, tasks: Iterable[Task]) -> None:
    """Measures what is missing of one model."""
    results, recipe, device = Results(options.output, KEY, COLUMNS), parsed(options.recipe), device_name(options.device)
    todo = []
    for of in tasks:
        rows = [row for row in wanted(options, name, of, device) if row not in results]
        todo += [(of, rows)] if rows else []
    if not todo:
        return
    model, tokenizer = load(path, device=options.device)
    drift = Drift(model, tokenizer)
    for of, rows in tqdm(todo, desc=name):
        measurement = Measurement(model, tokenizer, of, drift)
        for row in rows:
            for found in measured(measurement, row, recipe):
                results.add(found)
                tqdm.write("  ".join(f"{key} {found[key]}" for key in SHOWN if key in found), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    half = parser.add_mutually_exclusive_group(required=True)
    half.add_argument("--development", dest="reserved", action="store_false")
    half.add_argument("--reserved", dest="reserved", action="store_true")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tasks", nargs="+", default=[], help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inputs", type=int, nargs="+", default=[32, 8], help="to fit on; 0 for the prompt alone")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of transmute")
    parser.add_argument("--rival", nargs="+", default=[], choices=[*RIVALS, "all"], help="in place of the patch")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if "all" in options.rival:
        options.rival = list(RIVALS)
    for entry in options.models:
        if entry.partition("=")[0] not in KINDS or not entry.partition("=")[2]:
            parser.error(f"models must be NAME=PATH with a name of {', '.join(KINDS)}, got {entry!r}")
    for entry in options.models:
        name, path = entry.split("=", 1)
        run(options, name, path, chosen(options, name))


if __name__ == "__main__":
    main()
