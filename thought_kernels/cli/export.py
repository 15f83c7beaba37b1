"""`thought-kernels export`: a patch in a format that other programs read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from thought_kernels.cli import options

_STAND_INS = 16  # of the inputs that the model wrote for the fit, where none are given to measure on


class _Choices(NamedTuple):
    """What may be lost, and how it is written."""

    rank: int | None
    energy: float | None
    fold: bool
    drop: bool
    pad: bool
    max_shard_size: str

    @property
    def lora(self) -> dict[str, Any]:
        """The losses that LoRA formats know."""
        return {"rank": self.rank, "energy": self.energy, "fold": self.fold, "drop": self.drop}


class _Written(NamedTuple):
    """An export: what wrote it returned, what is measured in its place, and lines about it."""

    result: Any
    measured: Any
    lines: list[tuple[str, str]]


class _Format(NamedTuple):
    """How one format is written: the file that shows that one is there, the options it takes, and the writer."""

    file: str
    takes: set[str]
    write: Callable[[Any, Path, Any, Any, _Choices], _Written]


def export(
    patch: Annotated[Path, typer.Argument(help="A folder written by transmute.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the export; one there is replaced, but merged wants an empty folder."
        ),
    ],
    model: options.PatchModel = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format", "-f",
            help="peft: a LoRA folder, for peft, transformers and vLLM. merged: a checkpoint of the patched model. "
            "gguf-lora, gguf-vector: an adapter or a control vector for llama.cpp.",
        ),
    ] = "peft",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest LoRA rank; accepts the loss of the rest (default each Δ's own).")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of each ‖Δ‖² that is kept; accepts the loss of the rest.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Approximate vectors by matrices where no bias can hold them.")
    ] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what the format cannot carry.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad", help="One rank for all modules, padded with zeros, as llama.cpp's converter needs.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of a merged checkpoint.")] = "5GB",
    scale: Annotated[float, typer.Option(help="Multiplies the patch.")] = 1.0,
    example: Annotated[
        list[str] | None,
        typer.Option("--example", "-e", help="A user text to measure the loss on; may be repeated."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="File of such texts, as transmute takes: txt, csv, json, jsonl (default: inputs that the model wrote "
            "for the fit, or the instruction)."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer measured on.")] = 64,
    mismatch: options.Mismatch = "warn",
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:  # fmt: skip
    """Export a patch; what the format cannot carry is refused, or left out once its loss is accepted.

    The loss is measured on prompts like those that the patch was fitted to be given.
    """
    from thought_kernels.evaluation.measures.export_loss import loss_prompts
    from thought_kernels.patches.patch import ThoughtPatch
    from thought_kernels.prompts.examples import load_examples

    chosen = _chosen(format_name)
    choices = _Choices(rank, energy, fold, drop, pad, max_shard_size)
    _check(format_name, chosen, choices)
    options.check_folder(output)
    loaded = scale * ThoughtPatch.from_pretrained(patch, offline=offline)
    questions = list(example or [])
    if examples is not None:
        questions += [found.messages[-1]["content"] for found in load_examples(examples)]
    replaced = (output / chosen.file).exists()
    found, tokenizer = options.load_model(options.patch_model(model, loaded.provenance), dtype, device, offline)
    loaded.check(found, tokenizer, mismatch=mismatch)
    asked = questions or _stand_ins(loaded)
    accepts = questions or any((fold, drop, rank is not None, energy is not None))
    try:  # not after the export is there
        loss_prompts(found, tokenizer, loaded, asked)
        unmeasured = ""
    except ValueError as error:
        if accepts:
            raise
        unmeasured = f"not measured: {error}"
    written = chosen.write(loaded, output, found, tokenizer, choices)
    loss = unmeasured or _loss(found, tokenizer, loaded, written.measured, asked, max_new_tokens)
    if not (questions or unmeasured):
        loss += "; give --example or --examples for inputs of your own"
    _show([*_lost(written.result, len(loaded.entries)), ("loss", loss), *written.lines])
    options.saved(output, "export", replaced=replaced)


def _chosen(name: str) -> _Format:
    if name not in FORMATS:
        raise typer.BadParameter(f"--format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _check(name: str, chosen: _Format, choices: _Choices) -> None:
    """Refuses options that a format has no use for."""
    for option, default in _Choices(None, None, False, False, False, "5GB")._asdict().items():
        if getattr(choices, option) != default and option not in chosen.takes:
            raise typer.BadParameter(f"--{option.replace('_', '-')} is of no use with --format {name}")


def _peft(patch: Any, output: Path, model: Any, tokenizer: Any, choices: _Choices) -> _Written:
    result = patch.export_peft(output, model, pad=choices.pad, progress=options.err.is_terminal, **choices.lora)
    return _Written(result, _as_patch(patch, result), [("vLLM", result.vllm)])


def _merged(patch: Any, output: Path, model: Any, tokenizer: Any, choices: _Choices) -> _Written:
    result = patch.export_merged(
        output, model, tokenizer, fold=choices.fold, drop=choices.drop, max_shard_size=choices.max_shard_size
    )
    again, _ = options.load_model(str(output), device=str(model.device))  # what is measured is what was written
    return _Written(result, again, [("files", str(result.shards))])


def _gguf_lora(patch: Any, output: Path, model: Any, tokenizer: Any, choices: _Choices) -> _Written:
    result = patch.export_gguf_lora(output / _ADAPTER, model, progress=options.err.is_terminal, **choices.lora)
    return _Written(result, _as_patch(patch, result), [("llama.cpp", result.llama_cpp)])


def _gguf_vector(patch: Any, output: Path, model: Any, tokenizer: Any, choices: _Choices) -> _Written:
    result = patch.export_control_vector(output / _VECTOR, model, drop=choices.drop)
    return _Written(result, _as_patch(patch, result), [("llama.cpp", result.llama_cpp)])


_ADAPTER, _VECTOR = "adapter.gguf", "control_vector.gguf"
_LORA = {"rank", "energy", "fold", "drop"}
FORMATS = {
    "peft": _Format("adapter_config.json", _LORA | {"pad"}, _peft),
    "merged": _Format("config.json", {"fold", "drop", "max_shard_size"}, _merged),
    "gguf-lora": _Format(_ADAPTER, _LORA, _gguf_lora),
    "gguf-vector": _Format(_VECTOR, {"drop"}, _gguf_vector),
}


def _as_patch(patch: Any, result: Any) -> Any:
    from thought_kernels.patches.patch import ThoughtPatch

    return ThoughtPatch(result.entries, patch.provenance)


def _lost(result: Any, sites: int) -> Iterable[tuple[str, str]]:
    """What was written and what was not, as far as numbers of the patch itself say."""
    if ranks := getattr(result, "ranks", None):
        lowest, highest = min(ranks.values()), max(ranks.values())
        yield "modules", str(len(ranks))
        yield "rank", str(highest) if lowest == highest else f"{lowest} to {highest}"
    if cut := getattr(result, "truncation", None):
        yield "truncated", f"{len(cut)} of {sites} sites, at worst by {max(cut.values()):.2g} of ‖Δ‖"
    if folds := getattr(result, "fold_residuals", None):
        yield "vectors folded", _folds(list(folds.values()))
    if dropped := result.dropped:
        named = ", ".join(f"block {layer} {site}" for layer, site in dropped[:3])
        yield "left out", f"{len(dropped)} of {sites} sites: {named}{' and others' * (len(dropped) > 3)}"


def _folds(residuals: list[float | None]) -> str:
    known = [residual for residual in residuals if residual is not None]
    if not known:
        return f"{len(residuals)}, error on the fitted rows unknown"
    return f"{len(residuals)}, relative squared error on the fitted rows at worst {max(known):.2g}"


def _stand_ins(patch: Any) -> list[str]:
    """What a loss is measured on where no input is given."""
    written = patch.provenance.get("written_inputs")
    if isinstance(written, list) and all(isinstance(text, str) for text in written) and written:
        return written[:_STAND_INS]
    told = patch.provenance.get("instruction")
    return [told if isinstance(told, str) else "Hello"]


def _loss(model: Any, tokenizer: Any, patch: Any, exported: Any, questions: list[str], max_new_tokens: int) -> str:
    from thought_kernels.evaluation.measures.export_loss import export_loss

    found = export_loss(model, tokenizer, patch, exported, questions, max_new_tokens=max_new_tokens)
    where = f"{len(questions)} inputs" if len(questions) > 1 else repr(questions[0])
    return (
        f"{found.patched / found.tokens:.3g} nats per token of the patched answers, where having no patch costs "
        f"{found.bare / found.tokens:.3g}: {100 * found.recovered:.2f} % kept (on {where})"
    )


def _show(rows: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*row)
    options.out.print(table, soft_wrap=True)
