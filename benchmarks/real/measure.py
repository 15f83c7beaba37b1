"""What one task says of one model: prompted, bare and patched, on inputs that no fit has seen."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any
from unittest import mock

import torch
from tasks import WORD_FORMAT, Task

import thought_kernels as tk
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.measures.trial import Score, Trial
from thought_kernels.evaluation.rivals.function_vector import shuffled_prompts
from thought_kernels.evaluation.rivals.places import prompt_end
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.fitting import encoding
from thought_kernels.fitting.prepared import prepared
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.examples import load_examples
from thought_kernels.prompts.prompt import EncodedExample, encode

MAX_NEW_TOKENS = {"word": 12, "instruction": 32, "system": 32, "arithmetic": 32}
BATCH_SIZE = 32

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


@contextlib.contextmanager
def cost(device: torch.device) -> Iterator[Row]:
    """Fills a row with the seconds of what is done within, and its peak of memory beyond what was held before.

    Resident memory of the process (Linux with glibc); on an accelerator what torch has allocated there.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not to be taken for free of charge
    with MemoryPeak(device) as before:
        pass
    row: Row = {}
    started = time.perf_counter()
    with MemoryPeak(device) as during:
        yield row
    peaks = [peak.host_mib if peak.device_mib is None else peak.device_mib for peak in (before, during)]
    row.update(seconds=round(time.perf_counter() - started, 2), peak_mib=round(peaks[1] - peaks[0]))


def fitted(
    model: Any, tokenizer: Any, of: Task, inputs: int, options: dict[str, Any], turns: int = 1
) -> tuple[ThoughtPatch, Row]:
    """The patch of a task's first inputs, of the prompt alone for 0, and what it cost; what is written is timed apart.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        of: the task.
        inputs: how many.
        options: of transmute.
        turns: of the longest chats that ask the inputs again; 1 for none.
    """
    questions: list[Any] | None = [question for question, _ in of.inputs[:inputs]] or None
    inputs_written, completions_written = Stopwatch(encoding.more_inputs), Stopwatch(encoding.completed)
    chats_written = Stopwatch(tk.write_chats)
    with (
        mock.patch("thought_kernels.fitting.prepared.more_inputs", inputs_written),
        mock.patch("thought_kernels.fitting.prepared.completed", completions_written),
        warnings.catch_warnings(),
        cost(model.get_input_embeddings().weight.device) as found,
    ):
        warnings.filterwarnings("ignore", "transmute: .* completions did not end")  # and were cut, as held-out ones
        if turns > 1:
            answers = {name: value for name, value in options.items() if name in ("format", "max_new_tokens")}
            questions = chats_written(model, tokenizer, of.instruction, questions, turns=turns, **answers)
        patch = tk.transmute(model, tokenizer, of.instruction, questions, **options)
    generation = inputs_written.seconds + completions_written.seconds + chats_written.seconds
    return patch, {**found, "seconds": round(found["seconds"] - generation, 2), "generation": round(generation, 2)}


class Measurement:
    """A task on a model: the prompted and the bare model are asked once, then any number of changes of it.

    Args:
        model: a transformers causal language model; it is as it was afterwards.
        tokenizer: its tokenizer.
        task: what to measure.
        drift: ordinary text as the bare model reads it; None where drift is not asked for.

    Attributes:
        held_out: the trial on the task's held-out inputs.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, drift: Drift | None = None) -> None:
        self.model, self._tokenizer, self._task, self._drift = model, tokenizer, task, drift
        self._options = {"format": WORD_FORMAT} if task.kind == "word" else {}
        self.held_out = self._trial(task.held_out)
        self.rows = lru_cache(maxsize=1)(self._rows)

    @cached_property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def fit(self, inputs: int, recipe: dict[str, Any]) -> tuple[ThoughtPatch, Row]:
        """The patch of the first inputs by a recipe, of the prompt alone for 0; what is written is timed apart."""
        options = {"max_new_tokens": self._max_new_tokens, **self._options, **recipe}
        return fitted(self.model, self._tokenizer, self._task, inputs, options)

    def patched(self, inputs: int, recipe: dict[str, Any]) -> Row:
        """What the patch of the first inputs does on held-out ones."""
        patch, found = self.fit(inputs, recipe)
        with patch.applied(self.model):
            return {**self.scored(), **found}

    def scored(self) -> Row:
        """The model as it is now: accuracies, where the task has right answers, recovered effect, drift."""
        score: Score = self.held_out.score(self.model)
        row = {"recovered": round(score.effect.recovered, 5), "tokens": score.effect.tokens}
        if self._drift is not None and self._drift.kinds:
            row["drift"] = round(self._drift.read(self.model).divergence, 6)
        if self._task.kind not in MATCHES:
            return row
        accuracies = {"prompted": self.held_out.prompted, "bare": self.held_out.base, "patched": score.accuracy}
        return {**{name: round(value, 5) for name, value in accuracies.items()}, **row}

    def _rows(self, inputs: int) -> tuple[Rows, float]:
        """The rows that transmute fits on by default, and the seconds of writing them; `rows` keeps the last."""
        recipe, examples = tk.Recipe(), load_examples([question for question, _ in self._task.inputs[:inputs]])
        prompt = encoding.Prompt(self._task.instruction, None, "\n", self._options.get("format"))
        writing = encoding.Writing(recipe.completions, self._max_new_tokens, BATCH_SIZE, seed=0)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "transmute: .* completions did not end")
            written = prepared(self.model, self._tokenizer, prompt, examples, recipe, writing).rows
        seconds = time.perf_counter() - started

        def ask(text: Any, instruction: Any = self._task.instruction) -> EncodedExample:
            return encode(self._tokenizer, instruction, text, **self._options)

        shuffled = shuffled_prompts(written, self._task.instruction, lambda other: ask(examples[0], other))
        return Rows.of(written, prompt_end(ask), shuffled), round(seconds, 2)

    @property
    def _max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self._task.kind]

    def _trial(self, pairs: list[tuple[str, str | None]]) -> Trial:
        match = MATCHES.get(self._task.kind, "exact")
        answers = [answer for _, answer in pairs] if self._task.kind in MATCHES else None
        return Trial(
            self.model, self._tokenizer, self._task.instruction, [question for question, _ in pairs], answers,
            match=match, batch_size=BATCH_SIZE, max_new_tokens=self._max_new_tokens, **self._options,
        )  # fmt: skip
