"""`thought-kernels evaluate`: one report on whether a patch can be trusted, as JSON, CSV and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options, scoring
from thought_kernels.demo.evaluation import task_arguments
from thought_kernels.evaluation.figures.headings import HEADINGS, chosen_sections
from thought_kernels.fitting.recipe import Recipe

_COLOURS = {"yes": "green", "partly": "yellow", "no": "red", "unknown": "dim"}
_TASK = "sum"
_TASK_TOKENS = 24  # no answer of the shipped tasks is longer


def _file(text: str) -> Any:
    """An option for a file that must be there, with its help."""
    return typer.Option(help=text, exists=True, dir_okay=False)


def evaluate(
    model_name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As --model.", show_default=False)] = None,
    model: options.PatchModel = None,
    patch: Annotated[Path | None, typer.Option(help="A folder written by transmute.")] = None,
    instruction: options.InstructionText = None,
    demonstrations: options.Demonstrations = None,
    system: options.System = None,
    examples: Annotated[
        Path | None, _file("jsonl that the patch is, or was, fitted on; the baselines get the same.")
    ] = None,
    held_out: Annotated[Path | None, _file("jsonl to measure on; a completion is the input's right answer.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"Data for every section from a task of the shipped model (default {_TASK} without data)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("evaluation"),
    sections: Annotated[str, typer.Option(help=f"all, or of these, comma-separated: {', '.join(HEADINGS)}.")] = "all",
    scorer: Annotated[
        str, typer.Option(help="exact, contains, regex:PATTERN, module:function, or judge:MODEL (any causal model).")
    ] = "exact",
    judge_prompt: Annotated[
        Path | None, _file("Text with {instruction}, {question}, {answer}, {text} for judge:MODEL.")
    ] = None,
    outside: Annotated[Path | None, _file("jsonl of inputs unlike the examples.")] = None,
    longer: Annotated[Path | None, _file("jsonl of longer inputs.")] = None,
    unrelated: Annotated[Path | None, _file("jsonl of prompts that the patch should leave alone.")] = None,
    pool: Annotated[Path | None, _file("jsonl of more examples, for the data-efficiency curve.")] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="Another wording of the instruction; may be repeated.")
    ] = None,
    other: Annotated[list[str] | None, typer.Option(help="Another instruction; may be repeated.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help='Options of transmute for every fit, as JSON: {"ridge": 0.3}.')
    ] = None,
    inputs: Annotated[int, typer.Option(min=2, help="Held-out inputs at most.")] = 256,
    sweep_inputs: Annotated[int, typer.Option(min=2, help="Of these, for controls, baselines and sweeps.")] = 96,
    lora_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the LoRA baseline.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    separator: Annotated[
        str | None, typer.Option(help=r"Between instruction and input (default the patch's, or \n).")
    ] = None,
    without: options.Without = None,
    format: options.Format = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Measure on fewer inputs, sweep less, to take no longer."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 128,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest answer (default 64; {_TASK_TOKENS} for a task).")
    ] = None,
    mismatch: options.Mismatch = "warn",
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Measure whether a patch can be trusted: effect, controls, baselines, side effects, what carries over.

    Writes evaluation.json, evaluation.csv and evaluation.html. Sections are kept as they finish: the same command takes
    up where it was stopped, and exits with 1 as long as one failed; one that needs examples is left out where none are
    given. Without data or a patch it reports on a task of the shipped model.
    """
    from thought_kernels.evaluation.evaluate import evaluate as run_evaluate
    from thought_kernels.evaluation.pages.page import check_page
    from thought_kernels.patches.patch import ThoughtPatch

    if None not in (model_name, model) and model_name != model:
        raise typer.BadParameter(f"MODEL must be given once, got {model_name} and {model}")
    wanted = sections if sections == "all" else options.listed([sections])
    chosen_sections(wanted)
    check_page()
    options.check_folder(output)
    chosen = _recipe(recipe)
    made = None if patch is None else ThoughtPatch.from_pretrained(patch, offline=offline)
    subject: Any = made
    if made is None and any(part is not None for part in (instruction, demonstrations, system)):
        subject = options.read_instruction(instruction, demonstrations, system)
    if task is None and subject is None and examples is None and held_out is None:
        task = _TASK
    data: dict[str, Any] = options.pairs({
        "patch_or_instruction": subject, "examples": examples, "held_out": held_out, "outside": outside,
        "longer": longer, "unrelated": unrelated, "pool": pool, "paraphrases": paraphrase, "others": other,
        "instruction": None if made is None else instruction,
    })  # fmt: skip
    if task is not None:
        data = task_arguments(task, seed=seed, inputs=inputs) | data
    _check_data(data)
    told = instruction or _told(data["patch_or_instruction"])
    grader = scoring.read_scorer(scorer, told, device, offline, dtype=dtype, prompt_file=judge_prompt)
    place = options.patch_model(model_name or model, {} if made is None else made.provenance)
    options.check_layers(place, None if chosen is None else chosen.layers, offline)
    found, tokenizer = options.load_model(place, dtype, device, offline)
    if made is not None:
        made.check(found, tokenizer, mismatch=mismatch)
    with options.progress("evaluate") as progress:
        evaluation = run_evaluate(
            found, tokenizer, scorer=grader, sections=wanted, output=output, recipe=chosen, inputs=inputs,
            sweep_inputs=sweep_inputs, lora_steps=lora_steps, seed=seed,
            **options.prompting(separator, format, without), batch_size=batch_size,
            max_new_tokens=max_new_tokens or (64 if task is None else _TASK_TOKENS), minutes=minutes,
            announce=_announce, progress=progress, **data,
        )  # fmt: skip
    show(evaluation)
    options.out.print(f"report in {output / 'evaluation.html'}", markup=False, soft_wrap=True)
    if any(section.status == "failed" for section in evaluation.sections.values()):
        raise typer.Exit(1)


def _announce(plan: Any) -> None:
    """Prints what the report is expected to take, before it is made."""
    options.err.print(
        f"about {duration(plan.total)} and {plan.memory_mib / 1024:.1f} GiB of memory are expected, for {plan.inputs} "
        f"held-out inputs and {plan.swept} in sweeps",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if plan.left_out:
        options.err.print(f"not made: {', '.join(plan.left_out)}, too slow for these minutes", soft_wrap=True)
    slow = sorted(plan.seconds.items(), key=lambda item: -item[1])[:4]
    named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in slow)
    options.err.print(f"the longest sections: {named}", highlight=False, soft_wrap=True, style="dim")


def duration(seconds: float) -> str:
    """ "40 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _check_data(data: dict[str, Any]) -> None:
    if "patch_or_instruction" not in data:
        raise typer.BadParameter("give --patch, --instruction or --task")
    if "held_out" not in data:
        raise typer.BadParameter("give --held-out FILE.jsonl, the inputs to measure on, or --task")


def show(evaluation: Any) -> None:
    """Prints the verdict, and what did not finish."""
    from thought_kernels.evaluation.figures.verdict import summary

    options.out.print(Text(summary(evaluation.verdict), style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for line in evaluation.verdict:
        table.add_row(Text(line.status, style=_COLOURS[line.status]), Text(f"{line.question} {line.answer}"))
    options.out.print(table)
    for sentence in evaluation.warnings:
        options.show_warning(sentence)
    for section in evaluation.sections.values():
        if section.error:
            options.show_warning(f"section {section.name} did not finish: {section.error}")
    options.out.print(f"{evaluation.seconds:.0f} s", style="dim")


def _recipe(text: str | None) -> Recipe | None:
    if text is None:
        return None
    try:
        options_given = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--recipe must be JSON, got {text!r}; {error}") from None
    if not isinstance(options_given, dict):
        raise typer.BadParameter(f"--recipe must be a JSON object, got {text!r}")
    try:
        return Recipe.from_dict(options_given)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"--recipe must have options that transmute takes, got {text!r}; {error}") from error


def _told(subject: Any) -> str:
    """The instruction in words, for a judge's prompt."""
    if not isinstance(subject, str):
        subject = getattr(subject, "provenance", {}).get("instruction", subject)
    return subject if isinstance(subject, str) else json.dumps(subject, ensure_ascii=False, default=str)
