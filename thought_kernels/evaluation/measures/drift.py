"""Drift on ordinary text: how far a changed model reads it differently from the bare one, and how much worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thought_kernels.evaluation.measures.prose import PROSE
from thought_kernels.evaluation.measures.trial import kept
from thought_kernels.generation.continuations import context_length
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.prompts.chat import text_tokenizer

MEMORY_BUDGET = 256 << 20  # bytes of the bare model's log-probabilities; what is over lies in a file


@dataclass(frozen=True)
class Reading:
    """What a model makes of the passages, sums over the tokens of each, in their order.

    Attributes:
        divergences: KL(bare ‖ this model), nats.
        surprises: −log p of the text itself, nats.
        tokens: how many.
    """

    divergences: list[float]
    surprises: list[float]
    tokens: list[int]

    @property
    def divergence(self) -> float:
        """Σ KL(bare ‖ this model) / Σ tokens, nats a token."""
        return sum(self.divergences) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(−Σ log p / Σ tokens)."""
        return math.exp(min(sum(self.surprises) / sum(self.tokens), 700.0))


class Drift:
    """Passages as the bare model reads them, once, and then any number of changed models.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its fast tokenizer.
        passages: texts by kind. Those that the tokenizer has no tokens for are left out.
        batch_size: passages at a time.

    Attributes:
        kinds: of the passages that are read, in order; none where the model knows no such text.
        bare: the bare model's Reading; its divergences are 0.
    """

    def __init__(
        self, model: Any, tokenizer: Any, passages: Mapping[str, str] = PROSE, *, batch_size: int = 16
    ) -> None:
        tokenizer = text_tokenizer(tokenizer)
        rows = {kind: list(tokenizer(text)["input_ids"]) for kind, text in passages.items()}
        unknown = tokenizer.unk_token_id
        readable = {
            kind: ids[: context_length(model)] for kind, ids in rows.items() if len(ids) > 1 and unknown not in ids
        }
        self.kinds, self._batch_size = list(readable), batch_size
        # The first token, where there is one the beginning of all text, is read and not foretold.
        self._first, self._rest = [ids[:1] for ids in readable.values()], [ids[1:] for ids in readable.values()]
        self._bare = kept(self._logprobs(model), list(map(len, self._rest)), MEMORY_BUDGET) if self.kinds else []
        self.bare = self._reading(self._bare)

    def __len__(self) -> int:
        return len(self.kinds)

    def read(self, model: Any) -> Reading:
        """The passages as the model reads them now, with a patch applied, say."""
        return self._reading(self._logprobs(model))

    def _logprobs(self, model: Any) -> Any:
        return completion_logprobs(model, self._first, self._rest, batch_size=self._batch_size)

    def _reading(self, rows: Any) -> Reading:
        divergences, surprises = [], []
        for row, bare, ids in zip(rows, self._bare, self._rest, strict=True):
            divergences.append(float(divergence([bare], [row.to(bare.device)])[0].double().sum()))
            surprises.append(-float(row[range(len(ids)), ids].double().sum()))
        return Reading(divergences, surprises, list(map(len, self._rest)))
