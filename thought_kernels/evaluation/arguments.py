"""What `evaluate` is given, read and checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from thought_kernels.evaluation.measures.scorers import as_scorer
from thought_kernels.evaluation.sections.side_effects import ORDINARY_PROMPTS
from thought_kernels.evaluation.sections.subject import NOT_RECIPE, Inputs, Other, Outside, Subject, Tolerant, recipe_of
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.patches.apply import targets
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Example, Instruction, load_examples
from thought_kernels.version import __version__


def read_subject(
    model: Any, tokenizer: Any, patch_or_instruction: Any, examples: Any, *, held_out: Any,
    answers: Sequence[str] | None, instruction: Instruction | None, scorer: Any, outside: Any, longer: Any,
    paraphrases: Sequence[str], others: Any, unrelated: Any, pool: Any, recipe: Mapping[str, Any] | None, inputs: int,
    sweep_inputs: int, lora_steps: int, separator: str | None, without: Instruction | None, format: str | None,
    batch_size: int, max_new_tokens: int, seed: int,
) -> tuple[Subject, list[str], dict[str, Any]]:  # fmt: skip
    """Arguments as evaluate's.

    Returns:
        (subject, warnings about the data, settings for the report).
    """
    counts = {
        "inputs": (inputs, 2), "sweep_inputs": (sweep_inputs, 2), "lora_steps": (lora_steps, 1),
        "batch_size": (batch_size, 1), "max_new_tokens": (max_new_tokens, 1),
    }  # fmt: skip
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"evaluate: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"evaluate: {name} must be at least {least}, got {value}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"evaluate: seed must be an integer, got {seed!r}")
    # An unknown architecture is refused now. A compiled wrapper would not notice the hooks of steering and moments.
    model = describe(model).model
    patch = patch_or_instruction if isinstance(patch_or_instruction, ThoughtPatch) else None
    if patch is not None:
        targets("evaluate", patch, model)  # one of another model is refused now, not by every section
    told = _instruction(patch, patch_or_instruction, instruction)
    made: Mapping[str, Any] = {} if patch is None else patch.provenance
    separator = made.get("separator", "\n") if separator is None else separator
    without = made.get("without") if without is None else without
    format = made.get("format") if format is None else format
    measured = _inputs(held_out, answers, "held_out", inputs)
    fitted = _examples(examples, patch)
    known_pool = _pool(fitted, pool)
    chosen = recipe_of(patch) if recipe is None and patch is not None else _recipe(recipe)
    if recipe is not None:
        _check_recipe(chosen, model, told, fitted or measured.questions)
    found = Subject(
        model=model, tokenizer=tokenizer, instruction=told, given_patch=patch,
        recipe=chosen, examples=fitted, pool=known_pool, held_out=measured,
        paraphrases=_texts("paraphrases", paraphrases), others=_others(others), outside=_outside(outside, inputs),
        longer=None if longer is None else _inputs(longer, None, "longer", inputs),
        unrelated=load_examples(list(ORDINARY_PROMPTS) if unrelated is None else unrelated)[:inputs],
        scorer=Tolerant(as_scorer(scorer)), separator=separator, without=without, format=format, seed=seed,
        sweep_inputs=sweep_inputs, lora_steps=lora_steps, batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    _check_fits(found, also_unrelated=unrelated is not None)
    settings = {
        "instruction": told if isinstance(told, str) else [dict(turn) for turn in told],
        "patch": "given" if patch is not None else "transmuted from the examples",
        "recipe": {name: _plain(value) for name, value in found.recipe.items()},
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(found.decoder.device),
        "examples": len(fitted), "pool": len(known_pool), "held_out": len(measured.questions),
        "labels": "given" if measured.answers is not None else "agreement with the prompted model",
        "scorer": found.scorer.name, "separator": separator, "without": without, "format": format,
        "paraphrases": found.paraphrases,
        "others": list(found.others), "unrelated": len(found.unrelated), "sweep_inputs": sweep_inputs,
        "lora_steps": lora_steps, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "thought_kernels": __version__, "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    return found, _warnings(found), settings


def _instruction(patch: ThoughtPatch | None, given: Any, instruction: Instruction | None) -> Instruction:
    if patch is None:
        if instruction is not None and instruction != given:
            raise ValueError("evaluate: instruction must be given once, got two that differ")
        return given
    told = instruction if instruction is not None else patch.provenance.get("instruction")
    if not told:
        raise ValueError(
            "evaluate: instruction must be given where the patch does not say what it stands for, got none"
        )
    return told


def _inputs(given: Any, answers: Sequence[str] | None, name: str, most: int) -> Inputs:
    loaded = _loaded(given, name)
    if len(loaded) < 2:
        raise ValueError(
            f"evaluate: {name} must hold at least 2 inputs, got {len(loaded)}; no interval can be drawn around one"
        )
    if answers is not None and len(answers) != len(loaded):
        raise ValueError(f"evaluate: answers must be one per input of {name}, got {len(answers)} for {len(loaded)}")
    labels = list(answers) if answers is not None else [one.completion for one in loaded]
    some = sum(label is not None for label in labels)
    if 0 < some < len(labels):
        raise ValueError(
            f"evaluate: {name} must give all inputs a completion or none, got {some} of {len(labels)} with one"
        )
    questions = [example._replace(completion=None) for example in loaded[:most]]
    return Inputs(questions, [str(label) for label in labels[:most]] if some else None)


def _loaded(given: Any, name: str) -> list[Example]:
    try:
        return load_examples(given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"evaluate: {name} must be examples, got something else; {error}") from error


def _examples(given: Any, patch: ThoughtPatch | None) -> list[Example]:
    if given is None:
        if patch is None:
            raise ValueError("evaluate: examples must be given to transmute an instruction on, got none")
        return []
    loaded = _loaded(given, "examples")
    if len(loaded) < 2:
        raise ValueError(
            f"evaluate: examples must hold at least 2, got {len(loaded)}; neither a patch nor a baseline can be judged "
            "by one"
        )
    return loaded


def _pool(examples: list[Example], given: Any) -> list[Example]:
    more = [] if given is None else _loaded(given, "pool")
    held = set(map(str, examples))
    return [*examples, *(one for one in more if str(one) not in held)]


def _recipe(given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"evaluate: recipe must be a dict of transmute's options, got {type(given).__name__}")
    recipe = dict(given or {})
    known = set(inspect.signature(transmute).parameters) - NOT_RECIPE
    unknown = sorted(set(recipe) - known)
    if unknown:
        raise ValueError(f"evaluate: recipe must have options of transmute, got {', '.join(unknown)}")
    return recipe


class _ReadError(Exception):
    """transmute has come to the texts, so its options are good."""


class _Unreadable:
    """In a tokenizer's place."""

    def __getattr__(self, name: str) -> Any:
        raise _ReadError


def _check_recipe(recipe: Mapping[str, Any], model: Any, told: Instruction, examples: list[Example]) -> None:
    """Lets transmute check its options, which it does before it reads a text; nothing is run."""
    try:
        transmute(model, _Unreadable(), told, examples, **recipe)
    except _ReadError:
        pass
    except (ValueError, TypeError) as error:
        raise type(error)(f"evaluate: recipe must have options that transmute takes, got {recipe}; {error}") from error


def _texts(name: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError(f"evaluate: {name} must be texts, got {texts!r:.120}")
    return texts


def _others(given: Any) -> dict[str, Other]:
    if not isinstance(given, Mapping):
        given = {text: text for text in _texts("others", given)}
    others = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            if not {"instruction"} <= set(value) <= {"instruction", "held_out", "answers"}:
                raise ValueError(
                    f"evaluate: others[{name!r}] must have the keys instruction and held_out, got {sorted(value)}"
                )
            inputs = None
            if value.get("held_out") is not None:
                inputs = _inputs(value["held_out"], value.get("answers"), f"others[{name!r}]", 10**9)
            others[str(name)] = Other(value["instruction"], inputs)
        else:
            others[str(name)] = Other(value, None)
    return others


def _outside(given: Any, most: int) -> Outside | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        if set(given) != {"examples", "held_out"}:
            raise ValueError(f"evaluate: outside must have the keys examples and held_out, got {sorted(given)}")
        return Outside(_inputs(given["held_out"], None, "outside", most), _loaded(given["examples"], "outside"))
    return Outside(_inputs(given, None, "outside", most), None)


def _check_fits(subject: Subject, *, also_unrelated: bool) -> None:
    """All inputs and examples align, and fit the model's context with room for an answer."""
    limit = getattr(subject.decoder.config, "max_position_embeddings", None)
    told, outside = subject.instruction, subject.outside
    given: list[tuple[str, Instruction, Sequence[Example]]] = [
        ("examples", told, subject.examples),
        ("pool", told, subject.pool[len(subject.examples) :]),
        ("held_out", told, subject.held_out.questions),
        ("outside", told, [] if outside is None else outside.inputs.questions),
        ("outside's examples", told, [] if outside is None else outside.examples or []),
        ("longer", told, [] if subject.longer is None else subject.longer.questions),
        ("unrelated", told, subject.unrelated if also_unrelated else []),
    ]
    for name, other in subject.others.items():
        given.append((f"others[{name!r}]", other.instruction, [] if other.inputs is None else other.inputs.questions))
    for name, instruction, rows in given:
        for index, example in enumerate(rows):
            row = subject.encode(example, instruction)
            if limit is not None and row.length > limit:
                raise ValueError(
                    f"evaluate: {name}[{index}] must fit the model's context of {limit} tokens, got {row.length} with "
                    "the instruction; shorten it or drop it"
                )


def _warnings(subject: Subject) -> list[str]:
    found = []
    seen = {str(one._replace(completion=None)) for one in subject.examples}
    shared = sum(str(one) in seen for one in subject.held_out.questions)
    if shared:
        found.append(
            f"{shared} of {len(subject.held_out.questions)} held-out inputs are also examples: "
            "the figures on them say nothing about new inputs."
        )
    if len(subject.held_out.questions) < 30:
        found.append(f"Only {len(subject.held_out.questions)} held-out inputs: the intervals are wide.")
    return found


def _plain(value: Any) -> Any:
    """A recipe's value as JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else list(value)
