"""`thought-kernels tokens`: how a prompt is split into H, I and e, and what stands before e on the other side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from thought_kernels.cli import options

_COLOURS = {"H": "cyan", "I": "magenta", "I°": "yellow", "e": "green"}
_MEANING = {
    "H": "before the instruction",
    "I": "the instruction, transmuted",
    "I°": "in its place on the other side",
    "e": "after it; with and without the instruction the same",
}
_PREFIXES = {"with": ("H", "I"), "without": ("H", "I°")}


def tokens(
    example: Annotated[str, typer.Option("--example", "-e", help="The user's text.")],
    instruction: options.RequiredInstruction = None,
    completion: Annotated[
        str | None, typer.Option(help="The answer; without it e ends where the model would write.")
    ] = None,
    demonstrations: options.Demonstrations = None,
    system: options.System = None,
    model: options.Model = options.DEFAULT_MODEL,
    separator: options.Separator = options.DEFAULT_SEPARATOR,
    without: options.Without = None,
    format: options.Format = None,
    offline: options.Offline = False,
) -> None:
    """Print a prompt as H | I | e with token ids and both prefixes of e, or say why it does not align."""
    from thought_kernels.models.load import context_length
    from thought_kernels.prompts.examples import read_example
    from thought_kernels.prompts.instruction import begins_with
    from thought_kernels.prompts.prompt import explain

    told = options.read_instruction(instruction, demonstrations, system)
    tokenizer = options.load_tokenizer(model, offline)
    given, prompting = options.with_completion(example, completion), options.prompting(separator, format, without)
    rows = explain(tokenizer, told, given, **prompting)
    limit, length = context_length(model, offline=offline), rows[-1].position + 1
    if limit is not None and length > limit:
        raise ValueError(
            f"tokens: example must fit the model's context of {limit} tokens, got {length} with the instruction; "
            "shorten it"
        )
    table = Table(box=None, pad_edge=False)
    for name, side in (("part", "left"), ("position", "right"), ("id", "right"), ("token", "left"), ("", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    previous = ""
    for row in rows:
        shown = row.token.replace("\n", "\\n").replace("\t", "\\t")
        table.add_row(
            Text(row.part if row.part != previous else "", style=f"bold {_COLOURS[row.part]}"), str(row.position),
            str(row.token_id), Text(shown, style=_COLOURS[row.part]), "completion" if row.answer else "",
        )  # fmt: skip
        previous = row.part
    options.out.print(table)
    options.out.print()
    for part, meaning in _MEANING.items():
        ids = [row.token_id for row in rows if row.part == part]
        if part == "I°" and not ids:
            continue
        line = Text.assemble((part, f"bold {_COLOURS[part]}"), f"  {len(ids):>3} tokens  {meaning}: {ids}")
        options.out.print(line, soft_wrap=True)
    for side, parts in _PREFIXES.items():
        ids = [row.token_id for row in rows if row.part in parts]
        line = Text.assemble((f"{side:<7}", "bold"), f"  {len(ids):>3} tokens stand before e: {ids}")
        options.out.print(line, soft_wrap=True)
    if begins_with(told, options.unescaped(separator), read_example(given, "tokens: example")):
        options.show_warning(
            "tokens: example should be without the instruction, got one that begins with it; a patch stands for an "
            "instruction that is not in the prompt"
        )
