"""What one task says of one model: prompted, bare and patched, on inputs that no fit has seen."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tasks import WORD_FORMAT, Task
from torch import Tensor

import thought_kernels as tk
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.rivals.lora import injected, optimised
from thought_kernels.fitting import encoding
from thought_kernels.generation.logprobs import completion_logprobs
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.examples import load_examples

MAX_NEW_TOKENS = {"word": 12, "instruction": 32, "system": 32, "arithmetic": 32}
BATCH_SIZE = 32
RANK, RATES, CHECKPOINTS = 16, (3e-4, 1e-3, 3e-3), (25, 50, 100, 200)

Row = dict[str, Any]


def first_line(text: str, answer: str, question: str) -> bool:
    """The text's first line is the answer."""
    return text.strip().partition("\n")[0].strip() == answer


def last_number(text: str, answer: str, question: str) -> bool:
    """The last number that the text names is the answer."""
    return re.findall(r"\d+", text)[-1:] == [answer]


MATCHES = {"word": first_line, "arithmetic": last_number}


class Stopwatch:
    """A function that counts the seconds it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class TrainingRows:
    """What a LoRA learns from: prompts without the instruction, answers, and the prompted model's opinion of these."""

    bare_prompts: list[list[int]]
    written: list[list[int]]
    prompted_logprobs: list[Tensor]

    def __len__(self) -> int:
        return len(self.written)


class Measurement:
    """A task on a model: the prompted and the bare model are asked once, then any number of patches and LoRAs.

    Args:
        model: a transformers causal language model; it is as it was afterwards.
        tokenizer: its tokenizer.
        task: what to measure.

    Attributes:
        held_out: the trial on the task's held-out inputs.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task) -> None:
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._options = {"format": WORD_FORMAT} if task.kind == "word" else {}
        self.held_out = self._trial(task.held_out)

    def fit(self, inputs: int, recipe: dict[str, Any]) -> tuple[ThoughtPatch, Row]:
        """The patch of the first inputs by a recipe, of the prompt alone for 0; what is written is timed apart."""
        questions = [question for question, _ in self._task.inputs[:inputs]] or None
        inputs_written, completions_written = Stopwatch(encoding.more_inputs), Stopwatch(encoding.completed)
        started = time.perf_counter()
        with (
            mock.patch("thought_kernels.fitting.transmute.more_inputs", inputs_written),
            mock.patch("thought_kernels.fitting.transmute.completed", completions_written),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "transmute: .* completions did not end")  # and were cut, as held-out ones
            patch = tk.transmute(
                self._model, self._tokenizer, self._task.instruction, questions,
                max_new_tokens=self._max_new_tokens, **self._options, **recipe,
            )  # fmt: skip
        generation = inputs_written.seconds + completions_written.seconds
        seconds = {"seconds": time.perf_counter() - started - generation, "generation": generation}
        return patch, {name: round(value, 2) for name, value in seconds.items()}

    def patched(self, inputs: int, recipe: dict[str, Any]) -> Row:
        """What the patch of the first inputs does on held-out ones."""
        patch, seconds = self.fit(inputs, recipe)
        with patch.applied(self._model):
            return {**self._row(self.held_out.score(self._model)), **seconds}

    def trained(self, inputs: int, rate: float) -> Iterator[Row]:
        """A LoRA distilled by gradient descent on the same rows, at each checkpoint; evaluation is not in its seconds.

        loss = mean over the answers' tokens of KL(prompted ‖ bare with LoRA)
        """
        training = self._rows(inputs)
        generator = torch.Generator().manual_seed(0)
        with injected(self._model, rank=RANK):
            seconds, started = 0.0, time.perf_counter()
            for step in optimised(
                self._model, training, steps=max(CHECKPOINTS), rate=rate, generator=generator, falling=False
            ):
                if step in CHECKPOINTS:
                    seconds += time.perf_counter() - started
                    row = self._row(self.held_out.score(self._model))
                    yield {**row, "steps": step, "seconds": round(seconds, 2)}
                    started = time.perf_counter()

    def _rows(self, inputs: int) -> TrainingRows:
        """The rows that transmute fits on by default."""
        recipe, decoder = tk.Recipe(), describe(self._model)
        prompt = encoding.Prompt(self._task.instruction, None, "\n", self._options.get("format"))
        writing = encoding.Writing(recipe.completions, self._max_new_tokens, BATCH_SIZE, seed=0)
        examples = load_examples([question for question, _ in self._task.inputs[:inputs]])
        rows = [prompt.encode(self._tokenizer, example, number) for number, example in enumerate(examples)]
        texts = encoding.more_inputs(decoder, self._tokenizer, examples, recipe.written_inputs, writing)
        rows, _ = encoding.with_inputs(decoder, self._tokenizer, prompt, examples, rows, texts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "transmute: .* completions did not end")
            written = encoding.completed(decoder, self._tokenizer, prompt, examples[0], rows, len(examples), writing)
        questions = [row.tokens[: row.answer_start] for row in written]
        answers = [row.tokens[row.answer_start :] for row in written]
        prompts = [[*row.with_prefix, *question] for row, question in zip(written, questions, strict=True)]
        reference = list(completion_logprobs(self._model, prompts, answers, batch_size=BATCH_SIZE))
        bare = [[*row.without_prefix, *question] for row, question in zip(written, questions, strict=True)]
        return TrainingRows(bare, answers, reference)

    @property
    def _max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self._task.kind]

    def _trial(self, pairs: list[tuple[str, str | None]]) -> Trial:
        match = MATCHES.get(self._task.kind, "exact")
        answers = [answer for _, answer in pairs] if self._task.kind in MATCHES else None
        return Trial(
            self._model, self._tokenizer, self._task.instruction, [question for question, _ in pairs], answers,
            match=match, batch_size=BATCH_SIZE, max_new_tokens=self._max_new_tokens, **self._options,
        )  # fmt: skip

    def _row(self, score: Score) -> Row:
        """Accuracies, where the task has right answers, and the recovered effect."""
        row = {"recovered": round(score.effect.recovered, 5), "tokens": score.effect.tokens}
        if self._task.kind not in MATCHES:
            return row
        accuracies = {"prompted": self.held_out.prompted, "bare": self.held_out.base, "patched": score.accuracy}
        return {**{name: round(value, 5) for name, value in accuracies.items()}, **row}
