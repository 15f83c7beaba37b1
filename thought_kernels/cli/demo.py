"""`thought-kernels demo`: every instruction bare, prompted and patched, as a table, a picture and JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options
from thought_kernels.cli.experiment import show_samples
from thought_kernels.demo.curves import Curve, Sweep
from thought_kernels.demo.demo import OUTSIDE_SHARE, PATCHED_SHARE, RECOVERED, DemoReport, Row, read_tasks, run_demo
from thought_kernels.evaluation.measures.answers import MATCHES
from thought_kernels.evaluation.pictures.canvas import check_pictures
from thought_kernels.evaluation.records.files import write_json


def demo(
    model: options.Model = options.DEFAULT_MODEL,
    instructions: Annotated[str | None, typer.Option(help="Task names, comma-separated; all if not given.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Inputs that each patch is fitted on.")] = 32,
    inputs: Annotated[
        int, typer.Option(min=1, help="Fresh inputs to measure on; fewer where there are not as many.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of inputs and examples.")] = 0,
    match: Annotated[
        str | None,
        typer.Option(
            help="exact or contains (default exact for the shipped checkpoint, contains for others)", show_default=False
        ),
    ] = None,
    curves: Annotated[bool, typer.Option(help="Draw accuracy against examples for sum and multiply.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Examples at the end of the curves.")] = 600,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture.")] = Path("demo.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Transmute every instruction with default settings and show what the patched model does without it."""
    for option, path in (("--output", output), ("--json", json_file)):
        options.check_file(option, path)
    check_pictures("demo")
    if match is not None and match not in MATCHES:
        raise typer.BadParameter(f"--match must be {' or '.join(MATCHES)}, got {match!r}")
    names = None if instructions is None else options.listed([instructions])
    read_tasks(names)  # unknown ones are refused before a model is loaded
    found, tokenizer = options.load_model(model, dtype, device, offline)
    shipped = model == options.DEFAULT_MODEL
    with options.progress("demo") as progress:
        report = run_demo(
            found, tokenizer, instructions=names, examples=examples, inputs=inputs, seed=seed,
            match=match or ("exact" if shipped else "contains"), curves=curves, steps=steps, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    show(report)
    from thought_kernels.demo.picture import draw

    draw(report, output)
    options.out.print(f"picture in {output}", markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(report.to_json(), json_file)
        options.out.print(f"figures in {json_file}", markup=False, soft_wrap=True)


_LEGEND = """\
recovered  1 - KL(prompted‖patched)/KL(prompted‖bare) over the prompted answers
values     the same over the part of an answer that holds its value
outside    no number or word of the inputs occurs in the patch's examples
replay     worst error of the exact replay with per-token patches, in {dtype}
*          nothing was chosen on this instruction
"""


def show(report: DemoReport) -> None:
    """Prints the table, what falls short, and the paper's recipe."""
    options.out.print(_table(report))
    options.out.print(_LEGEND.format(dtype=report.rows[0].replay_dtype), style="dim", markup=False)
    _show_shortfalls(report.rows)
    if report.sweep is not None:
        _show_sweep(report.sweep)
    for curve in report.curves:
        _show_curve(curve)
    options.out.print(f"\n{report.seconds:.0f} s", style="dim")


def _table(report: DemoReport) -> Table:
    settings = report.settings
    table = Table(
        title=f"Accuracy on {report.rows[0].inputs} fresh inputs ({settings['match']} match); "
        f"patches from {settings['examples']} examples",
        title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("task", no_wrap=True)
    for name in ("bare", "prompted", "patched", "recovered", "values"):
        table.add_column(name, justify="right")
    for name in ("outside\nprompted", "outside\npatched", "replay"):
        table.add_column(name, justify="right")
    for row in report.rows:
        table.add_row(
            Text(_starred(row)), f"{row.base:.3f}", f"{row.prompted:.3f}",
            _judged(row.patched, row.patched_reaches),
            _judged(row.recovered, row.recovered_reaches), f"{row.recovered_values:.3f}",
            f"{row.prompted_outside:.3f}",
            _judged(row.patched_outside, row.outside_reaches),
            f"{row.replay_error:.0e}",
        )  # fmt: skip
    return table


def _starred(row: Row) -> str:
    return row.name + " *" * row.reserved


def _judged(value: float, passes: bool) -> Text:
    shown = "-" if math.isnan(value) else f"{value:.3f}"
    return Text(shown, style="bold green" if passes else "bold yellow")


def _show_shortfalls(rows: list[Row]) -> None:
    reached = [
        (f"patched >= {PATCHED_SHARE} x prompted", [row for row in rows if row.patched_reaches]),
        (f"recovered >= {RECOVERED}", [row for row in rows if row.recovered_reaches]),
        (f"outside: patched >= {OUTSIDE_SHARE} x prompted", [row for row in rows if row.outside_reaches]),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for rule, those in reached:
        short = [_starred(row) for row in rows if row not in those]
        table.add_row(
            rule, f"{len(those)} of {len(rows)}", Text("short: " + ", ".join(short) if short else "", style="yellow")
        )
    options.out.print(table)


def _show_sweep(sweep: Sweep) -> None:
    tried = ", ".join(f"{c1:g}: {accuracy:.2f} ({recovered:.2f})" for c1, accuracy, recovered in sweep.tried)
    options.out.print(
        f"\nPaper's recipe: c1 = {sweep.c1:g}, best of these on '{sweep.instruction}' with {sweep.steps} examples, "
        f"accuracy (recovered): {tried}",
        markup=False,
    )


def _show_curve(curve: Curve) -> None:
    show_samples(f"{curve.name}: what the paper's recipe answers", curve.samples)
    best = max(curve.paper, key=lambda point: point.accuracy)
    few = next((point for point in curve.default if point.accuracy >= PATCHED_SHARE * curve.prompted > 0), None)
    reach = (
        f"reaches {PATCHED_SHARE} x prompted with {few.steps} examples"
        if few
        else f"does not reach {PATCHED_SHARE} x prompted"
    )
    options.out.print(
        f"prompted {curve.prompted:.3f}; the paper's recipe at best {best.accuracy:.3f} (step {best.steps}); "
        f"default settings {reach}"
    )
