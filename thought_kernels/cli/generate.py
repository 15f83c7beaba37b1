"""`thought-kernels generate`: what a patched model answers, beside the bare and the prompted one."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The user's text.")],
    patch: Annotated[
        list[Path] | None, typer.Option(help="A folder written by transmute; several are added.", show_default=False)
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the patch.")] = 1.0,
    compare: Annotated[bool, typer.Option("--compare", help="Show the bare and the prompted answer too.")] = False,
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-i", help="For --compare; the patch's own if not given.")
    ] = None,
    model: options.PatchModel = None,
    format: options.Format = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    mismatch: options.Mismatch = "warn",
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Answer a prompt greedily, with a patch or several if they are given."""
    from thought_kernels.evaluation.measures.trial import bare_texts, prompted_texts
    from thought_kernels.patches.patch import ThoughtPatch
    from thought_kernels.prompts.examples import read_messages

    patches = [ThoughtPatch.from_pretrained(folder, offline=offline) for folder in patch or ()]
    loaded = scale * functools.reduce(operator.add, patches) if patches else None
    provenance = {} if loaded is None else loaded.provenance
    told = instruction if instruction is not None else provenance.get("instruction")
    if compare and not told:
        raise typer.BadParameter("--compare needs a patch that knows its instruction, or --instruction")
    found, tokenizer = options.load_model(options.patch_model(model, provenance), dtype, device, offline)
    if loaded is not None:
        loaded.check(found, tokenizer, mismatch=mismatch)
    written: dict[str, Any] = {
        "format": provenance.get("format") if format is None else options.unescaped(format),
        "max_new_tokens": max_new_tokens,
    }
    other, separator = provenance.get("without"), provenance.get("separator", "\n")

    def answer(instruction: Any) -> str:
        if instruction is None:
            return bare_texts(found, tokenizer, [prompt], **written)[0]
        return prompted_texts(found, tokenizer, instruction, [prompt], separator=separator, **written)[0]

    answers: dict[str, str] = {}
    if compare and told:
        answers["bare"], answers["prompted"] = answer(other), answer(told)
    if loaded is not None:
        with loaded.applied(found):
            answers["patched"] = answer(other)  # a patch is made for the prompt that it was compared with
    elif not compare:
        answers["bare"] = answer(None)
    if not compare:
        options.out.print(next(iter(answers.values())), markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, text in answers.items():
        table.add_row(Text(name, style="bold"), Text(text))
    if other is not None:
        told_instead = (
            other
            if isinstance(other, str)
            else " / ".join(turn["content"] for turn in read_messages(other, "generate: without"))
        )
        table.add_row(Text("told", style="dim"), Text(f"bare and patched: {told_instead!r}", style="dim"))
    options.out.print(table)
