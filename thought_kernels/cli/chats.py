"""`thought-kernels chats`: inputs as later turns of chats that the prompted model has answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from thought_kernels.cli import options


def chats(
    output: Annotated[Path, typer.Option("--output", "-o", help="File of chats, jsonl; replaces one that is there.")],
    instruction: options.RequiredInstruction = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="File of texts, prompts and completions, or messages: txt, csv, json, jsonl. Without it and "
            "--example: everyday requests."
        ),
    ] = None,
    example: options.ExampleTexts = None,
    demonstrations: options.Demonstrations = None,
    system: options.System = None,
    turns: Annotated[int, typer.Option(min=2, help="Of the longest chats.")] = 3,
    model: options.Model = options.DEFAULT_MODEL,
    separator: options.Separator = options.DEFAULT_SEPARATOR,
    format: options.Format = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    offline: options.Offline = False,
) -> None:
    """Write inputs, and chats that ask them in later turns, for a patch that holds there: transmute --examples OUTPUT.

    The earlier turns are other inputs, with the answers of the model that is told the instruction.
    """
    from thought_kernels.evaluation.records.files import write_text
    from thought_kernels.fitting.chats import write_chats
    from thought_kernels.prompts.examples import load_examples

    told = options.read_instruction(instruction, demonstrations, system)
    given = options.given_inputs(examples, example, model)
    options.check_file("--output", output)
    if output.suffix != ".jsonl":
        raise typer.BadParameter(f"--output must end in .jsonl, as which transmute reads it, got {output}")
    replaced = output.exists()
    if examples is not None and replaced and output.samefile(examples):
        raise typer.BadParameter(f"--output must be another file than --examples, got {output} for both")
    inputs = None if given is None else len(load_examples(given))
    found, tokenizer = options.load_model(model, dtype, device, offline)
    written = write_chats(
        found, tokenizer, told, given, turns=turns, **options.prompting(separator, format), batch_size=batch_size,
        max_new_tokens=max_new_tokens, progress=options.err.is_terminal,
    )  # fmt: skip
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in written]
    write_text("".join(lines), output)
    turns_of = [sum(message["role"] == "user" for message in chat) for chat in written]
    later = sum(count > 1 for count in turns_of) if inputs is None else len(written) - inputs
    options.out.print(f"{len(written) - later} inputs and {later} chats of up to {max(turns_of)} turns", markup=False)
    options.saved(output, "file", replaced=replaced)
