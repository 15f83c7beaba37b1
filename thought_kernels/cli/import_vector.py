"""`thought-kernels import`: a control vector that another program wrote, as a patch folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thought_kernels.cli import options


def import_vector(
    file: Annotated[Path, typer.Argument(help="A GGUF control vector, of repeng or llama.cpp's cvector-generator.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the patch; replaces one that is there.")],
    scale: Annotated[float, typer.Option(help="Multiplies the vectors: the strength they are used with.")] = 1.0,
) -> None:
    """Turn a control vector into a patch, and save it."""
    from thought_kernels.patches.patch import ThoughtPatch
    from thought_kernels.patches.storage import RECORD_FILE

    options.check_folder(output)
    patch = scale * ThoughtPatch.from_control_vector(file)
    replaced = (output / RECORD_FILE).exists()
    patch.save_pretrained(output)
    options.out.print(str(patch), markup=False, soft_wrap=True)
    options.saved(output, "patch", replaced=replaced)
