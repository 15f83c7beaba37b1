"""Drift on ordinary text against its definition, and what becomes of text that a model has no tokens for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import random_patch

from thought_kernels.evaluation.measures import drift as module
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.prose import PROSE

TOKENIZER = tiny_tokenizer()
PASSAGES = {"short": "two birds sat on a wall", "long": "one flew away, and then there was one; it sang all day"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)


@pytest.mark.parametrize("budget", [0, module.MEMORY_BUDGET])
def test_drift_is_the_mean_divergence_and_the_text_s_perplexity(
    model: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY_BUDGET", budget)  # at 0 all lies in a file
    drift, patch = Drift(model, TOKENIZER, PASSAGES), random_patch(layers=[1], sites=["mlp"])
    rows = [TOKENIZER(text)["input_ids"] for text in PASSAGES.values()]
    with torch.no_grad():
        bare = [logprobs(model, ids) for ids in rows]
        with patch.applied(model):
            found, changed = drift.read(model), [logprobs(model, ids) for ids in rows]
    divergences = [float((p.exp() * (p - q)).sum()) for p, q in zip(bare, changed, strict=True)]
    surprises = [-float(q[range(len(ids) - 1), ids[1:]].sum()) for q, ids in zip(changed, rows, strict=True)]
    tokens = [len(ids) - 1 for ids in rows]
    assert found.divergences == pytest.approx(divergences, rel=1e-3) and min(divergences) > 1e-4
    assert found.surprises == pytest.approx(surprises, rel=1e-4) and found.tokens == tokens
    assert found.divergence == pytest.approx(sum(divergences) / sum(tokens), rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(sum(surprises) / sum(tokens)), rel=1e-3)
    again = drift.read(model)
    assert again.divergence == pytest.approx(0.0, abs=1e-6)
    assert again.perplexity == pytest.approx(drift.bare.perplexity, rel=1e-6)


def test_text_without_tokens_is_left_out(model: Any) -> None:
    assert TOKENIZER.unk_token_id in TOKENIZER("“")["input_ids"]
    drift = Drift(model, TOKENIZER, {"plain": "a wall", "quoted": "“a wall”"})
    assert drift.kinds == ["plain"] and len(drift) == 1
    assert len(Drift(model, TOKENIZER, {"quoted": "“a wall”"})) == 0


def test_passages_are_alike_in_length() -> None:
    """So that none of them decides alone what all of them drift by."""
    lengths = [len(text) for text in PROSE.values()]
    assert len(PROSE) >= 12 and max(lengths) < 2 * min(lengths)
