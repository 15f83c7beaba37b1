"""Toy models of superposition from the shell: sweep, figures, geometries.

python -m thought_kernels.spectral.toy sweep --preset reduced --output DIR
python -m thought_kernels.spectral.toy figures DIR --output DIR
python -m thought_kernels.spectral.toy geometries --output FILE.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from thought_kernels.spectral.toy.geometries import SETTINGS, as_rows, find_geometries
from thought_kernels.spectral.toy.sweeps import (
    MODELS,
    PRESETS,
    changed,
    estimate,
    models_that_fit,
    read_rows,
    sweep,
    write_table,
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m thought_kernels.spectral.toy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("sweep", help="train every model of a plan; goes on where it stopped")
    run.add_argument("--preset", choices=PRESETS, default="reduced")
    run.add_argument("--output", type=Path, required=True, help="the sweep's folder")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--models-at-once", type=int, help="of one m; what fits if not given")
    run.add_argument("--steps", type=int)
    run.add_argument("--batch", type=int, help="samples a step")
    run.add_argument("--checkpoints", type=int, help="kept along each run")
    run.add_argument("--matmul-precision", choices=("highest", "high"), default="highest", help="high is TF32 on a GPU")
    run.add_argument("--dry-run", action="store_true", help="only say what it would need")
    draw = commands.add_parser("figures", help="pictures of a sweep")
    draw.add_argument("sweep", type=Path, help="the sweep's folder")
    draw.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    draw.add_argument("--dimensions", type=int, help="m of the models whose training is drawn")
    draw.add_argument("--sparsity", type=float, default=0.9, help="the nearest one is drawn")
    find = commands.add_parser("geometries", help="the figures that small models settle in")
    find.add_argument("--output", type=Path, required=True, help="a CSV")
    find.add_argument("--seeds", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        {"sweep": _sweep, "figures": _figures, "geometries": _geometries}[options.command](options)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(str(error))


def _sweep(options: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision(options.matmul_precision)
    given = {name: getattr(options, name) for name in ("steps", "batch", "checkpoints")}
    plan = changed(PRESETS[options.preset], **{name: value for name, value in given.items() if value is not None})
    device = _device(options.device)
    at_once = options.models_at_once or models_that_fit(plan, device)
    need = estimate(plan, at_once)
    print(
        f"{len(plan)} models, up to {at_once} at once on {device}: about {need.memory / 2**30:.2f} GiB of memory, "
        f"{need.disk / 2**30:.2f} GiB on disk, {need.operations:.2g} floating-point operations"
    )
    if options.dry_run:
        return
    start = time.monotonic()
    models, clusters = sweep(plan, options.output, device=device, models_at_once=options.models_at_once)
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s, {len(plan) / seconds:.3g} models a second (of a run that was not resumed)")
    print(models, clusters, sep="\n")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"sweep: device must be one that torch can use here, got {name!r}; {reason}") from error
    return device


def _figures(options: argparse.Namespace) -> None:
    from thought_kernels.spectral.toy.figures import by_sparsity, draw

    for path in draw(options.sweep, options.output, dimensions=options.dimensions, sparsity=options.sparsity):
        print(path)
    print(by_sparsity(read_rows(options.sweep / MODELS)))


def _geometries(options: argparse.Namespace) -> None:
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise ValueError(f"geometries: output must be a file in a folder that exists, got {str(options.output)!r}")
    rows = []
    for setting in SETTINGS:
        found = find_geometries(setting, seeds=options.seeds)
        print(f"n = {setting.features}, m = {setting.dimensions}, S = {setting.sparsity}: {found.counts}", flush=True)
        rows += as_rows(found)
    write_table(options.output, rows)


if __name__ == "__main__":
    main()
