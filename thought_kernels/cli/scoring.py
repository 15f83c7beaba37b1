"""What grades answers on the command line: a scorer's name, or judge:MODEL, a language model that grades."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thought_kernels.cli import options
from thought_kernels.evaluate.scorers import Judge, Scorer, as_scorer

Match = Annotated[
    str | None,
    typer.Option(
        help="exact, contains, regex:PATTERN, module:function, or judge:MODEL, a folder or hub id that grades as the "
        "paper's remote judge did (default exact for the shipped checkpoint, contains for others)",
        show_default=False,
    ),
]


def chosen_match(match: str | None, model: str) -> str:
    """The name that was given, or the default for the model."""
    return match or ("exact" if model == options.DEFAULT_MODEL else "contains")


def read_scorer(match: str, instruction: str, device: str, offline: bool) -> Scorer:
    """A scorer by its name; the judge's model is loaded, on the same device."""
    kind, _, name = match.partition(":")
    if kind != "judge":
        return as_scorer(match)
    judge, tokenizer = options.load_model(name, "auto", device, offline)
    return Judge(judge, tokenizer, instruction)


def check_folder(output: Path) -> None:
    """Raises BadParameter unless a folder is there or can be made there."""
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"--output must be a folder, got the file {output}")


def answer_room(tokenizer: Any, answers: list[str], match: str) -> int:
    """How many tokens answers may have: a little more than the longest right one, 96 for a model that reasons first."""
    longest = max(map(len, tokenizer(answers, add_special_tokens=False).input_ids)) + 8
    return longest if match == "exact" else max(96, 2 * longest)
