"""`thought-kernels export`: a patch in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from thought_kernels.cli import options

FORMATS = ("peft",)


def export(
    patch: Annotated[Path, typer.Argument(help="A folder written by transmute.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the export; replaces one that is there.")],
    model: options.PatchModel = None,
    format_name: Annotated[
        str, typer.Option("--format", "-f", help="peft: a LoRA folder, for peft, transformers and vLLM.")
    ] = "peft",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest LoRA rank; accepts the loss of the rest (default each Δ's own).")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Approximate vectors by matrices where no bias can hold them.")
    ] = False,
    pad: Annotated[
        bool, typer.Option("--pad", help="One rank for all modules, padded with zeros, as llama.cpp needs.")
    ] = False,
    scale: Annotated[float, typer.Option(help="Multiplies the patch.")] = 1.0,
    example: Annotated[
        list[str] | None,
        typer.Option("--example", "-e", help="A user text to measure the loss on; may be repeated."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="File of such texts, as transmute takes: txt, csv, json, jsonl (default, where something is lost: "
            "the instruction)."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer measured on.")] = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Export a patch; what the format cannot carry is refused, or measured once its loss is accepted.

    The loss is measured on prompts like those that the patch was fitted to be given.
    """
    from thought_kernels.evaluation.measures.export_loss import loss_prompts
    from thought_kernels.patches.export import CONFIG_FILE
    from thought_kernels.patches.patch import ThoughtPatch
    from thought_kernels.prompts.examples import load_examples

    if format_name not in FORMATS:
        raise typer.BadParameter(f"--format must be {' or '.join(FORMATS)}, got {format_name!r}")
    options.check_folder(output)
    loaded = scale * ThoughtPatch.from_pretrained(patch)
    questions = list(example or [])
    if examples is not None:
        questions += [found.messages[-1]["content"] for found in load_examples(examples)]
    replaced = (output / CONFIG_FILE).exists()
    found, tokenizer = options.load_model(options.patch_model(model, loaded.provenance), dtype, device, offline)
    if questions or rank is not None or fold:  # a loss may have to be measured: not after the folder is there
        loss_prompts(found, tokenizer, loaded, questions or [_stand_in(loaded)])
    written = loaded.export_peft(output, found, rank=rank, fold=fold, pad=pad, progress=options.err.is_terminal)

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("modules", str(len(written.ranks)))
    lowest = min(written.ranks.values())
    table.add_row("rank", str(written.rank) if lowest == written.rank else f"{lowest} to {written.rank}")
    if written.truncation:
        worst = max(written.truncation.values())
        table.add_row("truncated", f"{len(written.truncation)} of {len(written.entries)} sites, at worst by {worst:.2g}"
                                   " of ‖Δ‖")  # fmt: skip
    if written.fold_residuals:
        table.add_row("vectors folded", _folds(list(written.fold_residuals.values())))
    if written.lossy or questions:
        table.add_row("loss", _loss(found, tokenizer, loaded, written.entries, questions, max_new_tokens))
    table.add_row("vLLM", written.vllm)
    options.out.print(table, soft_wrap=True)
    options.saved(output, "adapter", replaced=replaced)


def _folds(residuals: list[float | None]) -> str:
    known = [residual for residual in residuals if residual is not None]
    if not known:
        return f"{len(residuals)}, error on the fitted rows unknown"
    return f"{len(residuals)}, relative squared error on the fitted rows at worst {max(known):.2g}"


def _stand_in(patch: Any) -> str:
    """What a loss is measured on where no input is given."""
    told = patch.provenance.get("instruction")
    return told if isinstance(told, str) else "Hello"


def _loss(
    model: Any, tokenizer: Any, patch: Any, entries: Any, questions: list[str], max_new_tokens: int
) -> str:  # fmt: skip
    from thought_kernels.evaluation.measures.export_loss import export_loss
    from thought_kernels.patches.patch import ThoughtPatch

    where = f"{len(questions)} inputs"
    if not questions:
        questions = [_stand_in(patch)]
        where = f"{questions[0]!r}; give --example or --examples for inputs of your own"
    exported = ThoughtPatch(entries, patch.provenance)
    found = export_loss(model, tokenizer, patch, exported, questions, max_new_tokens=max_new_tokens)
    return (
        f"{found.patched / found.tokens:.3g} nats per token of the patched answers, where the patch itself does "
        f"{found.bare / found.tokens:.3g}: {100 * found.recovered:.2f} % kept (on {where})"
    )
