"""One instruction on fresh inputs: the prompted and the bare model once, then any number of patched ones."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.measures.answers import MATCHES, value_tokens
from thought_kernels.evaluation.measures.metrics import Effect, effect
from thought_kernels.evaluation.measures.scorers import as_scorer
from thought_kernels.generation.completions import Ending, complete, ending_of, within_context
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.pairing.spill import buffers
from thought_kernels.prompts.chat import writer_of
from thought_kernels.prompts.prompt import EncodedExample, Example, Instruction, encode, load_examples

MEMORY_BUDGET = 2 << 30  # bytes of the prompted model's log-probabilities


@dataclass(frozen=True)
class Score:
    """What a model did without the instruction.

    Attributes:
        accuracy: mean grade of the answers.
        effect: over all tokens of the prompted model's completions.
        values: over their value tokens alone (answers.value_tokens).
        texts: the answers, in the inputs' order.
        grades: one per input, 0 to 1.
        divergences: KL(prompted ‖ this model) at each token of the prompted model's completion, nats, per input.
        follows: whether this model's likeliest token there is the completion's, [n_answer] bool per input.
        ended: whether each answer came to its end, and was not cut at max_new_tokens.
    """

    accuracy: float
    effect: Effect
    values: Effect
    texts: list[str]
    grades: list[float]
    divergences: list[Tensor]
    follows: list[Tensor]
    ended: list[bool]


class Trial:
    """An instruction, inputs with known answers, and the model's own answers with and without the instruction.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        instruction: text or turns, as transmute takes them.
        questions: user texts, or examples in any form that load_examples takes; completions are ignored.
        answers: the right answer to each; None grades by agreement, the prompted model's answers being the right ones.
        match: "exact" or "contains", see evaluation/measures/answers.py, or what as_scorer takes.
        separator: between instruction and question.
        without: what the other side is told, as transmute's; None for the instruction taken out.
        format: of a turn; None for the chat template.
        batch_size: inputs at a time.
        max_new_tokens: where completions are cut.
        known: bare completions by question, for questions that other trials of the same model have asked before; this
            trial's are added. The bare model knows no instruction, so they are the same.
        divergences: also compute what `score` compares with; False is enough for `answer`.

    Attributes:
        prompted: accuracy with the instruction.
        base: accuracy without it.
        prompted_texts, base_texts: the answers.
        prompted_grades, base_grades: their grades.
        prompted_ended, base_ended: whether each came to its end, and was not cut at max_new_tokens.
        questions, answers: what the answers are graded by: each input's last user text, and the right answer.
        prompts, bare_prompts, written: token ids of the prompts with and without the instruction, and the prompted
            completions.
        prompted_logprobs: the prompted model's log-probabilities there, [n_answer, vocabulary] each; None without
            divergences.
        bare_divergences: KL(prompted ‖ bare) at each token of the prompted completions, nats, per input.
        bare_follows: as Score.follows, of the bare model.

    Raises:
        ValueError: no questions, another number of answers, an unknown match, or prompts that do not align.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        instruction: Instruction,
        questions: Sequence[Any],
        answers: Sequence[str] | None,
        *,
        match: Any = "exact",
        separator: str = "\n",
        without: Instruction | None = None,
        format: str | None = None,
        batch_size: int = 256,
        max_new_tokens: int = 64,
        known: dict[str, list[int]] | None = None,
        divergences: bool = True,
    ) -> None:
        if not questions or (answers is not None and len(questions) != len(answers)):
            got = "no answers" if answers is None else len(answers)
            raise ValueError(
                f"Trial: questions must be at least one, with one answer each, got {len(questions)} and {got}"
            )
        if isinstance(match, str) and match not in MATCHES and ":" not in match:
            raise ValueError(f"Trial: match must be one of {', '.join(MATCHES)}, got {match!r}")
        self._tokenizer, self._scorer = tokenizer, as_scorer(match)
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        asked = [example._replace(completion=None) for example in load_examples(questions)]
        self.questions = [example.messages[-1]["content"] for example in asked]
        encoded, self._ending = _asked(model, tokenizer, instruction, asked, without, separator, format)
        self.prompts = [[*row.with_prefix, *row.tokens] for row in encoded]
        self.bare_prompts = [[*row.without_prefix, *row.tokens] for row in encoded]

        # They are read behind both prompts.
        self.written = within_context(model, self.bare_prompts, self._complete(model, self.prompts))
        self.prompted_texts = self._ending.texts(self.written)
        self.prompted_ended = list(map(self._ending.reached, self.written))
        self.answers = list(self.prompted_texts if answers is None else answers)
        self.prompted_grades = self.grade(self.prompted_texts)
        self.prompted = _mean(self.prompted_grades)
        known = {} if known is None else known
        keys = [_key(example) for example in asked]
        fresh = [index for index, key in enumerate(keys) if key not in known]
        bare = self._complete(model, [self.bare_prompts[index] for index in fresh])
        known.update((keys[index], ids) for index, ids in zip(fresh, bare, strict=True))
        self.bare_written = [known[key] for key in keys]
        self.base_texts = self._ending.texts(self.bare_written)
        self.base_ended = list(map(self._ending.reached, self.bare_written))
        self.base_grades = self.grade(self.base_texts)
        self.base = _mean(self.base_grades)
        self._values = [value_tokens(tokenizer, ids, self._ending.ids) for ids in self.written]
        self.prompted_logprobs: list[Tensor] | None = None
        self.bare_divergences: list[Tensor] = []
        self.bare_follows: list[Tensor] = []
        if divergences:
            rows = completion_logprobs(model, self.prompts, self.written, batch_size=batch_size)
            self.prompted_logprobs = kept(rows, list(map(len, self.written)))
            self.bare_divergences, self.bare_follows = self._read(model)

    def __len__(self) -> int:
        return len(self.questions)

    def first(self, count: int) -> Trial:
        """The trial on its first inputs only; nothing is computed again."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list) and len(value) == len(self):
                setattr(part, name, value[:count])
        part.prompted, part.base = _mean(part.prompted_grades), _mean(part.base_grades)
        return part

    def score(self, model: Any) -> Score:
        """Asks the model, as it is now (with a patch applied, say), every question without the instruction.

        The divergences are taken at the tokens of the prompted model's completions, which the model is made to read.
        Where it would have written each of them itself they are its own greedy completion too; it is run freely only
        on the other questions.

        Raises:
            ValueError: if the trial was made without divergences.
        """
        patched, follows = self._read(model)
        own = list(self.written)
        others = [index for index, same in enumerate(follows) if not bool(same.all())]
        for index, ids in zip(others, self._complete(model, [self.bare_prompts[i] for i in others]), strict=True):
            own[index] = ids
        texts = self._ending.texts(own)
        grades = self.grade(texts)
        bare = self.bare_divergences
        return Score(
            _mean(grades), effect(patched, bare), effect(patched, bare, self._values), texts, grades, patched, follows,
            list(map(self._ending.reached, own)),
        )  # fmt: skip

    def effect(self, model: Any) -> Effect:
        """The divergences of the model as it is now, summed; no answers are written, so cheaper than score.

        Raises:
            ValueError: if the trial was made without divergences.
        """
        return effect(self._read(model)[0], self.bare_divergences)

    def answer(self, model: Any) -> tuple[float, list[str]]:
        """Accuracy and answers of the model as it is now, without the instruction; no divergences, so cheaper."""
        texts = self.answer_bare(model)
        return _mean(self.grade(texts)), texts

    def answer_bare(self, model: Any) -> list[str]:
        """Answers of the model as it is now without the instruction, not graded."""
        return self._ending.texts(self._complete(model, self.bare_prompts))

    def answer_prompted(self, model: Any) -> list[str]:
        """Answers of the model as it is now with the instruction: whether a patch disturbs what the model is told."""
        return self._ending.texts(self._complete(model, self.prompts))

    def grade(self, texts: Sequence[str]) -> list[float]:
        """The scorer's grade of an answer to each question."""
        return self._scorer(texts, self.answers, self.questions)

    def _read(self, model: Any) -> tuple[list[Tensor], list[Tensor]]:
        """(KL(prompted ‖ model), whether model's likeliest token is the completion's) at each token, per input."""
        if self.prompted_logprobs is None:
            raise ValueError("Trial.score: divergences must have been asked for, got divergences=False; use answer")
        references = self.prompted_logprobs
        follows: list[Tensor] = []

        def watched() -> Iterator[Tensor]:
            rows = completion_logprobs(model, self.bare_prompts, self.written, batch_size=self._batch_size)
            for logprobs, reference, written in zip(rows, references, self.written, strict=True):
                follows.append(logprobs.argmax(-1).cpu() == torch.tensor(written))
                yield logprobs.to(reference.device)

        return divergence(references, watched()), follows

    def _complete(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        return complete(
            model, prompts, ending=self._ending, max_new_tokens=self._max_new_tokens, batch_size=self._batch_size
        )


def prompted_texts(
    model: Any,
    tokenizer: Any,
    instruction: Instruction,
    questions: Sequence[Any],
    *,
    separator: str = "\n",
    format: str | None = None,
    batch_size: int = 256,
    max_new_tokens: int = 64,
) -> list[str]:
    """The model's greedy answers to questions with the instruction, stripped; arguments as Trial's."""
    encoded, ending = _asked(model, tokenizer, instruction, questions, None, separator, format)
    prompts = [[*row.with_prefix, *row.tokens] for row in encoded]
    return ending.texts(complete(model, prompts, ending=ending, max_new_tokens=max_new_tokens, batch_size=batch_size))


def bare_texts(
    model: Any, tokenizer: Any, questions: Sequence[str], *, format: str | None = None, batch_size: int = 256,
    max_new_tokens: int = 64,
) -> list[str]:  # fmt: skip
    """The model's greedy answers to questions alone, stripped: bare, or patched while a patch is applied."""
    prompts, ending = bare_prompts(model, tokenizer, questions, format=format)
    return ending.texts(complete(model, prompts, ending=ending, max_new_tokens=max_new_tokens, batch_size=batch_size))


def bare_prompts(
    model: Any, tokenizer: Any, questions: Sequence[str], *, format: str | None = None,
    without: Instruction | None = None, separator: str = "\n",
) -> tuple[list[list[int]], Ending]:  # fmt: skip
    """Questions as prompts without the instruction, or with what is `without` in its place, and what ends an answer."""
    if without is not None:
        encoded, ending = _asked(model, tokenizer, without, questions, None, separator, format)
        return [[*row.with_prefix, *row.tokens] for row in encoded], ending
    writer = writer_of(tokenizer, format, "")
    chats = load_examples(questions)
    prompts = [writer.tokens(writer.text(chat), closed=False).ids for chat in chats]
    return prompts, ending_of(model, tokenizer, chats[0], format=format)


def kept(rows: Iterator[Tensor], counts: Sequence[int], budget: int = MEMORY_BUDGET) -> list[Tensor]:
    """Tensors that are to stay: where they are up to a budget of bytes, then in CPU memory, then in a file.

    A vocabulary of 262,144 takes a megabyte a token.
    """
    first = next(rows)
    found = buffers([(count, first.shape[-1]) for count in counts], first.dtype, first.device, budget)
    for place, row in zip(found, itertools.chain([first], rows), strict=True):
        place.copy_(row)
    return found


def _mean(grades: Sequence[float]) -> float:
    return sum(grades) / len(grades)


def _key(example: Example) -> str:
    """A question's text, or for a longer chat all of it."""
    return example.messages[0]["content"] if len(example.messages) == 1 else json.dumps(example.messages)


def _asked(
    model: Any, tokenizer: Any, instruction: Instruction, questions: Sequence[Any], without: Instruction | None,
    separator: str, format: str | None,
) -> tuple[list[EncodedExample], Ending]:  # fmt: skip
    """The questions as prompts, and what ends an answer."""
    encoded = [
        encode(tokenizer, instruction, question, without=without, separator=separator, format=format)
        for question in questions
    ]
    return encoded, ending_of(model, tokenizer, load_examples([questions[0]])[0], format=format)
