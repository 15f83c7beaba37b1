"""`thought-kernels inspect`: a model's weights beside their shuffled entries, its tokens and neurons, two models."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.text import Text

from thought_kernels.cli import inspect_neighbours, inspect_tables, options
from thought_kernels.cli.inspect_rows import KeptRows, source_of
from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.pictures.canvas import check_pictures
from thought_kernels.spectral.inspect import MatrixRow, features_side, inspect_model
from thought_kernels.spectral.inspect_changes import ChangeRow, inspect_changes
from thought_kernels.spectral.inspect_summary import summarise
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a .safetensors or .gguf file, or a hub id (default the shipped checkpoint)",
            show_default=False,
        ),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Only matrices whose name contains or matches it (* and ? allowed); repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many matrices.")] = None,
    features: Annotated[
        str, typer.Option(help="What the features are: rows, columns, or the longer side of each matrix.")
    ] = "longer",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the rows here; rows that it holds are not measured again.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures over the blocks into this picture.")] = None,
    neighbours: Annotated[
        Path | None,
        typer.Option(help="Instead, write here as JSON which tokens and down_proj's neurons share dimensions."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Instead, another model of the same shapes, such as a fine-tune or a merged patch."),
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Walk a model's weights, one matrix in memory at a time, and show the spectrum of each beside its shuffled one.

    Ranks, saturation, kinds of features, spikes above the Marchenko-Pastur law, and the power law of the largest
    eigenvalues where there are enough of them; each kind of matrix and the model in a line.
    """
    files = {"--csv": csv_file, "--plot": plot, "--neighbours": neighbours}
    for option, path in files.items():
        options.check_file(option, path)
    for option, given, others in (
        ("--compare", compare, ("--plot", "--neighbours")), ("--neighbours", neighbours, ("--csv", "--plot")),
    ):  # fmt: skip
        idle = [other for other in others if given is not None and files[other] is not None]
        if idle:
            raise typer.BadParameter(f"{option} must be given without {idle[0]}, which it would do nothing with")
    if neighbours is not None and features != "longer":
        raise typer.BadParameter(
            "--neighbours must be given without --features, which it would do nothing with: its features are the rows "
            "of embeddings and the columns of down_proj"
        )
    if plot is not None:
        _check_plot(plot)
    kept = KeptRows(csv_file if compare is None else None, MatrixRow, "inspect")
    changed = KeptRows(None if compare is None else csv_file, ChangeRow, "inspect --compare")
    place = _place(options.DEFAULT_MODEL if model is None else model, offline)
    matrices = [matrix for matrix in stored_matrices(place) if _wanted(matrix.name, filters)][:limit]
    if not matrices:
        raise ValueError(f"inspect: --filter must match a matrix of {place}, got none")
    start = time.perf_counter()
    with MemoryPeak(torch.device("cpu")) as peak:
        if compare is not None:
            _compare(changed, matrices, stored_matrices(_place(compare, offline)), features)
        elif neighbours is not None:
            told = inspect_neighbours.tell(place, matrices, neighbours)
        else:
            rows = _inspect(kept, matrices, features)
            if plot is not None:
                _draw(rows, plot, place.name)
    if csv_file is not None:
        options.out.print(f"rows in {csv_file}", markup=False, soft_wrap=True)
    measured = kept.measured + changed.measured if neighbours is None else told
    seconds = time.perf_counter() - start
    options.err.print(f"{measured} matrices measured in {seconds:.1f} s, peak {peak.host_mib:.0f} MiB", soft_wrap=True)


def _check_plot(plot: Path) -> None:
    check_pictures("inspect")
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix[1:].lower() not in endings:
        raise typer.BadParameter(f"--plot must end in one of .{', .'.join(sorted(endings))}, got {plot}")


def _inspect(kept: KeptRows[MatrixRow], matrices: list[StoredMatrix], features: str) -> list[MatrixRow]:
    features_side((2, 2), features)
    shown = options.err.is_terminal

    def measure(places: list[int]) -> Iterator[MatrixRow]:
        return inspect_model([matrices[place] for place in places], features=features, progress=shown)

    rows = list(kept.collect([(one.name, source_of(features, one.file)) for one in matrices], measure))
    options.out.print(inspect_tables.matrices(rows))
    for row in rows:
        if row.rank is None:
            options.out.print(Text(f"{row.name}: {row.note}", style="yellow"), soft_wrap=True)
    options.out.print(inspect_tables.kinds(summarise(rows)))
    options.out.print(inspect_tables.LEGEND, style="dim", markup=False)
    return rows


def _draw(rows: list[MatrixRow], plot: Path, title: str) -> None:
    from thought_kernels.spectral.inspect_picture import draw

    draw(rows, plot, title)
    options.out.print(f"picture in {plot}", markup=False, soft_wrap=True)


def _compare(kept: KeptRows[ChangeRow], ours: list[StoredMatrix], theirs: list[StoredMatrix], features: str) -> None:
    features_side((2, 2), features)
    shown = options.err.is_terminal
    files = {matrix.name: matrix.file for matrix in theirs}
    wanted = [
        (one.name, source_of(features, one.file, *(files[name] for name in (one.name,) if name in files)))
        for one in ours
    ]  # fmt: skip
    measure = partial(inspect_changes, ours, theirs, features=features, progress=shown)
    changes = list(kept.collect(wanted, measure))
    options.out.print(inspect_tables.changes(changes))
    for change in changes:
        if change.change is None:
            options.out.print(Text(f"{change.name}: {change.note}", style="yellow"), soft_wrap=True)
    options.out.print(inspect_tables.CHANGES, style="dim", markup=False)


def _place(model: str, offline: bool) -> Path:
    """The folder or file; a hub id's weights are fetched, or looked up in the cache."""
    path = Path(model).expanduser()
    if path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        return path
    if path.suffix in (".safetensors", ".gguf"):  # no hub id ends so
        return path
    options.announce(model, offline)
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(model, allow_patterns=["*.safetensors", "*.json"], local_files_only=offline)
        )  # fmt: skip
    except Exception as error:  # the hub's client raises types of its own, which differ between versions
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"inspect: model must be a folder or a hub id, got {model!r}, where no folder is; as a hub id: {reason}"
        ) from error


def _wanted(name: str, filters: list[str] | None) -> bool:
    return not filters or any(part in name or fnmatch.fnmatch(name, part) for part in filters)
