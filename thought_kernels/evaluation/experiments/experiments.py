"""The paper's experiments on any model: addition, multiplication, translation, as curves over the number of examples.

Four lines on the same axes:

    paper      Algorithm 1 with the published c1 and c2, the constant divisor 300, rows divided by ‖a‖, on the
               dataset's own answers
    tuned      the same with c1 chosen for this model on inputs that nothing else is measured on (c2 in proportion)
    residual   as tuned, with the other reading of the paper's a: the stream before the MLP's norm (paper_recipe)
    default    transmute as a user calls it, on inputs alone and with its defaults: it writes further inputs and all
               answers itself. Only format, batch_size and where answers are cut are given

The paper's blocks 10..19 of 26 become the same share of another model's depth (curves.paper_layers). A step is an
example, as in Algorithm 1. Every point is measured on the same inputs, where the paper drew ten anew at each step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thought_kernels.evaluation.experiments.curves import default_steps, paper_steps
from thought_kernels.evaluation.experiments.measured import Measured
from thought_kernels.evaluation.experiments.pairs import Split, check_context
from thought_kernels.evaluation.experiments.published import LINES, PUBLISHED, READINGS, check_lines
from thought_kernels.evaluation.experiments.results import ExperimentReport, write_results
from thought_kernels.evaluation.measures.scorers import as_scorer
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.evaluation.rivals.paper import PAPER_DIVISOR, paper_layers
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.models.decoder import Decoder
from thought_kernels.prompts.prompt import Instruction
from thought_kernels.version import __version__


def run_experiment(
    model: Any,
    tokenizer: Any,
    name: str,
    data: Split,
    output: Path,
    *,
    instruction: Instruction | None = None,
    format: str | None = None,
    c1: float | None = None,
    c2: float | None = None,
    layers: Iterable[int] | None = None,
    lines: Sequence[str] | None = None,
    points: Sequence[int] | None = None,
    default_points: Sequence[int] | None = None,
    match: Any = "exact",
    max_new_tokens: int = 64,
    batch_size: int = 128,
    progress: bool = False,
) -> ExperimentReport:
    """Runs one of the paper's experiments and writes results.json, points.csv, samples.csv and answers.csv.

    A run that was stopped goes on from journal.jsonl in the same folder, which may be given other points too.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        name: of PUBLISHED.
        data: pairs; as many steps as there are pairs to fit on. A pair may be there several times.
        output: folder of the results.
        instruction, c1, c2: None for the published ones; the instruction as transmute takes it.
        format: of a turn; None for the chat template.
        layers: 0-based blocks of the paper's recipe, None for paper_layers.
        lines: which of LINES to measure, None for all that the model can have.
        points: steps at which the paper's lines are measured, None for paper_steps.
        default_points: the same of the default line, None for default_steps.
        match: what as_scorer takes.
        max_new_tokens: where answers are cut.
        batch_size: inputs at a time.
        progress: show a bar on stderr.

    Returns:
        An ExperimentReport.

    Raises:
        ValueError: an unknown name or line, points that are no increasing numbers of steps, constants or blocks that
            the paper's recipe cannot have, a pair longer than the model's context, or a folder with results of other
            settings.

    Source: "Transmuting prompts into weights", §4.1 to §4.3, Figures 1 and 2, Tables 1 to 3.
    """
    if name not in PUBLISHED:
        raise ValueError(f"experiment: name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    if lines is not None:
        check_lines(lines)
    published, count = PUBLISHED[name], len(data.fit)
    told = published.instruction if instruction is None else instruction
    steps = dict.fromkeys(READINGS, paper_steps(count) if points is None else _checked("points", points, count))
    steps["default"] = (
        default_steps(count) if default_points is None else _checked("default_points", default_points, count)
    )
    decoder = describe(model)
    model, blocks = decoder.model, len(decoder.blocks)  # a compiled one would be compiled anew for each patch
    chosen = sorted(paper_layers(blocks) if layers is None else layers)
    lines = _lines(decoder, chosen, lines)
    if set(lines) - {"default"}:  # nothing is measured for numbers or blocks that the recipe would refuse
        published.recipe(c1, c2, chosen).for_model(decoder)
    c1, c2 = published.constants(c1, c2)
    check_context(model, tokenizer, told, [*data.fit, *data.validation, *data.fresh], format)
    settings = {
        "experiment": name, "instruction": told, "format": format, "c1": c1, "c2": c2, "divisor": PAPER_DIVISOR,
        "layers": chosen, "blocks": blocks, "steps": count, "distinct": len({pair.question for pair in data.fit}),
        "validation": len(data.validation), "inputs": len(data.fresh), "data": data_hash(data),
        "match": as_scorer(match).name, "max_new_tokens": max_new_tokens, "model": _model_name(model),
        "weights": fingerprint(model), "transmute_defaults": transmute_defaults(), "version": __version__,
    }  # fmt: skip
    journal = Journal(output / "journal.jsonl", settings)
    options = {"match": match, "format": format, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with tqdm(desc=name, unit="point", disable=not progress, leave=False) as bar:
        run = Measured(model, tokenizer, data, journal, settings, options, bar)
        found, answers = run.lines([line for line in LINES if line in lines], steps)
    levels = run.levels
    report = ExperimentReport(
        name, published.source, levels["prompted"], levels["base"], len(data.fresh), found, published.sampled,
        settings, answers,
    )  # fmt: skip
    write_results(report, output)
    return report


def _checked(name: str, points: Sequence[int], count: int) -> list[int]:
    if not points or sorted(set(points)) != list(points) or not 1 <= points[0] <= points[-1] <= count:
        raise ValueError(
            f"experiment: {name} must be increasing numbers from 1 to {count}, the pairs to fit on, got "
            f"{list(points)}; sort them, or give more pairs"
        )
    return list(points)


def _lines(decoder: Decoder, layers: Sequence[int], lines: Sequence[str] | None) -> Sequence[str]:
    """The lines to measure: those that were asked for, which the model must be able to have, or all that it can."""
    beside = [layer for layer in layers if decoder.blocks[layer].parallel]
    if lines is None:
        return [line for line in LINES if line != "residual" or not beside]
    if "residual" in lines and beside:
        raise ValueError(
            "experiment: lines must be without residual where the MLP reads the block's own input, beside attention "
            f"and not after it, as at block {beside[0]}, got {', '.join(lines)}; leave residual out"
        )
    return lines


def _model_name(model: Any) -> str:
    """A hub id, or the name of a folder without where it lies, so that results can be handed on."""
    name = str(getattr(model.config, "_name_or_path", ""))
    return Path(name).name if Path(name).is_dir() else name


def transmute_defaults() -> dict[str, Any]:
    """The defaults of transmute's options, the recipe's and the others, as JSON values: what results depend on.

    Rows on disk are told apart by these. `mlp_activation` is left out, since none of the default sites has it, and so
    is what decides how a run goes and not what comes out.
    """
    aside = ("mlp_activation", "progress", "bad_examples", "checkpoint", "distributed")
    return {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(transmute).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in aside
    }
