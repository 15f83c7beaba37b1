"""What `evaluate` is given, read and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thought_kernels.evaluation.measures.scorers import as_scorer
from thought_kernels.evaluation.rivals.refit import recipe_of
from thought_kernels.evaluation.sections.bystanders import ORDINARY_PROMPTS
from thought_kernels.evaluation.sections.subject import Inputs, Other, Outside, Subject, Tolerant
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.models import describe
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.sharded import check_whole
from thought_kernels.ops.checks import as_integer, check_number
from thought_kernels.patches.apply import targets
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.fits import check_fits
from thought_kernels.prompts.prompt import EncodedExample, Example, Instruction, load_examples


@dataclass(frozen=True)
class Data:
    """Inputs and instructions as evaluate takes them, see there."""

    examples: Any
    held_out: Any
    answers: Sequence[str] | None
    outside: Any
    longer: Any
    paraphrases: Sequence[str]
    others: Any
    unrelated: Any
    pool: Any


@dataclass(frozen=True)
class Limits:
    """How much is measured, and in which portions, as evaluate takes it; checks itself."""

    inputs: int
    sweep_inputs: int
    lora_steps: int
    batch_size: int
    max_new_tokens: int
    seed: int
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("inputs", 2), ("sweep_inputs", 2), ("lora_steps", 1), ("batch_size", 1), ("max_new_tokens", 1),
            ("seed", None),
        ):  # fmt: skip
            object.__setattr__(self, name, as_integer("evaluate", name, getattr(self, name), least=least))
        if self.minutes is not None:
            check_number("evaluate", "minutes", self.minutes, positive=True)


def read_subject(
    model: Any, tokenizer: Any, patch_or_instruction: Any, instruction: Instruction | None, data: Data,
    limits: Limits, *, scorer: Any, recipe: Mapping[str, Any] | None, separator: str | None,
    without: Instruction | None, format: str | None,
) -> Subject:  # fmt: skip
    """The subject of an evaluation; arguments as evaluate's."""
    # An unknown architecture is refused now. A compiled wrapper would not notice the hooks of steering and moments.
    decoder = describe(model)
    check_whole("evaluate", decoder.model)
    patch = patch_or_instruction if isinstance(patch_or_instruction, ThoughtPatch) else None
    if patch is not None:
        targets("evaluate", patch, decoder.model)  # one of another model is refused now, not by every section
    made: Mapping[str, Any] = {} if patch is None else patch.provenance
    told = _instruction(patch, patch_or_instruction, instruction)
    held_out = _inputs(data.held_out, data.answers, "held_out", limits.inputs)
    examples = _examples(data.examples, patch)
    unrelated = load_examples(list(ORDINARY_PROMPTS) if data.unrelated is None else data.unrelated)
    found = Subject(
        model=decoder.model, tokenizer=tokenizer, instruction=told, given_patch=patch,
        recipe=_recipe(recipe, patch, decoder), examples=examples, pool=_pool(examples, data.pool), held_out=held_out,
        paraphrases=_texts("paraphrases", data.paraphrases), others=_others(data.others),
        outside=_outside(data.outside, limits.inputs),
        longer=None if data.longer is None else _inputs(data.longer, None, "longer", limits.inputs),
        unrelated=unrelated[: limits.inputs], scorer=Tolerant(as_scorer(scorer)),
        separator=made.get("separator", "\n") if separator is None else separator,
        without=made.get("without") if without is None else without,
        format=made.get("format") if format is None else format, seed=limits.seed, sweep_inputs=limits.sweep_inputs,
        lora_steps=limits.lora_steps, batch_size=limits.batch_size, max_new_tokens=limits.max_new_tokens,
    )  # fmt: skip
    _check_fits(found, also_unrelated=data.unrelated is not None)
    return found


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


def _recipe(given: Any, patch: ThoughtPatch | None, decoder: Decoder) -> Recipe:
    """The recipe of every fit: the given one, a given patch's own, or the default one."""
    if given is None:
        return Recipe() if patch is None else recipe_of(patch)
    if not isinstance(given, Mapping):
        raise TypeError(f"evaluate: recipe must be a Recipe or a dict of its options, got {type(given).__name__}")
    try:
        recipe = given if isinstance(given, Recipe) else Recipe.from_dict(given)
        recipe.for_model(decoder)
    except (ValueError, TypeError) as error:
        shown = dict(given)
        raise type(error)(f"evaluate: recipe must have options that transmute takes, got {shown}; {error}") from error
    return recipe


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
    """All inputs and examples align, and the model can read them, with room for an answer."""
    decoder = subject.decoder
    if decoder.lm_head is None:
        raise ValueError(
            f"evaluate: model must have a language-model head, got {type(decoder.model).__name__}; load it with "
            "AutoModelForCausalLM"
        )
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
    wordings: dict[str, Instruction] = {
        f"paraphrases[{index}]": wording for index, wording in enumerate(subject.paraphrases)
    }
    for name, other in subject.others.items():
        if other.inputs is None:
            wordings[f"others[{name!r}]"] = other.instruction
        else:
            given.append((f"others[{name!r}]", other.instruction, other.inputs.questions))
    for name, wording in wordings.items():  # which the same inputs are asked with
        given += [(f"{name} with held_out", wording, subject.held_out.questions)]
        given += [(f"{name} with examples", wording, subject.examples)]
    for name, instruction, rows in given:
        for index, example in enumerate(rows):
            where = f"evaluate: {name}[{index}]"
            row = _encoded(where, subject, example, instruction)
            check_fits(where, row, subject.tokenizer, decoder.context, decoder.vocabulary)


def _encoded(where: str, subject: Subject, example: Example, instruction: Instruction) -> EncodedExample:
    try:
        return subject.encode(example, instruction)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where} must be a prompt that can be encoded, got none; {error}") from error
