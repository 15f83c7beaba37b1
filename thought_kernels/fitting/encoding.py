"""From examples to the rows of ids that a fit reads: with inputs and completions that the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from thought_kernels.generation.completions import ending_of, with_completions
from thought_kernels.generation.inputs import written_inputs
from thought_kernels.generation.processes import ALONE, Processes
from thought_kernels.models.decoder import Decoder
from thought_kernels.ops.caller import warn
from thought_kernels.prompts.chat import text_tokenizer, writer_of
from thought_kernels.prompts.examples import Example, Placed
from thought_kernels.prompts.fits import check_fits
from thought_kernels.prompts.instruction import Instruction, begins_with, prompted
from thought_kernels.prompts.prompt import EncodedExample, encode

WRITTEN_SHARE = 0.5  # a small model's inputs are less like the next one than the examples are


class Prompt(NamedTuple):
    """What is told, and how it stands before an example; see transmute."""

    instruction: Instruction
    without: Instruction | None
    separator: str
    format: str | None

    def check(self, tokenizer: Any) -> None:
        """Raises what is wrong with the call, whatever the examples are."""
        writer_of(tokenizer, self.format, self.separator)
        probe = Example(({"role": "user", "content": "probe"},), None)
        prompted("instruction", self.instruction, probe, self.separator, "probe")
        if self.without is not None:
            prompted("without", self.without, probe, self.separator, "probe")

    def encode(self, tokenizer: Any, example: Example, place: str) -> EncodedExample:
        """An example as ids; raises as `encode` does, and says where the example stands."""
        try:
            row = encode(
                tokenizer, self.instruction, example, without=self.without, separator=self.separator,
                format=self.format,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error}; found at {place}") from error
        return row._replace(place=place)


class Writing(NamedTuple):
    """How the model writes; see transmute."""

    completions: int
    max_new_tokens: int
    batch_size: int
    seed: int
    progress: bool = False
    processes: Processes = ALONE


def check_row(decoder: Decoder, tokenizer: Any, row: EncodedExample, function: str = "transmute") -> None:
    """Raises ValueError unless the model can read both of a row's prompts."""
    comma = "," if ", " in str(row.place) else ""  # of a file's line
    check_fits(f"{function}: {row.place}{comma}", row, tokenizer, decoder.context, decoder.vocabulary)


def check_tokenizer(decoder: Decoder, tokenizer: Any, function: str = "transmute") -> None:
    """Warns of a tokenizer that knows so few of the model's tokens that it must be another model's."""
    size = len(text_tokenizer(tokenizer))
    if 2 * size < decoder.vocabulary:
        warn(
            f"{function}: tokenizer should be the model's own, got one of {size} tokens for {decoder.vocabulary} "
            "embeddings; load both from one folder"
        )


def more_inputs(
    decoder: Decoder, tokenizer: Any, examples: Sequence[Example], count: int, writing: Writing
) -> list[str]:
    """User texts like the examples', written by the bare model; none where an example has its own completion.

    Completions that are given say what the patch is to do, and the prompted model's own may be others.

    Raises:
        ValueError: as check_writes.
    """
    check_writes(decoder, examples)
    if not count or any(example.completion is not None for example in examples):
        return []
    given = [example.messages[-1]["content"] for example in examples]
    return written_inputs(
        decoder.model, tokenizer, given, count=count, batch_size=writing.batch_size, seed=writing.seed,
        progress=writing.progress, processes=writing.processes,
    )  # fmt: skip


def check_writes(decoder: Decoder, examples: Sequence[Example], function: str = "transmute") -> None:
    """Raises ValueError for a model without a language-model head where it is to write inputs or completions."""
    if decoder.lm_head is None and any(example.completion is None for example in examples):
        raise ValueError(
            f"{function}: model must have a language-model head to write completions, got "
            f"{type(decoder.model).__name__}; load it with AutoModelForCausalLM, or give every example a completion"
        )


def with_inputs(
    decoder: Decoder, tokenizer: Any, prompt: Prompt, examples: Sequence[Example], rows: Sequence[EncodedExample],
    texts: Sequence[str], share: float = WRITTEN_SHARE,
) -> tuple[list[EncodedExample], list[str]]:  # fmt: skip
    """The examples' rows and one for each further user text, in the examples' chats by turns; and these texts.

    They have this share of an example's weight. A text that is blank, that the prompt cannot stand before, or that
    begins with the instruction, is left out.
    """
    found, used = list(rows), list[str]()
    for index, text in enumerate(texts):
        messages = examples[index % len(examples)].messages
        example = Example((*messages[:-1], {"role": "user", "content": text}), None)
        if not text.strip() or begins_with(prompt.instruction, prompt.separator, example):
            continue
        try:
            row = prompt.encode(tokenizer, example, f"written input {len(used)}")
            check_row(decoder, tokenizer, row)
        except ValueError:
            continue
        found.append(row._replace(share=share))
        used.append(text)
    return found, used


def completed(
    decoder: Decoder, tokenizer: Any, prompt: Prompt, example: Example, rows: Sequence[EncodedExample], given: int,
    writing: Writing,
) -> list[EncodedExample]:  # fmt: skip
    """The rows, those without a completion with those that the prompted model writes.

    The `given` examples, which come first, have as many as the recipe says, the likeliest and draws. An input that the
    model wrote has one, drawn: at equal cost another input tells more than another completion.
    """
    if not any(row.is_open for row in rows):
        return list(rows)
    ending = ending_of(decoder.model, tokenizer, example, format=prompt.format)
    numbers = [range(writing.completions)] * given + [range(1, 2)] * (len(rows) - given)
    return with_completions(
        decoder.model, rows, ending=ending, max_new_tokens=writing.max_new_tokens, batch_size=writing.batch_size,
        numbers=numbers, seed=writing.seed, progress=writing.progress, processes=writing.processes,
    )  # fmt: skip


def check_header(weight: float, encoded: list[EncodedExample]) -> None:
    """Raises ValueError where header_weight has no rows to weigh."""
    if not weight:
        return
    if any(row.replaced for row in encoded):
        raise ValueError(
            "transmute: header_weight must be 0 where the prompt without the instruction is no beginning of the prompt "
            f"with it, got {weight}; only rows that both have in common can join with δ = 0"
        )
    headless = [row.place for row in encoded if not row.header]
    if headless:
        raise ValueError(
            f"transmute: header_weight must be 0 where nothing stands before the instruction, got {weight} with "
            f"{headless[0]}; there are no rows of a header to join"
        )


def check_untold(
    instruction: Instruction, separator: str, examples: Sequence[Placed], function: str = "transmute"
) -> None:
    """Refuses, or where only some are, warns of examples that begin with the instruction: a patch adds it again."""
    told = [place for place, example in examples if begins_with(instruction, separator, example)]
    if not told:
        return
    found = f"got {len(told)} of {len(examples)} that begin with it, the first at {told[0]}"
    mend = "take it out there, since a patch stands for an instruction that is not in the prompt"
    if len(told) == len(examples):
        raise ValueError(f"{function}: examples must be without the instruction, {found}; {mend}")
    warn(f"{function}: examples should be without the instruction, {found}; {mend}")
