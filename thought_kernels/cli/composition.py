"""`thought-kernels experiment composition`: patches added and negated, interference predicted against measured."""

from __future__ import annotations

import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options, scoring
from thought_kernels.demo.tasks import TASKS, Task, held_out, inputs
from thought_kernels.evaluation.experiments.composition import Alone, Behaviour, Both, Composition, Together
from thought_kernels.evaluation.measures.overlap import PREDICTORS, rank_correlation
from thought_kernels.evaluation.pictures.canvas import check_pictures
from thought_kernels.evaluation.pictures.composition import draw_composition
from thought_kernels.evaluation.records.digests import fingerprint
from thought_kernels.evaluation.records.files import write_csv, write_json
from thought_kernels.evaluation.records.journal import Journal

# Compatible ones (a list, then its form), rivals for the same answer, and opposites.
PAIRS = ("reverse+commas", "sort+commas", "rotate+reverse", "reverse+sort", "sum+largest", "sort+sort_down",
         "double+add_one", "first+spell", "largest+smallest", "sum+commas")  # fmt: skip


def composition(
    model: options.Model = options.DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("experiment-composition"),
    pair: Annotated[
        list[str] | None, typer.Option(help=f"Two tasks such as reverse+commas; may be repeated ({', '.join(PAIRS)}).")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Inputs that each patch is fitted on.")] = 32,
    inputs_count: Annotated[int, typer.Option("--inputs", min=1, help="Fresh inputs to measure on.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the choice of inputs and examples.")] = 0,
    match: scoring.Match = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Add and negate patches of two instructions on numbers, and see whether overlap foretells the damage."""
    from thought_kernels.evaluation.experiments.experiments import transmute_defaults
    from thought_kernels.version import __version__

    options.check_folder(output)
    check_pictures("experiment")
    pairs = [read_pair(text) for text in options.listed(pair or list(PAIRS))]
    names = list(dict.fromkeys(name for names in pairs for name in names))
    fit, fresh = _inputs(TASKS[names[0]], examples, inputs_count, seed)
    name_of_match = scoring.chosen_match(match, model)
    scorer = scoring.read_scorer(name_of_match, "", device, offline)
    found, tokenizer = options.load_model(model, dtype, device, offline)
    room = max_new_tokens or scoring.answer_room(
        tokenizer, [TASKS[name].answer(text) for name in names for text in fresh], name_of_match
    )
    run = Composition(
        found, tokenizer, {name: Behaviour(name, TASKS[name].instruction, TASKS[name].answer) for name in names}, fit,
        fresh, match=scorer, max_new_tokens=room, batch_size=batch_size,
    )  # fmt: skip
    journal = Journal(output / "journal.jsonl", {
        "experiment": "composition", "fit": fit, "fresh": fresh, "match": scorer.name, "max_new_tokens": room,
        "weights": fingerprint(found), "transmute_defaults": transmute_defaults(), "version": __version__,
    })  # fmt: skip
    alone, together, both = _measure(run, journal, names, pairs)
    correlations = correlate(together)
    _write(output, alone, together, both, correlations)
    _show(alone, together, both, correlations)
    options.out.print(f"results in {output}", markup=False, soft_wrap=True)


def _inputs(task: Task, examples: int, count: int, seed: int) -> tuple[list[str], list[str]]:
    """(inputs to fit on, inputs to measure on), which are held out from the shipped model's training."""
    every = inputs(task)
    rng = random.Random(f"composition {seed}")
    held = [text for text in every if held_out(text)]
    fresh = rng.sample(held, min(count, len(held)))
    return rng.sample([text for text in every if not held_out(text)], examples), fresh


def _measure(
    run: Composition, journal: Journal, names: list[str], pairs: list[tuple[str, str]]
) -> tuple[list[Alone], list[Together], list[Both]]:
    """Every instruction alone, and every pair in both orders; what the journal holds is not measured again."""
    from tqdm import tqdm

    alone, together, both = [], [], []
    with tqdm(total=len(names) + len(pairs), unit="step", disable=not options.err.is_terminal, leave=False) as bar:
        for name in names:
            bar.set_description(name)
            alone.append(Alone(**journal.once(f"alone {name}", partial(_asdict, run.alone, name))))
            bar.update()
        for first, second in pairs:
            bar.set_description(f"{first} + {second}")
            for name, other in ((first, second), (second, first)):
                row = journal.once(f"together {name} {other}", partial(_asdict, run.together, name, other))
                together.append(Together(**row))
                row = journal.once(f"both {name} {other}", partial(_asdict, run.both, name, other))
                if row:
                    both.append(Both(**row | {"sample": tuple(row["sample"])}))
            bar.update()
    return alone, together, both


def _write(
    output: Path, alone: list[Alone], together: list[Together], both: list[Both], correlations: dict[str, Any]
) -> None:
    content = {
        "alone": [asdict(row) for row in alone], "together": [asdict(row) for row in together],
        "both": [asdict(row) for row in both], "correlations": correlations,
    }  # fmt: skip
    write_json(content, output / "results.json")
    flat = [
        {**{name: value for name, value in asdict(row).items() if name != "predicted"}, **row.predicted}
        for row in together
    ]
    write_csv(flat, output / "interference.csv")
    write_csv([asdict(row) for row in alone], output / "alone.csv")
    draw_composition(together, output / "figure.png")


def read_pair(text: str) -> tuple[str, str]:
    """ "reverse+commas" to its two task names, both on numbers."""
    names = tuple(name.strip() for name in text.split("+"))
    known = [name for name, task in TASKS.items() if not task.on_words]
    if len(names) != 2 or names[0] == names[1] or not set(names) <= set(known):
        raise typer.BadParameter(f"--pair must be two of {', '.join(known)} joined by +, got {text!r}")
    return names[0], names[1]


def correlate(rows: list[Together]) -> dict[str, float | None]:
    """Spearman's ρ of each prediction with the KL that an added patch costs, over ordered pairs."""
    lost = [row.kl_lost for row in rows]
    return {name: rank_correlation([row.predicted[name] for row in rows], lost) for name in PREDICTORS}


def _asdict(measure: Any, *names: str) -> dict[str, Any]:
    row = measure(*names)
    return {} if row is None else asdict(row)


def _show(alone: list[Alone], together: list[Together], both: list[Both], correlations: dict[str, Any]) -> None:
    _table("one patch, and the same negated", [
        ("task", "bare", "told", "patched", "-patch: as bare", "told, -patch", "taken back"),
        *((row.name, row.base, row.prompted, row.patched, row.negated_repeats, row.negated_prompted, row.cancelled)
          for row in alone),
    ])  # fmt: skip
    _table("a second patch added", [
        ("task", "with", "own patch", "sum", "in turn", "lost", "KL lost", "cosine", "disturb."),
        *((row.name, row.other, row.patched, row.added, row.in_turn, row.lost, row.kl_lost, row.predicted["cosine"],
           row.predicted["disturbance"]) for row in together),
    ], names=2)  # fmt: skip
    if both:
        _table("the second instruction on the first one's answer", [
            ("first", "second", "sum", "in turn", "told both", "input", "right", "sum answers"),
            *((row.first, row.second, row.added, row.in_turn, row.prompted, *row.sample) for row in both),
        ], names=2)  # fmt: skip
    shown = ", ".join(f"{name} {'-' if rho is None else f'{rho:.2f}'}" for name, rho in correlations.items())
    options.out.print(f"\nSpearman's rho with the KL lost, {len(together)} ordered pairs: {shown}", markup=False)


def _table(title: str, rows: list[tuple[Any, ...]], names: int = 1) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index < names else "right", overflow="fold", no_wrap=index < names)
    for row in rows[1:]:
        table.add_row(*(
            Text("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row
        ))  # fmt: skip
    options.out.print()
    options.out.print(table)
