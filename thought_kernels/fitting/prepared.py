"""What a fit is given: the described model, the recipe for it, rows of examples and of what the model writes."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any, NamedTuple

import torch

from thought_kernels.fitting.checkpoint import Checkpoint, run_key
from thought_kernels.fitting.encoding import (
    WRITTEN_SHARE,
    Prompt,
    Writing,
    check_header,
    check_row,
    check_tokenizer,
    check_untold,
    completed,
    more_inputs,
    with_inputs,
)
from thought_kernels.fitting.recipe import Recipe, ResolvedRecipe
from thought_kernels.generation.processes import Processes
from thought_kernels.models import in_memory
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.sharded import group_of
from thought_kernels.ops.caller import warn
from thought_kernels.patches.apply import is_patched
from thought_kernels.patches.identity import identity
from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.everyday import everyday
from thought_kernels.prompts.examples import Example, Placed, read_examples
from thought_kernels.prompts.instruction import Instruction
from thought_kernels.prompts.ordinary import ordinary_rows
from thought_kernels.prompts.prompt import EncodedExample

_ON_TOP = (
    "transmute: model should be bare, got one that a patch acts on; the new patch is fitted on top of that one, and "
    "does what it should with it alone: remove() its handle first where that is not meant"
)
_FEW_TOKENS = 4096  # the smallest vocabularies of models that read English have several times as many


class Prepared(NamedTuple):
    """All that a fit is given.

    Attributes:
        decoder: the model, described.
        recipe: for this model.
        rows: the examples, and what the model wrote beside them.
        text: rows of ordinary text.
        provenance: what the patch remembers beside the recipe.
    """

    decoder: Decoder
    recipe: ResolvedRecipe
    rows: list[EncodedExample]
    text: list[EncodedExample]
    provenance: dict[str, Any]


@torch.no_grad()
def prepared(
    model: Any, tokenizer: Any, prompt: Prompt, examples: Any, recipe: Recipe, writing: Writing,
    checkpoint: Checkpoint | None = None, bad: BadExamples | None = None,
) -> Prepared:  # fmt: skip
    """What transmute fits, before it does; arguments as transmute's, those of the prompt and of writing together."""
    decoder = in_memory("transmute", model, divided=True)
    if is_patched(decoder.model):
        warn(_ON_TOP)
    resolved, bad = recipe.for_model(decoder), bad or BadExamples()
    given = _given(decoder, tokenizer, prompt, examples, bad)
    encoded, written = _rows(decoder, tokenizer, prompt, given, resolved, writing, checkpoint)
    if bad.left_out:
        written["left_out"] = bad.told()
    described = {
        "instruction": _told(prompt.instruction),
        "without": None if prompt.without is None else _told(prompt.without),
        "separator": prompt.separator, "format": prompt.format, **_model(decoder, tokenizer), **written,
        "completions": resolved.completions, "max_new_tokens": writing.max_new_tokens, "seed": writing.seed,
    }  # fmt: skip
    text = ordinary_rows(tokenizer, encoded, resolved.text_weight, decoder.context)
    return Prepared(decoder, resolved, encoded, text, described)


class _Given(NamedTuple):
    """Examples and their rows.

    Attributes:
        examples: that there are.
        rows: those of the examples that are fitted: all, or none where they only show what inputs are like.
    """

    examples: list[Example]
    rows: list[EncodedExample]


def _given(decoder: Decoder, tokenizer: Any, prompt: Prompt, examples: Any, bad: BadExamples) -> _Given:
    """What the examples are, each as a row of ids; what cannot be read is left out if `bad` says so."""
    prompt.check(tokenizer)
    check_tokenizer(decoder, tokenizer)
    if examples is None:
        shown, fitted = everyday(prompt.instruction)
        if not fitted:
            return _Given(shown, [])
        if decoder.vocabulary < _FEW_TOKENS:
            warn(
                f"transmute: examples should be given to a model of {decoder.vocabulary} tokens, got None; it is too "
                "small to know the everyday requests that stand in for them"
            )
        given = [Placed(f"everyday request {index}", example) for index, example in enumerate(shown)]
    else:
        given = read_examples(examples, bad)

    def read(place: str, example: Example) -> EncodedExample:
        row = prompt.encode(tokenizer, example, place)
        check_row(decoder, tokenizer, row)
        return row

    found = [(one, row) for one in given if (row := bad.read(one.place, read, *one)) is not None]
    if bad.left_out:
        warn(bad.sentence(len(found)))
    check_untold(prompt.instruction, prompt.separator, [one for one, _ in found])
    return _Given([one.example for one, _ in found], [row for _, row in found])


def _rows(
    decoder: Decoder, tokenizer: Any, prompt: Prompt, found: _Given, recipe: ResolvedRecipe, writing: Writing,
    checkpoint: Checkpoint | None,
) -> tuple[list[EncodedExample], dict[str, Any]]:  # fmt: skip
    """What is fitted, examples and what the model writes beside them, and what a patch remembers of it."""
    loaded, rows = found
    check_header(recipe.header_weight, rows)
    given = len(rows)
    _begin(decoder, prompt, recipe, rows, writing, checkpoint)
    write = partial(more_inputs, decoder, tokenizer, loaded, recipe.written_inputs, writing)
    texts = write() if checkpoint is None else checkpoint.once("inputs", write)
    rows, texts = with_inputs(decoder, tokenizer, prompt, loaded, rows, texts)
    if not rows:
        raise ValueError(
            "transmute: examples must be given where the model writes no inputs like the demonstrations', got None; "
            "give some, or raise written_inputs"
        )
    generated = sum(row.is_open for row in rows[:given]) * writing.completions + len(texts)
    complete = partial(completed, decoder, tokenizer, prompt, loaded[0], rows, given, writing)
    rows = complete() if checkpoint is None else checkpoint.rows(complete)
    told = {"examples": given, "written_inputs": texts, "written_share": WRITTEN_SHARE}
    return rows, {**told, "generated_completions": generated}


def _begin(
    decoder: Decoder, prompt: Prompt, recipe: ResolvedRecipe, rows: list[EncodedExample], writing: Writing,
    checkpoint: Checkpoint | None,
) -> None:  # fmt: skip
    """Tells a checkpoint which run this is; raises ValueError where processes do not all make the same call."""
    processes, divided = writing.processes, Processes(group_of(decoder) or False)
    if checkpoint is None and processes.size == divided.size == 1:
        return
    told = {
        "recipe": recipe.to_dict(), "prompt": prompt, "rows": rows, "writing": writing[:4],
        "processes": writing.processes.size, "device": decoder.device.type,
        "attention": getattr(decoder.config, "_attn_implementation", None),
    }  # fmt: skip
    if len(set(divided.everyone(json.dumps(told, sort_keys=True, default=str)))) > 1:
        raise ValueError(
            "transmute: inputs and options must be the same in all processes that the model's weights are divided "
            "among, got others in some; give all the same"
        )
    run = run_key(decoder.model, told)
    if len(set(processes.everyone(run))) > 1:
        raise ValueError(
            "transmute: distributed must be a call that all processes make alike, got other weights, inputs or options "
            "in some; give all the same"
        )
    if checkpoint is not None:
        checkpoint.begin(run)


def _told(instruction: Instruction) -> str | list[dict[str, Any]]:
    return instruction if isinstance(instruction, str) else [dict(turn) for turn in instruction]


def _model(decoder: Decoder, tokenizer: Any) -> dict[str, Any]:
    """What a patch remembers of the model that it was made for."""
    name = getattr(decoder.config, "_name_or_path", "") or None
    return {
        # A folder by its whole path: "models/gemma" would pass for a repository of the hub.
        "model": os.path.abspath(name) if name is not None and os.path.exists(name) else name,
        "model_type": decoder.config.model_type,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.blocks),
        "base": identity(decoder, tokenizer),
    }
