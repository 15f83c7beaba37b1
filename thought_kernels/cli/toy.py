"""`thought-kernels toy sweep | figures | evolution | drift | geometries`: toy models, trained and drawn."""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from thought_kernels.cli import options
from thought_kernels.spectral.toy.plans import PRESETS

app = typer.Typer(no_args_is_help=True, help="Toy models of superposition: the paper's sweep, its figures, geometries.")


@app.command()
def sweep(
    output: Annotated[Path, typer.Option("--output", "-o", help="The sweep's folder.")],
    preset: Annotated[str, typer.Option(help=f"Which models: {', '.join(PRESETS)}.")] = "reduced",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default a GPU where there is one)", show_default=False)
    ] = None,
    models_at_once: Annotated[
        int | None, typer.Option(min=1, help="Of one m (default what fits).", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; the preset's if not given.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step; the preset's if not given.")] = None,
    checkpoints: Annotated[
        int | None, typer.Option(min=0, help="Kept along each run; the preset's if not given.")
    ] = None,
    matmul_precision: Annotated[str, typer.Option(help="highest, or high, which is TF32 on a GPU.")] = "highest",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would need.")] = False,
) -> None:
    """Train every model of a plan, and write tables of models, clusters and nulls; goes on where it stopped."""
    import torch

    from thought_kernels.models.load import usable_device
    from thought_kernels.spectral.toy.cost import estimate, models_that_fit, training_seconds
    from thought_kernels.spectral.toy.plans import changed
    from thought_kernels.spectral.toy.sweeps import sweep as run_sweep

    if preset not in PRESETS:
        raise typer.BadParameter(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if matmul_precision not in ("highest", "high"):
        raise typer.BadParameter(f"--matmul-precision must be highest or high, got {matmul_precision!r}")
    options.check_folder(output)
    torch.set_float32_matmul_precision(matmul_precision)
    given = options.pairs({"steps": steps, "batch": batch, "checkpoints": checkpoints})
    plan = changed(PRESETS[preset], **given)
    place = usable_device("sweep", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    at_once = models_at_once or models_that_fit(plan, place)
    need = estimate(plan, at_once)
    options.out.print(
        f"{len(plan)} models, up to {at_once} at once on {place}: about {need.memory / 2**30:.2f} GiB of memory, "
        f"{need.disk / 2**30:.2f} GiB on disk, {need.operations:.2g} floating-point operations",
        soft_wrap=True,
    )
    took = training_seconds(plan, place, at_once)
    options.out.print(f"from some steps here and now: training takes about {_span(took)}", soft_wrap=True)
    if dry_run:
        return
    start = time.monotonic()
    tables = run_sweep(plan, output, device=place, models_at_once=models_at_once)
    seconds = time.monotonic() - start
    options.out.print(f"{seconds:.0f} s, {len(plan) / seconds:.3g} models a second (of a run that was not resumed)")
    _print_paths(tables)


@app.command()
def figures(
    folder: Annotated[Path, typer.Argument(help="A finished sweep's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    dimensions: Annotated[
        list[int] | None, typer.Option(min=1, help="m of the models whose training is drawn; repeatable.")
    ] = None,
    sparsity: Annotated[float, typer.Option(min=0, max=1, help="The nearest one is drawn.")] = 0.9,
) -> None:
    """Draw a sweep, and print its table by sparsity."""
    from thought_kernels.spectral.toy.figures import by_sparsity, draw
    from thought_kernels.spectral.toy.sweeps import MODELS, NULLS, read_rows

    _print_paths(draw(folder, output, dimensions=dimensions, sparsity=sparsity))
    options.out.print(by_sparsity(read_rows(folder / MODELS), read_rows(folder / NULLS)), markup=False, soft_wrap=True)


@app.command()
def evolution(
    folder: Annotated[Path, typer.Argument(help="A sweep's, with checkpoints.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A CSV.")],
    dimensions: Annotated[
        list[int] | None, typer.Option(min=1, help="m of the models; repeatable (default a middle one).")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="The nearest one is told; repeatable (default 0.9).")
    ] = None,
) -> None:
    """Write what pictures of training show: spectra, Rayleigh quotients, jumps, volatility, dimensionalities."""
    from thought_kernels.spectral.toy.evolution_rows import evolution_rows
    from thought_kernels.spectral.toy.sweeps import write_table

    options.check_file("--output", output)
    write_table(output, evolution_rows(folder, dimensions or (), sparsity or (0.9,)))
    _print_paths([output])


@app.command()
def drift(
    folder: Annotated[Path, typer.Argument(help="A finished sweep's, with checkpoints.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A CSV.")],
    dimensions: Annotated[int, typer.Option(min=1, help="m of the models.")] = 16,
) -> None:
    """Hold gradient flow's prediction of each spectrum to plain descent, and to the next checkpoint."""
    from thought_kernels.spectral.toy.drift import drift_rows
    from thought_kernels.spectral.toy.sweeps import write_table

    options.check_file("--output", output)
    write_table(output, drift_rows(folder, dimensions))
    _print_paths([output])


@app.command()
def geometries(
    output: Annotated[Path, typer.Option("--output", "-o", help="A CSV; settings that it holds are not run again.")],
    seeds: Annotated[int, typer.Option(min=1, help="Models of each setting.")] = 64,
) -> None:
    """Train small models from many seeds, and count the figures that they settle in."""
    from thought_kernels.spectral.toy.geometries import SETTINGS, as_rows, find_geometries
    from thought_kernels.spectral.toy.sweeps import write_table

    options.check_file("--output", output)
    kept = list(csv.DictReader(output.open(newline="", encoding="utf-8"))) if output.is_file() else []
    known = [_kept(kept, setting, seeds) for setting in SETTINGS]
    rows: list[dict[str, Any]] = []
    with options.progress("geometries") as progress:
        for index, setting in enumerate(SETTINGS):
            n, m, S = setting.features, setting.dimensions, setting.sparsity
            progress(index, len(SETTINGS), f"n = {n}, m = {m}, S = {S}")
            found = known[index] or as_rows(find_geometries(setting, seeds=seeds))
            rows += found
            write_table(output, [*rows, *itertools.chain(*known[index + 1 :])])
            counts = ", ".join(f"{row['figure']} {row['models']}" for row in found if int(row["models"]))
            options.out.print(f"n = {n}, m = {m}, S = {S}: {counts}", soft_wrap=True)
        progress(len(SETTINGS), len(SETTINGS), "")
    _print_paths([output])


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _kept(rows: list[dict[str, Any]], setting: Any, seeds: int) -> list[dict[str, Any]]:
    """The rows of one setting; none where they do not say what untrained models are."""
    names = ("features", "dimensions", "sparsity")
    wanted = {name: str(getattr(setting, name)) for name in names} | {"seeds": str(seeds)}
    return [row for row in rows if wanted.items() <= row.items() and row.get("untrained")]


def _print_paths(paths: Any) -> None:
    for path in paths:
        options.out.print(str(path), markup=False, soft_wrap=True)
