"""`thought-kernels inspect`: ranks, saturation, kinds of features and tails of a model's weights."""

from __future__ import annotations

import csv
import fnmatch
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options
from thought_kernels.evaluation.pictures.canvas import check_pictures
from thought_kernels.spectral.inspect import MatrixRow, StoredMatrix, inspect_model, stored_matrices

_COLUMNS = [field.name for field in fields(MatrixRow)]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a .safetensors file or a hub id (default the shipped checkpoint)", show_default=False
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
        Path | None, typer.Option("--csv", help="Write the rows here; an interrupted run goes on from its own.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures over the blocks into this picture.")] = None,
    offline: options.Offline = False,
) -> None:
    """Walk a model's weights, one matrix in memory at a time, and show the spectrum of each.

    Ranks, saturation, kinds of features, and the power law of the largest eigenvalues where there are enough of them.
    """
    for option, path in (("--csv", csv_file), ("--plot", plot)):
        options.check_file(option, path)
    if plot is not None:
        check_pictures("inspect")
        from matplotlib.backend_bases import FigureCanvasBase

        endings = FigureCanvasBase.get_supported_filetypes()
        if plot.suffix[1:].lower() not in endings:
            raise typer.BadParameter(f"--plot must end in one of .{', .'.join(sorted(endings))}, got {plot}")
    place = _place(options.DEFAULT_MODEL if model is None else model, offline)
    matrices = [matrix for matrix in stored_matrices(place) if _wanted(matrix.name, filters)][:limit]
    if not matrices:
        raise ValueError(f"inspect: --filter must match a matrix of {place}, got none")
    rows = list(_kept(matrices, features, csv_file))
    options.out.print(_table(rows))
    for row in rows:
        if row.rank is None:
            options.out.print(Text(f"{row.name}: {row.note}", style="yellow"), soft_wrap=True)
    options.out.print(_LEGEND, style="dim", markup=False)
    if csv_file is not None:
        options.out.print(f"rows in {csv_file}", markup=False, soft_wrap=True)
    if plot is not None:
        from thought_kernels.spectral.inspect_picture import draw

        draw(rows, plot, place.name)
        options.out.print(f"picture in {plot}", markup=False, soft_wrap=True)


def _place(model: str, offline: bool) -> Path:
    """The folder or file; a hub id's weights are fetched, or looked up in the cache."""
    path = Path(model).expanduser()
    if path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        return path
    if path.suffix == ".safetensors":  # no hub id ends so
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


def _kept(matrices: list[StoredMatrix], features: str, path: Path | None) -> Iterator[MatrixRow]:
    """The rows, each written to PATH.partial as soon as it is known; PATH itself appears when all are there."""
    shown = options.err.is_terminal
    if path is None:
        yield from inspect_model(matrices, features=features, progress=shown)
        return
    partial = path.with_name(f"{path.name}.partial")
    done = _read(partial) if partial.is_file() else {}
    sources = {matrix.file: _source(matrix.file, features) for matrix in matrices}
    known = [done.get((matrix.name, sources[matrix.file])) for matrix in matrices]
    fresh = inspect_model(
        [matrix for matrix, row in zip(matrices, known, strict=True) if row is None], features=features, progress=shown
    )
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, "source"], lineterminator="\n")
        writer.writeheader()
        ordered = []
        for matrix, kept in zip(matrices, known, strict=True):  # at once, or a second interruption would lose them
            if kept is not None:
                writer.writerow({**asdict(kept), "source": sources[matrix.file]})
        file.flush()
        for matrix, old in zip(matrices, known, strict=True):
            row = old or next(fresh)
            if old is None:
                writer.writerow({**asdict(row), "source": sources[matrix.file]})
                file.flush()
            ordered.append(row)
            yield row
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in ordered)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    partial.unlink()


def _source(file: Path, features: str) -> str:
    """What a row was measured on, so that it is not taken for one of another model of the same shapes."""
    state = file.stat()
    return f"{features} {state.st_size} {state.st_mtime_ns} {file.resolve()}"


def _read(path: Path) -> dict[tuple[str, str], MatrixRow]:
    """Rows of an interrupted run by what they are about; a line that is not whole is left out."""
    kinds = {field.name: str(field.type).split(" ")[0] for field in fields(MatrixRow)}
    convert = {"int": int, "float": float, "str": str}
    found: dict[tuple[str, str], MatrixRow] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            if list(line) != [*_COLUMNS, "source"] or line["source"] is None:
                continue
            try:
                values: dict[str, Any] = {
                    name: None if line[name] == "" and name != "note" else convert[kinds[name]](line[name])
                    for name in _COLUMNS
                }
            except ValueError:
                continue
            found[line["name"], line["source"]] = MatrixRow(**values)
    return found


_LEGEND = """\
r, c      the features are the rows, or the columns
stable    stable rank; eff. = exp of the entropy of the eigenvalues' shares
satur.    sum of fractional dimensionalities / rank
kinds     per cent of features that are localized / band-localized / broadband
alpha     exponent of the density's tail, half its 95 % interval; KS its distance
"""


def _table(rows: list[MatrixRow]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("matrix", overflow="fold", min_width=16)
    for name in ("shape", "", "rank", "stable", "eff.", "satur.", "kinds", "alpha", "KS"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.rank is None or row.localized is None or row.band_localized is None or row.broadband is None:
            continue  # nothing was measured: its note stands below the table, where it takes no column's place
        cells: list[Any] = [Text(row.name.removesuffix(".weight")), f"{row.rows}x{row.columns}", row.features[0]]
        shares = "/".join(f"{100 * share:.0f}" for share in (row.localized, row.band_localized, row.broadband))
        alpha, distance = "-", "-"
        if row.alpha is not None and row.alpha_high is not None and row.distance is not None:
            alpha, distance = f"{row.alpha:.2f}±{row.alpha_high - row.alpha:.2f}", f"{row.distance:.2f}"
        table.add_row(
            *cells, str(row.rank), f"{row.stable_rank:.1f}", f"{row.effective_rank:.1f}", f"{row.saturation:.3f}",
            shares, alpha, distance,
        )  # fmt: skip
    return table
