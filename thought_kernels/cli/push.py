"""`thought-kernels push`: a patch folder as a repository of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from thought_kernels.cli import options


def push(
    patch: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A folder written by transmute.")],
    repository: Annotated[str, typer.Argument(help="owner/name; made if there is none.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="evaluation.json of the evaluate command, for the model card."),
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
) -> None:
    """Share a patch on the Hugging Face hub, with the folder's model card or, given an evaluation, a new one.

    Log in before with `hf auth login`. The instruction, and the inputs that the model wrote, go along.
    """
    from thought_kernels.patches.card import CARD_FILE
    from thought_kernels.patches.patch import ThoughtPatch

    told = None if evaluation is None else _read(evaluation)
    own = patch / CARD_FILE
    card = own.read_text(encoding="utf-8") if told is None and own.exists() else None
    address = ThoughtPatch.from_pretrained(patch).push_to_hub(repository, evaluation=told, card=card, private=private)
    options.out.print(f"pushed to {address}", markup=False, soft_wrap=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"--evaluation must be a JSON file, got {path}; {error}") from error
