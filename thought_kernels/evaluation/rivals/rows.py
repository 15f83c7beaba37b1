"""The rows that every rival is made from: the examples that a patch is fitted on, as two prompts and an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from thought_kernels.evaluation.measures.trial import kept
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.prompts.prompt import EncodedExample

BATCH_SIZE = 16


@dataclass(frozen=True)
class Rows:
    """Prompts with and without the instruction, and the answers that the prompted model wrote.

    Attributes:
        encoded: the same as examples of a fit.
        prompts, bare_prompts: token ids, one list a row.
        written: token ids of the answer.
        suffix: ids that end every prompt, see places.prompt_end.
        shuffled: where the instruction is demonstrations, prompts in which their answers have changed places, one or
            more of a row each; else empty.
        prompted_logprobs: the prompted model's log-probabilities at the answer, [n_answer, vocabulary] each; None
            until `read`.
    """

    encoded: list[EncodedExample]
    prompts: list[list[int]]
    bare_prompts: list[list[int]]
    written: list[list[int]]
    suffix: tuple[int, ...]
    shuffled: list[list[int]]
    prompted_logprobs: list[Tensor] | None = None

    @staticmethod
    def of(encoded: Sequence[EncodedExample], suffix: Sequence[int], shuffled: Sequence[list[int]] = ()) -> Rows:
        """The rows of examples with completions."""
        questions = [row.tokens[: row.answer_start] for row in encoded]
        told = [[*row.with_prefix, *question] for row, question in zip(encoded, questions, strict=True)]
        bare = [[*row.without_prefix, *question] for row, question in zip(encoded, questions, strict=True)]
        answers = [list(row.tokens[row.answer_start :]) for row in encoded]
        return Rows(list(encoded), told, bare, answers, tuple(suffix), list(shuffled))

    def __len__(self) -> int:
        return len(self.written)

    def first(self, count: int) -> Rows:
        """The first rows only."""
        logprobs = None if self.prompted_logprobs is None else self.prompted_logprobs[:count]
        return replace(
            self, encoded=self.encoded[:count], prompts=self.prompts[:count], bare_prompts=self.bare_prompts[:count],
            written=self.written[:count], shuffled=self.shuffled[:count], prompted_logprobs=logprobs,
        )  # fmt: skip

    def read(self, model: Any) -> Rows:
        """The same rows with what the prompted model thinks of the answers; the model is unpatched."""
        rows = completion_logprobs(model, self.prompts, self.written, batch_size=BATCH_SIZE)
        return replace(self, prompted_logprobs=kept(rows, list(map(len, self.written))))

    def divergence(self, model: Any) -> float:
        """Σ KL(prompted ‖ model as it is now) at the answers' tokens, nats; rows that are `read`."""
        assert self.prompted_logprobs is not None
        rows = completion_logprobs(model, self.bare_prompts, self.written, batch_size=BATCH_SIZE)
        return sum(
            float(divergence([reference], [row])[0].double().sum())
            for reference, row in zip(self.prompted_logprobs, rows, strict=True)
        )
