"""Who says whether an answer is right: exact match, contains, a regular expression, any callable, or a judge model.

A scorer is called with all answers at once, `scorer(texts, answers, questions) -> [number in 0..1]`, so that a judge
can read them in batches. `as_scorer` makes one of a name or of a function of a single answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from thought_kernels.evaluation.measures.answers import MATCHES
from thought_kernels.generation.logprobs import completion_logprobs

JUDGE_PROMPT = """\
You are grading the answer of a language model.

Task: {instruction}
Input: {question}
Reference answer: {answer}
Answer to grade: {text}

Does the answer do the task for this input as well as the reference does? Wording may differ. Reply Yes or No."""


class ScorerError(ValueError):
    """A scorer failed on an answer; its message is a sentence that shows the answer."""


class Scorer(Protocol):
    """Grades answers; `name` is what a report calls it."""

    name: str

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        """One number from 0 (wrong) to 1 (right) for each text."""
        ...


class Each:
    """A scorer of single answers: function(text, answer, question) -> bool or a number from 0 to 1.

    Args:
        name: for reports and errors.
        function: called once per answer.
    """

    def __init__(self, name: str, function: Callable[[str, str, str], Any]) -> None:
        self.name, self._function = name, function

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        """Grades each answer.

        Raises:
            ScorerError: the function raised, or returned something else than a number from 0 to 1.
        """
        grades = []
        for text, answer, question in zip(texts, answers, questions, strict=True):
            try:
                grade = float(self._function(text, answer, question))
            except Exception as error:  # a user's function may raise anything
                reason = f"{type(error).__name__}: {error}"
                raise ScorerError(self._sentence(reason, text, answer, question)) from error
            if not (math.isfinite(grade) and 0 <= grade <= 1):
                raise ScorerError(self._sentence(str(grade), text, answer, question))
            grades.append(grade)
        return grades

    def _sentence(self, got: str, text: str, answer: str, question: str) -> str:
        return (
            f"evaluate: scorer {self.name!r} must return a number from 0 to 1 for every answer, got {got[:200]}; "
            f"text {text[:80]!r}, right answer {answer[:80]!r}, input {question[:80]!r}"
        )


class Judge:
    """A language model that grades: P(Yes) > P(No) after a prompt that shows it the task, the reference, the answer.

    Deterministic, and never without a verdict, since the two replies are compared and nothing is parsed.

    Args:
        model: any transformers causal language model, with `generate`'s forward signature.
        tokenizer: its tokenizer; its chat template is used if it has one.
        instruction: what the graded model was told to do, for {instruction} in the prompt.
        prompt: a template with {instruction}, {question}, {answer} and {text}.
        batch_size: answers at a time.

    Raises:
        ValueError: a prompt without {text}.

    Source: "Transmuting prompts into weights", §4.3, graded with a remote model; the comparison of replies is ours.
    """

    def __init__(
        self, model: Any, tokenizer: Any, instruction: str = "", *, prompt: str = JUDGE_PROMPT, batch_size: int = 16
    ) -> None:
        if "{text}" not in prompt:
            raise ValueError(f"Judge: prompt must have a place for the answer, {{text}}, got {prompt[:80]!r}")
        self._model, self._tokenizer = model, tokenizer
        self._instruction, self._prompt, self._batch_size = instruction, prompt, batch_size
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        self.name = f"judge:{name}"

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        """1.0 where the judge finds Yes likelier than No, else 0.0."""
        return [float(odds > 0) for odds in self.odds(texts, answers, questions)]

    def odds(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        """log P(Yes) − log P(No) of each answer: what tells answers apart where a judge leans to one reply."""
        prompts = [
            self._ids(_filled(self._prompt, instruction=self._instruction, question=question, answer=answer, text=text))
            for text, answer, question in zip(texts, answers, questions, strict=True)
        ]
        yes, no = (self._tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in ("Yes", "No"))
        likely = [
            [
                float(row[range(len(reply)), reply].sum())
                for row in completion_logprobs(
                    self._model, prompts, [reply] * len(prompts), batch_size=self._batch_size
                )
            ]
            for reply in (yes, no)
        ]
        return [for_yes - for_no for for_yes, for_no in zip(*likely, strict=True)]

    def _ids(self, text: str) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": text}]
            encoded = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        return list(self._tokenizer(text + "\n")["input_ids"])


def as_scorer(spec: Any) -> Scorer:
    """A scorer from what a user gives.

    Args:
        spec: "exact"; "contains" (the answer's final value as whole words); "regex:PATTERN", searched for in the text,
            with {answer} and {question} in it standing for those, escaped; "module:function"; a function (text, answer,
            question) -> bool or number; or a Scorer, such as a Judge, whose call takes lists.

    Returns:
        The Scorer.

    Raises:
        ValueError: an unknown name, a pattern that does not compile, or a module or function that is not there.
        TypeError: anything else.
    """
    if isinstance(spec, str):
        return _named(spec)
    if not callable(spec):
        raise TypeError(f"evaluate: scorer must be a name, a function or a scorer, got {type(spec).__name__}")
    if isinstance(getattr(spec, "name", None), str):
        return spec
    return Each(getattr(spec, "__qualname__", type(spec).__name__), spec)


def _named(spec: str) -> Scorer:
    if spec in MATCHES:
        return Each(spec, MATCHES[spec])
    kind, colon, rest = spec.partition(":")
    if kind == "regex" and colon:
        return Each(spec, _regex(rest))
    if kind == "judge":
        raise ValueError(
            f"evaluate: scorer must be Judge(model, tokenizer) where a model grades, got {spec!r}; "
            "only the command line loads one by name"
        )
    if not colon or not kind or not rest:
        raise ValueError(
            f"evaluate: scorer must be one of {', '.join(MATCHES)}, regex:PATTERN or module:function, got {spec!r}"
        )
    try:
        function = getattr(import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluate: scorer must name a module and its function, got {spec!r}; {error}") from error
    if not callable(function):
        raise ValueError(f"evaluate: scorer must name a function, got {spec!r}, a {type(function).__name__}")
    return Each(spec, function)


def _regex(pattern: str) -> Callable[[str, str, str], bool]:
    def matches(text: str, answer: str, question: str) -> bool:
        filled = _filled(pattern, answer=re.escape(answer), question=re.escape(question))
        return re.search(filled, text) is not None

    try:
        matches("", "", "")
    except re.error as error:
        raise ValueError(f"evaluate: scorer must be a regular expression, got {pattern!r}; {error}") from error
    return matches


def _filled(template: str, **values: str) -> str:
    """The template with {name} replaced, in one pass: other braces, and braces in the values, are left alone."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], template)
