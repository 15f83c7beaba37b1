"""Ordinary text in a fit: what the bare model makes of it is wanted of the patched one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED
from torch import Tensor
from two_forwards import activations

import thought_kernels as tk
from thought_kernels.estimation import estimators
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.prose import PROSE
from thought_kernels.evaluation.rivals.refit import recipe_of
from thought_kernels.fitting import transmute as module
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts import ordinary
from thought_kernels.prompts.ordinary import ORDINARY, ordinary_rows
from thought_kernels.prompts.prompt import encode

TOKENIZER = tiny_tokenizer()
INSTRUCTION = "Sum now"
EXAMPLES = [{"prompt": "8 7", "completion": "8 + 7"}, {"prompt": "abc", "completion": "c"}]
TEXTS = ("The sea was calm.", "lamp,24,90")


def model_of(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_gemma3(seed, dtype, vocab_size=len(TOKENIZER))


def rows() -> list[Any]:
    return [encode(TOKENIZER, INSTRUCTION, example) for example in EXAMPLES]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_every_token_weighs_the_same_and_all_of_them_as_was_asked() -> None:
    found = ordinary_rows(TOKENIZER, rows(), 0.3, None)
    assert 2 < len(found) < len(ORDINARY)  # this tokenizer has no curly quotes
    assert sum(row.share for row in found) == pytest.approx(0.3 * 2)
    assert len({round(row.share / len(row.tokens), 12) for row in found}) == 1
    assert {tuple(row.with_prefix + row.tokens) for row in found} <= {tuple(ids_of(text)) for text in ORDINARY}
    assert all(row.with_prefix == row.without_prefix == row.header and len(row.header) == 1 for row in found)
    assert max(len(row.tokens) for row in ordinary_rows(TOKENIZER, rows(), 0.3, 40)) == 39
    assert ordinary_rows(TOKENIZER, rows(), 0.0, None) == []


def test_what_is_not_finite_in_it_is_not_taken_for_an_example() -> None:
    model = model_of(0)
    said = {token for row in ordinary_rows(TOKENIZER, rows(), 0.1, None) for token in row.tokens}
    told = {token for row in rows() for token in row.with_prefix + row.tokens}
    with torch.no_grad():
        model.model.embed_tokens.weight[min(said - told)] = torch.nan
    tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES)
    for pairing in ("two_pass", "layerwise", "sequential"):
        with pytest.raises(ValueError, match="of the ordinary text|for the ordinary text"):
            tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, text_weight=0.1, pairing=pairing)


def test_drift_is_measured_on_other_text() -> None:
    assert not set(ORDINARY) & set(PROSE.values())


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_its_rows_want_the_bare_models_activations(pairing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, from forwards of the bare model and of the one that is patched so far."""
    monkeypatch.setattr(ordinary, "ORDINARY", TEXTS)
    model = model_of(1)
    options = {"sites": ("attention",), "pairing": pairing, "ridge": 0.2, "header_weight": 0.3}
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, text_weight=0.7, **options)
    told = len(EXAMPLES)
    texts = [ids_of(text) for text in TEXTS]
    each = 0.7 * told / sum(len(one) - 1 for one in texts)
    applied: dict[Any, Any] = {}
    for layer in range(3 if pairing == "sequential" else 1):  # later blocks of the others differ in the examples' rows
        cross, gram = 0, 0
        for row in rows():
            pair = row.with_prefix + row.tokens, row.without_prefix + row.tokens
            c, z = products(model, applied, pair, len(row.tokens), (layer, "attention"))
            cross, gram = cross + c / len(row.tokens), gram + z / len(row.tokens)
        for one in texts:
            c, z = products(model, applied, (one, one), len(one) - 1, (layer, "attention"))
            cross, gram = cross + each * c, gram + each * z
        header = rows()[0].header  # of the examples alone: the texts' first tokens have no weight
        _, z = products(model, applied, (header, header), len(header), (layer, "attention"))
        gram = gram + 0.3 * told / len(header) * z
        wanted = estimators.ridge_solve(cross, gram, 0.2)
        found = patch.matrix(layer, "attention")
        assert found is not None and (found - wanted).abs().max() <= SOLVED * wanted.abs().max()
        applied[layer, "attention"] = patch.entries[layer, "attention"]


def products(
    model: Any, applied: dict[Any, Any], pair: tuple[list[int], list[int]], last: int, key: tuple[int, str]
) -> tuple[Tensor, Tensor]:
    """Σ δ aᵀ and Σ a aᵀ over the last tokens, the second prompt read by the model as patched so far."""
    prime = activations(model, pair[0], last)[key]
    if not applied:
        plain = activations(model, pair[1], last)[key]
    else:
        with ThoughtPatch(applied).applied(model):
            plain = activations(model, pair[1], last)[key]
    return (prime - plain).T @ plain, plain.T @ plain


def test_a_patch_moves_other_text_less_the_more_it_weighs() -> None:
    model = model_of(2, torch.float32)
    drift = Drift(model, TOKENIZER)
    moved = []
    for weight in (0.0, 1.0, 100.0):
        patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, text_weight=weight)
        with patch.applied(model):
            moved.append(drift.read(model).divergence)
        assert recipe_of(patch).text_weight == patch.provenance["text_weight"] == weight
    assert moved[0] > moved[1] > 2 * moved[2]


def test_without_it_a_fit_is_that_of_the_examples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(module, "fit", lambda decoder, recipe, fitted, **_: found.append(fitted))
    for options in ({}, {"text_weight": 0}, {"text_weight": 0.1}):
        tk.transmute(model_of(0), TOKENIZER, INSTRUCTION, EXAMPLES, **options)
    assert [len(fitted) for fitted in found[:2]] == [2, 2] and len(found[2]) > 2


def test_what_text_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^transmute: text_weight must not be negative, got -1$"):
        tk.Recipe(text_weight=-1)
    with pytest.raises(
        ValueError, match="^transmute: text_weight must be 0 with estimator 'mean', got 0.1; .*='ridge'"
    ):
        tk.Recipe(text_weight=0.1, estimator="mean")
    with pytest.raises(TypeError, match="^transmute: text_weight must be"):
        tk.Recipe(text_weight="much")  # type: ignore[arg-type]
    monkeypatch.setattr(ordinary, "ORDINARY", ("“ ”",))
    with pytest.raises(ValueError, match="^transmute: text_weight must be 0 where the tokenizer has no tokens for"):
        tk.transmute(model_of(0), TOKENIZER, INSTRUCTION, EXAMPLES, text_weight=0.1)
