"""What the commands share: options, the two consoles, progress, and loading a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from thought_kernels.demo import CHECKPOINT
from thought_kernels.prompts.chat import read_format
from thought_kernels.prompts.examples import load_examples

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def unescaped(text: str) -> str:
    r"""A separator or format as the shell passes it, with \n and \t meant as newline and tab."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _checked_format(text: str | None) -> str | None:
    if text is not None:
        read_format(unescaped(text))
    return text


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A folder, hub id or .gguf file (default the shipped checkpoint)", show_default=False
    ),
]
PatchModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder, hub id or .gguf file (default the one the patch was made for, or the shipped checkpoint)",
        show_default=False,
    ),
]
Mismatch = Annotated[str, typer.Option(help="Of another model than the patch was made for: warn, refuse or ignore.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float64, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use its local cache.")]
InstructionText = Annotated[str | None, typer.Option("--instruction", "-i", help="What the model is told.")]
RequiredInstruction = Annotated[
    str | None,
    typer.Option("--instruction", "-i", help="What the model is told (required, or --system or --demonstrations)."),
]
System = Annotated[str | None, typer.Option(help="A system message as the instruction, in place of --instruction.")]
Demonstrations = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="File of few-shot turns, each with prompt and completion; the instruction, or after it.",
    ),
]
Examples = Annotated[
    Path | None,
    typer.Option(
        help="File of texts, prompts and completions, or messages: txt, csv, json, jsonl. Without it and "
        "--example: everyday requests, or what the model writes like the inputs of --demonstrations."
    ),
]
ExampleTexts = Annotated[list[str] | None, typer.Option("--example", "-e", help="A user text; may be repeated.")]
Separator = Annotated[str, typer.Option(help=r"Between instruction and example; \n and \t are understood.")]
Without = Annotated[
    str | None,
    typer.Option(help="What the other side is told in the instruction's place (default nothing).", show_default=False),
]
Format = Annotated[
    str | None,
    typer.Option(
        help=r"Of a turn, in place of a chat template: '{prompt} -> {completion}\n'; \n and \t are understood.",
        show_default=False,
        callback=_checked_format,
    ),
]

DEFAULT_MODEL = str(CHECKPOINT)
DEFAULT_SEPARATOR = r"\n"


def complain(sentence: str) -> None:
    """Writes an error's sentence to stderr."""
    err.print(Text.assemble(("error: ", "bold red"), sentence), soft_wrap=True)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Shows a Python warning as one line on stderr; installed over warnings.showwarning."""
    err.print(Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True)


def load_model(model: str, dtype: str = "auto", device: str = "cpu", offline: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer); see models.load. Quiet, since what follows says enough."""
    from thought_kernels.models.load import load

    if model == DEFAULT_MODEL and not (CHECKPOINT / "config.json").is_file():
        raise ValueError(
            "load: the shipped checkpoint must be in thought_kernels/demo/checkpoint, got none; give --model"
        )
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    announce(model, offline)
    with err.status(f"loading {model}"):
        return load(model, dtype=dtype, device=device, offline=offline)


def announce(model: str, offline: bool) -> None:
    """Says that the hub is asked for a model, where it is: a mistyped folder would be waited for without a word."""
    from thought_kernels.models.load import is_on_hub

    if not is_on_hub(model, offline=offline):
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        known = isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # no hub id either, which is said at once
        return
    if not known:
        err.print(f"{model} is no folder here; asking the hub for it, which may take a while", soft_wrap=True)


def patch_model(given: str | None, provenance: Mapping[str, Any]) -> str:
    """The model that a patch is put into: the named one, else the one that it was made for, else the shipped one."""
    made_for = provenance.get("model")
    if given is not None or not made_for:
        return given or DEFAULT_MODEL
    place = Path(made_for)
    if place.parts[-3:] == CHECKPOINT.parts[-3:]:  # the shipped one, wherever it was installed then
        return DEFAULT_MODEL
    if place.is_absolute() and not place.exists():
        raise typer.BadParameter(f"give --model: the patch was made for {made_for}, which is not here")
    err.print(f"the patch was made for {made_for}, which is used", soft_wrap=True)
    return str(made_for)


def check_layers(model: str, layers: Iterable[int] | None, offline: bool) -> None:
    """Raises ValueError for blocks that the model has not, before its weights are read."""
    from thought_kernels.fitting.recipe import Recipe
    from thought_kernels.models.load import block_count

    if layers is not None and (blocks := block_count(model, offline=offline)) is not None:
        Recipe(layers=layers).check_blocks(blocks)


def read_layers(text: str) -> list[int]:
    """ "0,3,5-7" to [0, 3, 5, 6, 7]."""
    found: list[int] = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-", 1)]
        if all(end.isdecimal() for end in ends):
            if max(len(end.lstrip("0")) for end in ends) > 4:  # before a range of so many is made
                raise typer.BadParameter(f"--layers must be block indices below 10000, got {text!r:.80}")
            first, last = int(ends[0]), int(ends[-1])
            if first <= last:
                found += range(first, last + 1)
                continue
        raise typer.BadParameter(f"--layers must be block indices such as 10-19 or 0,3,5-7, got {text!r}")
    return found


def saved(output: Path, what: str, *, replaced: bool) -> None:
    """Says where something was saved, and that it took the place of another."""
    out.print(f"saved to {output}" + f", in place of the {what} there" * replaced, markup=False, soft_wrap=True)


def load_tokenizer(model: str, offline: bool = False) -> Any:
    """The tokenizer alone."""
    from thought_kernels.models.load import load_tokenizer as load

    announce(model, offline)
    return load(model, offline=offline)


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback for (done, total, what comes next): a bar on stderr, or a line each time where it is no terminal."""
    if not err.is_terminal:
        yield lambda done, total, what: print(
            f"{name}: {done} of {total}. {what}".rstrip(), file=sys.stderr, flush=True
        )
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def prompting(separator: str | None, format: str | None, without: str | None = None) -> dict[str, Any]:
    """Those of the options of how a prompt is written that were given, as encode and transmute take them."""
    return {
        name: value if name == "without" else unescaped(value)
        for name, value in (("separator", separator), ("format", format), ("without", without))
        if value is not None
    }


def read_instruction(
    text: str | None, demonstrations: Path | None, system: str | None = None
) -> str | list[dict[str, str]]:
    """The instruction as transmute takes it: text, a system message, few-shot turns, or a system message and turns.

    Beside demonstrations the text is the system message too.
    """
    if system is not None and text is not None:
        raise typer.BadParameter("give --system or --instruction, not both")
    if demonstrations is None and system is None:
        if text is None:
            raise typer.BadParameter("give --instruction, --system or --demonstrations")
        return text
    opening = text if system is None else system
    turns = [{"role": "system", "content": opening}] if opening is not None else []
    if demonstrations is None:
        return turns
    for index, example in enumerate(load_examples(demonstrations)):
        if example.completion is None:
            raise ValueError(
                f"load_examples: {demonstrations} must give each demonstration a completion, got none at {index}"
            )
        turns += [*example.messages, {"role": "assistant", "content": example.completion}]
    return turns


def given_inputs(file: Path | None, texts: Sequence[str] | None, model: str) -> list[Any] | None:
    """What --examples and --example name, as transmute takes it; None for the everyday requests.

    Raises:
        BadParameter: no input for the shipped model, an empty text, or one that is a file's name.
    """
    if file is None and not texts and model == DEFAULT_MODEL:
        raise typer.BadParameter(
            "give --examples FILE, or --example TEXT once or more, or both: the shipped model does not know the "
            "everyday requests that stand in for them elsewhere"
        )
    if not all(text.strip() for text in texts or ()):
        raise typer.BadParameter("--example must be a text, got an empty one")
    for text in texts or ():
        if os.path.isfile(text):  # Path.is_file raises where a text is too long for a name
            raise typer.BadParameter(f"--example must be a text, got the file {text}; give a file by --examples")
    return [*(() if file is None else [file]), *(texts or [])] or None


def check_folder(output: Path) -> None:
    """Raises BadParameter unless --output is a folder or can be made one, before anything is computed for it."""
    above = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"--output must be a folder, got the file {above}")
    if not os.access(above, os.W_OK):
        raise typer.BadParameter(f"--output must be a folder that may be written to, got {above}")


def check_file(option: str, path: Path | None) -> None:
    """Raises BadParameter unless a file, where one is asked for, can be written, which replaces what has its name."""
    if path is None:
        return
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise typer.BadParameter(f"{option} must be a file in a folder that exists, got {path}")
    # The new file is made beside the old one: the folder must take it, whatever the old one's own mode.
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise typer.BadParameter(f"{option} must be a file that may be written to, got {path}")


def with_completion(example: str, completion: str | None) -> str | dict[str, str]:
    """An example as transmute takes it."""
    return example if completion is None else {"prompt": example, "completion": completion}


def pairs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def listed(values: Sequence[str]) -> list[str]:
    """["a,b", "c"] to ["a", "b", "c"]."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
