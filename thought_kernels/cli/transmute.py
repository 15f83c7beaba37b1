"""`thought-kernels transmute`: an instruction and examples to a patch folder."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from thought_kernels.cli import options
from thought_kernels.fitting.recipe import Recipe, paper_recipe
from thought_kernels.fitting.transmute import transmute as run_transmute
from thought_kernels.patches.storage import RECORD_FILE

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(run_transmute).parameters.items()}


def _help(name: str, text: str, none: str = "all") -> str:
    """The option's help with transmute's own default, so that the two cannot drift apart; `none` says what None is."""
    default = _DEFAULTS[name]
    return f"{text} (default {none if default is None else default})"


def transmute(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the patch; replaces one that is there.")],
    instruction: options.RequiredInstruction = None,
    examples: options.Examples = None,
    example: options.ExampleTexts = None,
    demonstrations: options.Demonstrations = None,
    system: options.System = None,
    model: options.Model = options.DEFAULT_MODEL,
    recipe: Annotated[
        str, typer.Option(help="default, or paper (Algorithm 1); the options below change either.")
    ] = "default",
    c1: Annotated[float | None, typer.Option(help="Matrix scale of the paper's recipe.")] = None,
    c2: Annotated[float | None, typer.Option(help="Vector scale of the paper's recipe.")] = None,
    steps: Annotated[int | None, typer.Option(help="Constant divisor of the paper's recipe.")] = None,
    layers: Annotated[
        str | None, typer.Option(help=_help("layers", "0-based block indices, such as 10-19 or 0,3,5-7."))
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help=_help("sites", "attention, mlp, down, residual; may be repeated.", "attention,down")),
    ] = None,
    pairing: Annotated[str | None, typer.Option(help=_help("pairing", "two_pass, layerwise or sequential."))] = None,
    estimator: Annotated[
        str | None, typer.Option(help=_help("estimator", "mean, exact, ridge, second_order or affine."))
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help=_help("normalization", "none, norm or squared_norm."))
    ] = None,
    mlp_activation: Annotated[
        str | None, typer.Option(help=_help("mlp_activation", "What a is at the mlp site, input or residual."))
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help=_help("scale", "A number, or one per site: mlp=0.5,residual=0.1."))
    ] = None,
    ridge: Annotated[float | None, typer.Option(help=_help("ridge", "In units of the Gram's mean eigenvalue."))] = None,
    tokens: Annotated[str | None, typer.Option(help=_help("tokens", "Which tokens are summed, all or answer."))] = None,
    header_weight: Annotated[
        float | None, typer.Option(help=_help("header_weight", "Weight of the header's rows."))
    ] = None,
    text_weight: Annotated[
        float | None, typer.Option(help=_help("text_weight", "Weight of ordinary text, to be left as it is."))
    ] = None,
    separator: options.Separator = options.DEFAULT_SEPARATOR,
    without: options.Without = None,
    format: options.Format = None,
    batch_size: Annotated[int | None, typer.Option(help=_help("batch_size", "Examples at a time."))] = None,
    memory_budget: Annotated[
        int | None, typer.Option(help=_help("memory_budget", "Bytes of hidden states kept in memory."))
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=_help("max_new_tokens", "Longest generated completion."))
    ] = None,
    written_inputs: Annotated[
        int | None, typer.Option(help=_help("written_inputs", "Inputs that the model writes beside the examples."))
    ] = None,
    completions: Annotated[
        int | None, typer.Option(help=_help("completions", "Answers written for an example without one."))
    ] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed", "Of the answers that are drawn."))] = None,
    bad_examples: Annotated[
        str | None, typer.Option(help=_help("bad_examples", "stop at an example that cannot be read, or skip it."))
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Turn an instruction into a patch, and save it.

    Examples are inputs. Where one has no completion the model writes some, with the instruction in its prompt. Where
    none has, it writes further inputs too. Until the patch is saved OUTPUT/checkpoint holds what is done: the same
    command goes on from there.
    """
    from thought_kernels.prompts.bad_examples import BadExamples
    from thought_kernels.prompts.examples import read_examples

    told = options.read_instruction(instruction, demonstrations, system)
    given = options.given_inputs(examples, example, model)
    options.check_folder(output)
    chosen = replace(_recipe(recipe, options.pairs({"c1": c1, "c2": c2, "steps": steps})), **options.pairs({
        "layers": None if layers is None else options.read_layers(layers),
        "sites": site and tuple(options.listed(site)), "pairing": pairing, "estimator": estimator,
        "normalization": normalization, "mlp_activation": mlp_activation,
        "scale": None if scale is None else read_scale(scale), "ridge": ridge,
        "tokens": tokens, "header_weight": header_weight, "text_weight": text_weight,
        "written_inputs": written_inputs, "completions": completions,
    }))  # fmt: skip
    portions = options.pairs({
        "batch_size": batch_size, "memory_budget": memory_budget, "max_new_tokens": max_new_tokens, "seed": seed,
        "bad_examples": bad_examples,
    })  # fmt: skip
    bad = BadExamples(bad_examples or "stop")
    if examples is not None and not read_examples(examples, bad) and not example:  # before the model is loaded
        bad.sentence(0)
    options.check_layers(model, chosen.layers, offline)
    replaced = (output / RECORD_FILE).exists()
    found, tokenizer = options.load_model(model, dtype, device, offline)
    patch = run_transmute(
        found,
        tokenizer,
        told,
        given,
        **options.prompting(separator, format, without),
        progress=options.err.is_terminal,
        checkpoint=output / "checkpoint",
        **portions,
        **chosen,
    )
    patch.save_pretrained(output)
    shutil.rmtree(output / "checkpoint", ignore_errors=True)
    options.out.print(str(patch), markup=False, soft_wrap=True)
    options.saved(output, "patch", replaced=replaced)


def _recipe(name: str, constants: dict[str, Any]) -> Recipe:
    if name == "paper":
        return paper_recipe(**constants)
    if name != "default":
        raise typer.BadParameter(f"--recipe must be default or paper, got {name!r}")
    if constants:
        raise typer.BadParameter(f"--{next(iter(constants))} belongs to --recipe paper")
    return Recipe()


def read_scale(text: str) -> float | dict[str, float]:
    """ "0.5" to 0.5, "mlp=0.5,residual=0.1" to a dict."""
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (part.split("=") for part in options.listed([text]))}
    except ValueError:
        raise typer.BadParameter(f"--scale must be a number, or site=number,..., got {text!r}") from None
