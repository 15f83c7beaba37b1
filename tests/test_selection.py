"""scale="auto" and ridge="auto": what is held back, what is chosen, and what the patch remembers of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.models import describe
from thought_kernels.transmute import fitting, selection
from thought_kernels.transmute.fitting import Recipe
from thought_kernels.transmute.prompt import EncodedExample, encode
from thought_kernels.transmute.selection import Candidate, split

TOKENIZER = tiny_tokenizer()
EXAMPLES = [{"prompt": f"{a} {b}", "completion": f"x={a}{b}"} for a, b in ("12", "34", "51", "27", "86", "90", "43")]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma3(3, torch.float32, vocab_size=len(TOKENIZER), layer_types=["full_attention"] * 2)


def encoded(*tokens: list[int]) -> list[EncodedExample]:
    return [EncodedExample([2], [7, 8], ids, 1) for ids in tokens]


def test_split_holds_back_whole_tokens_and_repeats() -> None:
    examples = encoded(*([5, 10 + a, 10 + b, 6] for a in range(5) for b in range(5)))
    fitted, held, tokens = split(examples, 0, 100)
    assert len(fitted) + len(held) == 25 and 6 <= len(held) <= 12
    assert tokens and not {5, 6} & set(tokens)
    for example in fitted:
        assert not set(example.tokens) & set(tokens)
    assert any(set(example.tokens) & set(tokens) for example in held)
    assert split(examples, 0, 100) == (fitted, held, tokens)
    assert any(split(examples, seed, 100)[1] != held for seed in (1, 2, 3))


def test_split_is_bounded() -> None:
    many = encoded(*([5, 10 + n % 300, 6] for n in range(600)))
    fitted, held, _ = split(many, 0, 100)
    assert (len(fitted), len(held)) == (selection.MAX_FITTED, selection.MAX_VALIDATED)
    long = encoded(*([5, *[10 + n] * 200] for n in range(40)))
    # Log-probabilities of 200 tokens each, and room for 1000 tokens of them.
    assert len(split(long, 0, selection.MAX_KEPT_LOGITS // 1000)[1]) == 5
    assert len(split(long, 0, selection.MAX_KEPT_LOGITS // 10)[1]) == 1
    for count in (4, 5, 6):
        fitted, held, _ = split(many[:count], 0, 100)
        assert len(held) >= 1 and len(fitted) >= 3 and len(fitted) + len(held) == count


def test_equal_examples_are_split_too() -> None:
    fitted, held, tokens = split(encoded(*[[5, 6, 7]] * 8), 0, 100)
    assert (len(fitted), len(held), tokens) == (6, 2, [])


@pytest.mark.parametrize("pairing", ["sequential", "two_pass"])
def test_the_chosen_values_are_fitted_on_all_examples(model: Any, pairing: str) -> None:
    options = {"pairing": pairing, "substitutions": 1, "seed": 2}
    patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, scale="auto", ridge="auto", **options)
    record = patch.provenance["selection"]
    assert record["chosen"] == ["ridge", "scale"] and record["seed"] == 2
    assert record["fitted_on"] + record["validated_on"] == len(EXAMPLES) == patch.provenance["examples"]
    table = record["table"]
    assert len(table) == len(selection.RIDGES) + len(selection.SCALES)
    assert [row["ridge"] for row in table[: len(selection.RIDGES)]] == list(selection.RIDGES)
    ridge, scale = patch.provenance["ridge"], patch.provenance["scale"]
    assert {row["ridge"] for row in table[len(selection.RIDGES) :]} == {ridge}
    assert any(row["scale"] == scale for row in table[len(selection.RIDGES) :])
    plain = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, scale=scale, ridge=ridge, **options)
    for layer, site in plain.entries:
        assert torch.equal(plain.matrix(layer, site), patch.matrix(layer, site))
    again = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, scale="auto", ridge="auto", **options)
    assert again.provenance["selection"] == record


def test_the_table_is_the_divergence_written_out(model: Any) -> None:
    """One candidate's row against plain forwards over the examples that were held back."""
    options = {"pairing": "layerwise", "sites": ("attention",), "substitutions": 0}
    patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, ridge="auto", **options)
    rows = [encode(TOKENIZER, "Sum now", example) for example in EXAMPLES]
    fitted, held, tokens = split(rows, 0, len(TOKENIZER))
    record = patch.provenance["selection"]
    assert record["held_out_token_ids"] == tokens
    candidate = tk.transmute(
        model, TOKENIZER, "Sum now", [e for e, row in zip(EXAMPLES, rows, strict=True) if row in fitted], ridge=0.1,
        **options,
    )  # fmt: skip

    def logprobs(prefix: list[int], row: EncodedExample) -> torch.Tensor:
        ids = torch.tensor([[*prefix, *row.tokens]])
        start = len(prefix) + row.answer_start
        return torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)

    truth = [logprobs(row.header + row.instruction, row) for row in held]
    bare = [logprobs(row.header, row) for row in held]
    with candidate.applied(model):
        patched = [logprobs(row.header, row) for row in held]
    counted = sum(map(len, truth))
    expected, plain = (
        sum(float((p.exp() * (p - q)).sum()) for p, q in zip(truth, other, strict=True)) / counted
        for other in (patched, bare)
    )
    (row,) = (row for row in record["table"] if row["ridge"] == 0.1)
    assert row["kl"] == pytest.approx(expected, rel=1e-3)
    assert record["kl_bare"] == pytest.approx(plain, rel=1e-3)
    assert row["recovered"] == pytest.approx(1 - expected / plain, abs=1e-3)
    assert record["validated_tokens"] == counted


def test_the_nearest_to_the_default_of_those_as_good_as_the_best_is_taken() -> None:
    def chosen(*rows: tuple[float, float | None], error: float = 0.0, tie: float = 0.0) -> float:
        judged = [Candidate(r, {"mlp": 1.0}, kl, None if kl is None else error, None) for r, kl in rows]
        return rows[selection.nearest(judged, [r for r, _ in rows], 0.1, tie)][0]

    rows = ((0.01, 0.59), (0.1, 0.61), (0.3, 0.5), (1.0, 0.59))
    assert chosen(*rows) == 0.3
    assert chosen(*rows, error=0.12) == chosen(*rows, tie=0.12) == 0.1
    assert chosen((0.01, 0.5), (0.1, None), (1.0, 0.4), error=0.2) in (0.01, 1.0)
    assert chosen((0.03, 0.5), (1.0, 0.4), error=0.2) == 0.03


def test_one_accumulation_serves_every_candidate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name, pairing in list(fitting.PAIRINGS.items()):
        monkeypatch.setitem(fitting.PAIRINGS, name, lambda run, n=name, p=pairing: (ran.append(n), p(run)))
    options = {"ridge": "auto", "scale": "auto"}
    tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, pairing="layerwise", sites=("mlp",), **options)
    # Once for the ridges, once for the scales, once for the patch; sequential must run for each candidate.
    assert ran == ["layerwise"] * 3
    ran.clear()
    tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, pairing="sequential", ridge="auto")
    assert ran == ["sequential"] * (len(selection.RIDGES) + 1)


def test_the_scale_of_a_mean_is_looked_for_where_it_can_be(model: Any) -> None:
    """On one block the natural scale is the least-squares one: no other leaves a smaller residual."""
    recipe = Recipe(frozenset({1}), frozenset({"mlp", "residual"}), "two_pass", "mean", "norm", "all", 0.0, 8)
    rows = [encode(TOKENIZER, "Sum now", example) for example in EXAMPLES]
    unit = selection.natural_scales(describe(model), recipe, rows)
    options = {"layers": [1], "sites": ("mlp", "residual"), "pairing": "two_pass", "estimator": "mean"}

    def residuals(factor: float) -> list[float]:
        scale = {site: factor * value for site, value in unit.items()}
        patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, normalization="norm", scale=scale, **options)
        return [entry.fit.residual for entry in patch.entries.values()]

    best = residuals(1.0)
    for factor in (0.9, 1.1):
        assert all(found > smallest for found, smallest in zip(residuals(factor), best, strict=True))
    recipe_options = tk.paper_recipe(layers=[0, 1]) | {"scale": "auto"}
    patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, **recipe_options)
    assert len(patch.provenance["selection"]["table"]) == len(selection.UNSCALED)
    assert all(math.isfinite(value) and value > 0 for value in patch.provenance["scale"].values())
    solved = replace(recipe, estimator="ridge")
    assert selection.natural_scales(describe(model), solved, rows) == {"mlp": 1.0, "residual": 1.0}


@pytest.mark.parametrize("estimator", ["second_order", "affine", "exact", "mean"])
def test_every_estimator_takes_an_automatic_scale(model: Any, estimator: str) -> None:
    patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES[:4], estimator=estimator, scale="auto")
    assert patch.provenance["selection"]["chosen"] == ["scale"]


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match="examples must be at least 4 for ridge 'auto', got 3"):
        tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES[:3], ridge="auto")
    with pytest.raises(ValueError, match="examples must be at least 4 for scale 'auto', got 1"):
        tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES[:1], scale="auto")
    with pytest.raises(ValueError, match="ridge must be a number or left out for estimator 'exact', got 'auto'"):
        tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, estimator="exact", ridge="auto")
    for name in ("scale", "ridge"):
        with pytest.raises(TypeError, match=f"{name} must be a number or 'auto', got 'automatic'"):
            tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, **{name: "automatic"})


def test_numbers_that_are_not_finite_are_named_with_their_block() -> None:
    broken = tiny_gemma3(3, torch.float32, vocab_size=len(TOKENIZER), layer_types=["full_attention"] * 2)
    broken.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"none of 7 candidates gave finite answers, the first because: .* block 1, "):
        tk.transmute(broken, TOKENIZER, "Sum now", EXAMPLES, ridge="auto", substitutions=0)


def test_the_table_survives_saving(model: Any, tmp_path: Path) -> None:
    patch = tk.transmute(model, TOKENIZER, "Sum now", EXAMPLES, ridge="auto")
    patch.save_pretrained(tmp_path)
    loaded = tk.ThoughtPatch.from_pretrained(tmp_path).provenance["selection"]
    assert loaded == json.loads(json.dumps(patch.provenance["selection"]))


def test_the_command_line_takes_auto(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    common = ["transmute", "-m", tmp_path / "model", "-i", "Sum now", "--examples", tmp_path / "examples.jsonl",
              "-o", tmp_path / "patch", "--substitutions", "0", "--seed", "3"]  # fmt: skip

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(app, list(map(str, [*common, *arguments])))

    result = invoke("--ridge", "auto", "--scale", "auto")
    assert result.exit_code == 0, result.output
    record = tk.ThoughtPatch.from_pretrained(tmp_path / "patch").provenance["selection"]
    assert record["chosen"] == ["ridge", "scale"] and record["seed"] == 3
    refused = invoke("--ridge", "automatic")
    assert refused.exit_code == 2 and "--ridge must be a number or auto" in " ".join(refused.stderr.split())
