"""`thought-kernels inspect`: a model's weights beside their shuffled entries, its tokens and neurons, two models."""

from __future__ import annotations

import csv
import fnmatch
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from thought_kernels.cli import inspect_tables, options
from thought_kernels.evaluation.pictures.canvas import check_pictures
from thought_kernels.evaluation.records.files import write_text
from thought_kernels.spectral.comparison import compare_models
from thought_kernels.spectral.inspect import MatrixRow, features_side, inspect_model, row_of
from thought_kernels.spectral.inspect_summary import summarise
from thought_kernels.spectral.neighbours import SharedFeatures, shared_features
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices, token_names

_COLUMNS = [field.name for field in fields(MatrixRow)]
_TOKENS = ("embed_tokens", "wte", "lm_head", "token_embd", "output", "embed_out", "embed_in")
_NEURONS = ("down_proj", "ffn_down", "c_proj", "dense_4h_to_h", "fc2")


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
    place = _place(options.DEFAULT_MODEL if model is None else model, offline)
    every = stored_matrices(place)
    matrices = [matrix for matrix in every if _wanted(matrix.name, filters)][:limit]
    if not matrices:
        raise ValueError(f"inspect: --filter must match a matrix of {place}, got none")
    if compare is not None:
        _compare(matrices, _place(compare, offline), features, csv_file)
    elif neighbours is not None:
        _neighbours(place, matrices, neighbours)
    else:
        rows = list(_kept(matrices, {matrix.file for matrix in every}, features, csv_file))
        _inspect(place, rows, csv_file, plot)


def _check_plot(plot: Path) -> None:
    check_pictures("inspect")
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix[1:].lower() not in endings:
        raise typer.BadParameter(f"--plot must end in one of .{', .'.join(sorted(endings))}, got {plot}")


def _inspect(place: Path, rows: list[MatrixRow], csv_file: Path | None, plot: Path | None) -> None:
    options.out.print(inspect_tables.matrices(rows))
    for row in rows:
        if row.rank is None:
            options.out.print(Text(f"{row.name}: {row.note}", style="yellow"), soft_wrap=True)
    options.out.print(inspect_tables.kinds(summarise(rows)))
    options.out.print(inspect_tables.LEGEND, style="dim", markup=False)
    if csv_file is not None:
        options.out.print(f"rows in {csv_file}", markup=False, soft_wrap=True)
    if plot is not None:
        from thought_kernels.spectral.inspect_picture import draw

        draw(rows, plot, place.name)
        options.out.print(f"picture in {plot}", markup=False, soft_wrap=True)


def _neighbours(place: Path, matrices: list[StoredMatrix], path: Path) -> None:
    """Tokens as the rows of embedding and unembedding, without their mean, neurons as the columns of down_proj."""
    tokens = token_names(place)
    found: dict[str, SharedFeatures] = {}
    for matrix in matrices:
        kind = matrix.kind.split(".")[-1]
        if kind not in (*_TOKENS, *_NEURONS) or not matrix.is_readable:
            continue
        W = matrix.read()
        rows = kind in _TOKENS
        names = tokens if rows and tokens is not None and len(tokens) >= len(W) else None
        found[matrix.name] = shared_features(W.T if rows else W, names, centred=rows)
        options.out.print(inspect_tables.neighbours(matrix.name, found[matrix.name]))
    if not found:
        raise ValueError(f"inspect: --neighbours must find an embedding or a down_proj in {place}, got none")
    write_text(json.dumps({name: one.to_dict() for name, one in found.items()}, indent=1, ensure_ascii=False), path)
    options.out.print(f"all of it in {path}", markup=False, soft_wrap=True)


def _compare(matrices: list[StoredMatrix], other: Path, features: str, csv_file: Path | None) -> None:
    features_side((2, 2), features)
    shown = options.err.is_terminal
    changes = list(compare_models(matrices, stored_matrices(other), features=features, progress=shown))
    options.out.print(inspect_tables.changes(changes))
    for change in changes:
        if change.change is None:
            options.out.print(Text(f"{change.name}: {change.note}", style="yellow"), soft_wrap=True)
    options.out.print(inspect_tables.CHANGES, style="dim", markup=False)
    if csv_file is not None:
        _write_csv(csv_file, [asdict(change) for change in changes])
        options.out.print(f"rows in {csv_file}", markup=False, soft_wrap=True)


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


def _kept(matrices: list[StoredMatrix], files: set[Path], features: str, path: Path | None) -> Iterator[MatrixRow]:
    """The rows, each written to PATH.partial as soon as it is known; PATH itself appears when all are there.

    Rows of an interrupted run, and those of an earlier one that PATH holds, are taken as they are; of the model's
    `files` those of other matrices stay.
    """
    shown = options.err.is_terminal
    if path is None:
        yield from inspect_model(matrices, features=features, progress=shown)
        return
    partial = path.with_name(f"{path.name}.partial")
    done = {**_read(path), **_read(partial)}
    sources = {file: _source(file, features) for file in files}
    others = _others(done, {matrix.name for matrix in matrices}, set(sources.values()))
    known = [done.get((matrix.name, sources[matrix.file])) for matrix in matrices]
    fresh = inspect_model(
        [matrix for matrix, row in zip(matrices, known, strict=True) if row is None], features=features, progress=shown
    )
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, "source"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(others)
        lines = []
        for matrix, kept in zip(matrices, known, strict=True):  # at once, or a second interruption would lose them
            if kept is not None:
                writer.writerow({**asdict(kept), "source": sources[matrix.file]})
        file.flush()
        for matrix, old in zip(matrices, known, strict=True):
            row = old or next(fresh)
            lines.append({**asdict(row), "source": sources[matrix.file]})
            if old is None:
                writer.writerow(lines[-1])
                file.flush()
            yield row
    _write_csv(path, lines + others)
    partial.unlink()


def _others(done: dict[tuple[str, str], MatrixRow], names: set[str], sources: set[str]) -> list[dict[str, Any]]:
    """Lines of the same files that another --filter or --limit has measured."""
    return [
        {**asdict(row), "source": source}
        for (name, source), row in done.items()
        if name not in names and source in sources
    ]


def _write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _source(file: Path, features: str) -> str:
    """What a row was measured on, so that it is not taken for one of another model of the same shapes."""
    state = file.stat()
    return f"{features} {file.name} {state.st_size} {state.st_mtime_ns}"


def _read(path: Path) -> dict[tuple[str, str], MatrixRow]:
    """Rows of an earlier run by what they are about; a line that is not whole, or of other columns, is left out."""
    if not path.is_file():
        return {}
    found: dict[tuple[str, str], MatrixRow] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            if list(line) != [*_COLUMNS, "source"] or line["source"] is None:
                continue
            try:
                found[line["name"], line["source"]] = row_of(line)
            except ValueError:
                continue
    return found
