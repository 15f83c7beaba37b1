"""`thought-kernels experiment addition | multiplication | translation | composition | knowledge`."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import composition, knowledge, options, scoring
from thought_kernels.demo.tasks import TASKS, held_out, inputs
from thought_kernels.evaluation.experiments.curves import Sample
from thought_kernels.evaluation.experiments.experiments import run_experiment
from thought_kernels.evaluation.experiments.pairs import Pair, Split, read_pairs, split_pairs, usable
from thought_kernels.evaluation.experiments.published import PUBLISHED, check_lines
from thought_kernels.evaluation.experiments.results import ExperimentReport
from thought_kernels.evaluation.pictures.canvas import check_pictures

app = typer.Typer(
    no_args_is_help=True,
    help="The paper's experiments, patches added and negated, and facts as instructions; on any model.",
)

_TASKS = {"addition": "sum", "multiplication": "multiply", "translation": "translate"}
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder (default experiment-NAME).")]
_Steps = Annotated[int, typer.Option(min=1, help="Examples at the end of the curves.")]
_Inputs = Annotated[int, typer.Option(min=1, help="Fresh inputs each point is measured on; the paper took 10.")]
_Seed = Annotated[int, typer.Option(help="Of the choice of examples and inputs.")]
_Lines = Annotated[
    str | None,
    typer.Option(
        help="paper (published c1, c2), tuned (c1 chosen for this model), residual (tuned, a before the MLP's norm), "
        "default (transmute's own). All that the model can have unless given."
    ),
]
_Layers = Annotated[
    str | None, typer.Option(help="0-based blocks of the paper's recipe, such as 10-19 (default the same depth).")
]
_C1 = Annotated[float | None, typer.Option(help="Matrix scale instead of the published one.")]
_C2 = Annotated[float | None, typer.Option(help="Vector scale instead of the published one.")]
_Room = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens (default by the right answers).")]
_Batch = Annotated[int, typer.Option(min=1, help="Inputs at a time.")]


def _on_numbers(name: str, summary: str) -> None:
    def command(
        model: options.Model = options.DEFAULT_MODEL, output: _Output = None, steps: _Steps = 600,
        inputs: _Inputs = 96, seed: _Seed = 0, lines: _Lines = None, layers: _Layers = None, c1: _C1 = None,
        c2: _C2 = None, match: scoring.Match = None, max_new_tokens: _Room = None, batch_size: _Batch = 128,
        dtype: options.Dtype = "auto", device: options.Device = "cpu", offline: options.Offline = False,
    ) -> None:  # fmt: skip
        _run(name, locals())

    app.command(name, help=summary)(command)


_on_numbers("addition", "Three numbers from 0 to 10 and their sum: TP Figure 1 (left) and Table 1.")
_on_numbers("multiplication", "Three numbers from 0 to 10 and their product: TP Figure 1 (right) and Table 2.")


@app.command()
def translation(
    model: options.Model = options.DEFAULT_MODEL, output: _Output = None,
    data: Annotated[
        str | None, typer.Option(help="jsonl of sentence pairs, or a dataset's id (default the shipped lexicon).")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Column of the sentence, such as en or translation.en.")] = None,
    target: Annotated[str | None, typer.Option(help="Column of its translation.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset on the hub.")] = "train",
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="For another language.")] = None,
    steps: _Steps = 600, inputs: _Inputs = 96, seed: _Seed = 0, lines: _Lines = None,
    layers: _Layers = None, c1: _C1 = None, c2: _C2 = None, match: scoring.Match = None,
    max_new_tokens: _Room = None, batch_size: _Batch = 128, dtype: options.Dtype = "auto",
    device: options.Device = "cpu", offline: options.Offline = False,
) -> None:  # fmt: skip
    """English sentences and their translation: TP Figure 2 and Table 3."""
    _run("translation", locals())


app.command("composition")(composition.composition)
app.command("knowledge")(knowledge.knowledge)


def task_split(task_name: str, *, steps: int, inputs_count: int, seed: int) -> Split:
    """Pairs of a task of the shipped model; those measured on are held out from its training."""
    task = TASKS[task_name]
    every = inputs(task)
    rng = random.Random(f"experiment {seed} {task_name}")
    seen = [text for text in every if not held_out(text)]
    held = [text for text in every if held_out(text)]
    rng.shuffle(seen)
    count = min(inputs_count, len(held))
    texts = (seen[count : count + steps], seen[:count], rng.sample(held, count))
    return Split(*([Pair(text, task.answer(text)) for text in part] for part in texts))


def _run(name: str, given: dict[str, Any]) -> None:
    from thought_kernels.evaluation.pictures.curves import draw_experiment

    check_pictures("experiment")
    output = given["output"] if given["output"] is not None else Path(f"experiment-{name}")
    options.check_folder(output)
    steps, count, seed = given["steps"], given["inputs"], given["seed"]
    lines = None if given["lines"] is None else options.listed([given["lines"]])
    if lines is not None:
        check_lines(lines)
    layers = None if given["layers"] is None else options.read_layers(given["layers"])
    recipe = PUBLISHED[name].recipe(given["c1"], given["c2"], layers)
    match = scoring.chosen_match(given["match"], given["model"])
    source, told = given.get("data"), given.get("instruction") or PUBLISHED[name].instruction
    pairs: list[Pair] = []
    if source is not None:
        most = 2 * (steps + 2 * count)  # enough to draw from; datasets on the hub have millions
        pairs = read_pairs(source, source=given["source"], target=given["target"], split=given["split"], limit=most)
    scorer = scoring.read_scorer(match, told, given["device"], given["offline"])
    options.check_layers(given["model"], recipe.layers, given["offline"])
    found, tokenizer = options.load_model(given["model"], given["dtype"], given["device"], given["offline"])
    if source is None:
        data = task_split(_TASKS[name], steps=steps, inputs_count=count, seed=seed)
    else:
        if not Path(source).is_file():
            pairs = usable(found, tokenizer, told, pairs)
        data = split_pairs(pairs, steps=steps, inputs=count, seed=seed)
    answers = [pair.answer for part in data for pair in part]
    report = run_experiment(
        found, tokenizer, name, data, output, instruction=told, c1=given["c1"], c2=given["c2"],
        layers=layers, lines=lines, match=scorer, batch_size=given["batch_size"],
        max_new_tokens=given["max_new_tokens"] or scoring.answer_room(tokenizer, answers, match),
        progress=options.err.is_terminal,
    )  # fmt: skip
    draw_experiment(report, output / "figure.png")
    show(report)
    options.out.print(f"figure, tables and results in {output}", markup=False, soft_wrap=True)


def show(report: ExperimentReport) -> None:
    """Prints each line's best and last point, and the answers of the paper's table."""
    settings = report.settings
    options.out.print(
        f"{report.source}. {settings['instruction']}: prompted {report.prompted:.3f}, bare {report.base:.3f} on "
        f"{report.inputs} inputs ({settings['match']}). Blocks {settings['layers']} of {settings['blocks']}, 0-based; "
        "the paper's are 10 to 19 of 26.",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for column, side in (("line", "left"), ("best", "right"), ("at step", "right"), ("last", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for line in report.lines:
        table.add_row(
            Text(line.label), f"{line.best.accuracy:.3f}", str(line.best.steps),
            f"{line.points[-1].accuracy:.3f} at {line.points[-1].steps}",
        )  # fmt: skip
    options.out.print(table)
    for line in report.lines:
        show_samples(line.label, report.table(line))


def show_samples(title: str, samples: Iterable[Sample]) -> None:
    """Prints what a patch answers at some steps, as the paper's tables do."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("step", "effective c₁", "query", "with the instruction", "patched"):
        table.add_column(column, justify="right" if column in ("step", "effective c₁") else "left", overflow="fold")
    for sample in samples:
        effective = "" if sample.effective_c1 is None else f"{sample.effective_c1:.3g}"
        table.add_row(str(sample.steps), effective, Text(sample.query), Text(sample.prompted), Text(sample.patched))
    options.out.print()
    options.out.print(table)
