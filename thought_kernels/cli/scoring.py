"""What grades answers on the command line: a scorer's name, or judge:MODEL, a language model that grades."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thought_kernels.cli import options
from thought_kernels.evaluation.measures.scorers import JUDGE_PROMPT, Judge, Scorer, as_scorer

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


def read_scorer(
    match: str, instruction: str, device: str, offline: bool, *, dtype: str = "auto", prompt_file: Path | None = None
) -> Scorer:
    """A scorer by its name; a judge may be any causal language model that transformers loads, on the same device."""
    kind, _, name = match.partition(":")
    if kind != "judge":
        return as_scorer(match)
    if not name:
        raise typer.BadParameter("judge:MODEL must name a model, got none")
    prompt = JUDGE_PROMPT if prompt_file is None else prompt_file.read_text(encoding="utf-8")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from thought_kernels.models.load import DTYPES

    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    local = offline or Path(name).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        judge = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], local_files_only=local)
    except Exception as error:  # transformers, safetensors and the hub each raise types of their own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"evaluate: scorer must name a model to judge, got {name!r}; {reason}") from error
    return Judge(judge.to(device).eval(), tokenizer, instruction, prompt=prompt)


def answer_room(tokenizer: Any, answers: list[str], match: str) -> int:
    """How many tokens answers may have: a little more than the longest right one, 96 for a model that reasons first."""
    longest = max(map(len, tokenizer(answers, add_special_tokens=False).input_ids)) + 8
    return longest if match == "exact" else max(96, 2 * longest)
