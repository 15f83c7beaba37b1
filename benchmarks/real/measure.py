"""What one task says of one model: prompted, bare and patched, on inputs that no fit has seen."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from tasks import WORD_FORMAT, Task

import thought_kernels as tk
from thought_kernels.evaluate.lora import injected, optimised
from thought_kernels.evaluate.trial import Score, Trial, prompted_texts
from thought_kernels.transmute.patch import ThoughtPatch

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
        """The patch of the first inputs by a recipe; their completions are written before, and timed apart."""
        questions = [question for question, _ in self._task.inputs[:inputs]]
        started = time.perf_counter()
        texts = prompted_texts(
            self._model, self._tokenizer, self._task.instruction, questions, batch_size=BATCH_SIZE,
            max_new_tokens=self._max_new_tokens, **self._options,
        )  # fmt: skip
        written = time.perf_counter()
        # An empty answer is left to transmute, which writes it again.
        examples = [{"prompt": q, "completion": text or None} for q, text in zip(questions, texts, strict=True)]
        patch = tk.transmute(
            self._model, self._tokenizer, self._task.instruction, examples,
            max_new_tokens=self._max_new_tokens, **self._options, **recipe,
        )  # fmt: skip
        seconds = {"seconds": time.perf_counter() - written, "generation": written - started}
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
        training = self._trial(self._task.inputs[:inputs])
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
