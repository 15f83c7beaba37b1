"""The study's estimators against what they say they minimise, weigh and read."""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED
from torch import Tensor
from two_forwards import activations, float64_throughout, sums

import thought_kernels as tk
from thought_kernels.transmute import estimators, fitting
from thought_kernels.transmute.accumulator import ThoughtAccumulator

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import candidates  # noqa: E402
import recipes  # noqa: E402

TOKENIZER = tiny_tokenizer()
INSTRUCTION = "Sum now"
EXAMPLES = [
    {"prompt": "8 7", "completion": "8 + 7"},
    {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"},
]
STOPS = TOKENIZER.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
WIDTH, EPSILON = 12, 0.3


def model_of(seed: int) -> Any:
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER))


def given(accumulator: ThoughtAccumulator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The patch's attention matrix of random rows, their C and Z, and the means of δ and a."""
    generator = torch.Generator().manual_seed(torch.seed())
    delta, activation = torch.randn(2, 40, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    accumulator.update(0, "attention", delta, activation, weights)
    matrix = accumulator.solve("ridge", ridge=EPSILON).matrix(0, "attention")
    assert matrix is not None
    cross, gram = (weights * delta.T) @ activation, (weights * activation.T) @ activation
    return matrix, cross, gram, weights @ delta / weights.sum(), weights @ activation / weights.sum()


def zero(gradient: Tensor, cross: Tensor) -> None:
    assert gradient.abs().max() <= SOLVED * cross.abs().max()


@pytest.mark.parametrize("price", [1.0, 10.0, math.inf])
def test_each_head_pays_the_price_of_the_other_heads(price: float) -> None:
    matrix, cross, gram, _, _ = given(candidates.ByHead(3, price, dtype=torch.float64))
    own = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    if price == math.inf:
        assert (matrix[~own] == 0).all()
        for start in range(0, WIDTH, 4):
            head = slice(start, start + 4)
            shift = EPSILON * gram[head, head].trace() / 4
            zero(matrix[head, head] @ gram[head, head] + shift * matrix[head, head] - cross[head, head], cross)
    else:
        shift = EPSILON * gram.trace() / WIDTH * torch.where(own, 1.0, price).double()
        zero(matrix @ gram + shift * matrix - cross, cross)


@pytest.mark.parametrize("centred", [False, True])
def test_the_metric_is_that_of_the_moments(centred: bool) -> None:
    rows = torch.randn(30, WIDTH, dtype=torch.float64) + 1
    moments = {(0, "attention"): (rows.T @ rows / 30, rows.mean(0))}
    matrix, cross, gram, _, _ = given(candidates.InMetric(moments, centred, dtype=torch.float64))
    metric = rows.T.cov(correction=0) if centred else rows.T @ rows / 30
    zero(matrix @ (gram + EPSILON * gram.trace() / metric.trace() * metric) - cross, cross)


def test_the_rows_own_covariance_leaves_their_mean_alone() -> None:
    accumulator = candidates.InMetric(None, True, dtype=torch.float64)
    matrix, cross, gram, _, mean = given(accumulator)
    sums = accumulator.sums(0, "attention")
    assert sums is not None
    scatter = gram - sums.moments[0] * torch.outer(mean, mean)
    zero(matrix @ (gram + EPSILON * gram.trace() / scatter.trace() * scatter) - cross, cross)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_large_ridge_leaves_the_mean_shift(fitted: bool) -> None:
    accumulator = candidates.TowardsMeanShift(fitted, dtype=torch.float64)
    matrix, cross, gram, shift, mean = given(accumulator)
    heavy = accumulator.solve("ridge", ridge=1e9).matrix(0, "attention")
    assert heavy is not None and torch.allclose(heavy @ mean, shift, rtol=1e-6)
    assert torch.linalg.matrix_rank(heavy, rtol=1e-6) == 1
    if not fitted:
        target = torch.outer(shift, mean) / mean.dot(mean)
        zero(matrix @ gram - cross + EPSILON * gram.trace() / WIDTH * (matrix - target), cross)


def test_half_of_an_examples_weight_follows_the_effect() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    effect = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 2.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
    wanted = torch.tensor([[0.125, 0.25, 0.5, 0.125], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert torch.allclose(candidates.tilted(weights, effect), wanted)


def test_rows_are_weighted_by_the_divergence_of_whole_forwards() -> None:
    model, seen = model_of(1), []
    kept = candidates.sequential
    with (
        mock.patch.object(candidates, "sequential", lambda run: (seen.append(run), kept(run))),
        candidates.CANDIDATES["weighted by KL"](None),
    ):
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, substitutions=0)
    (run,) = seen
    rows = {
        row: weights
        for _, _, batch in run.batches()
        for row, weights in zip(batch.examples, batch.weights, strict=True)
    }
    for number, example in enumerate(EXAMPLES):
        header, chunk, e = tk.align(TOKENIZER, INSTRUCTION, example)
        with float64_throughout():
            prompted, bare = (
                model(torch.tensor([ids])).logits[0, -len(e) :].double().log_softmax(-1)
                for ids in (header + chunk + e, header + e)
            )
        divergence = (prompted.exp() * (prompted - bare)).sum(-1)
        wanted = (1 / len(e) + divergence / divergence.sum()) / 2
        assert torch.allclose(rows[number][: len(e)].double(), wanted, rtol=1e-4)
        assert rows[number][: len(e)].sum() == pytest.approx(1)


def test_generic_moments_are_those_of_whole_forwards() -> None:
    model, texts = model_of(2), ["8 7", "abc"]
    found = candidates.generic_moments(model, TOKENIZER, texts)
    assert set(found) == set(itertools.product(range(3), ("attention", "mlp")))
    wanted: dict[tuple[int, str], list[Tensor]] = {key: [] for key in found}
    for text in texts:
        header, _, e = tk.align(TOKENIZER, INSTRUCTION, text)
        model.generation_config.update(
            do_sample=False, max_new_tokens=20, eos_token_id=TOKENIZER.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
        )
        ids = model.generate(torch.tensor([header + e]))[0].tolist()
        rows = activations(model, ids, len(ids) - len(header))
        for key, values in wanted.items():
            values.append(rows[key])
    for key, (second, mean) in found.items():
        truth = sum(rows.T @ rows / len(rows) for rows in wanted[key]) / 2
        assert (second - truth).abs().max() <= 1e-4 * truth.abs().max()  # transformers' norms are float32
        truth = sum(rows.mean(0) for rows in wanted[key]) / 2
        assert (mean - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_copies_of_words_end_with_the_prompted_models_answer() -> None:
    model = model_of(3)
    pool = TOKENIZER.convert_tokens_to_ids(list("STUVWXYZ"))

    class Bench:
        tokenizer, outside_tokens = TOKENIZER, set()

    Bench.model = model
    seen: list[Any] = []
    group = fitting.group_examples
    with (
        candidates.with_own_answers(Bench),
        mock.patch.object(
            fitting, "group_examples", lambda examples, *args: (seen.extend(examples), group(examples, *args))[1]
        ),
    ):
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, substitutions=2, substitutes=pool)
    assert len(seen) == 9
    for copy in seen[3:]:
        prompt = [*copy.header, *copy.instruction, *copy.tokens[: copy.answer_start]]
        written = model.generate(torch.tensor([prompt]), eos_token_id=STOPS, **GREEDY)[0, len(prompt) :].tolist()
        assert copy.tokens[copy.answer_start :] == written


@torch.no_grad()
def before_their_patches(model: Any, patch: tk.ThoughtPatch, ids: list[int]) -> dict[tuple[int, str], Tensor]:
    """What enters each site of the patched model, its own patch not applied yet but those of all earlier ones."""
    seen: dict[tuple[int, str], Tensor] = {}
    with patch.applied(model), contextlib.ExitStack() as hooks, float64_throughout():
        for index, layer in enumerate(model.model.layers):
            for key, module in (((index, "attention"), layer.self_attn.o_proj), ((index, "mlp"), layer.mlp)):
                handle = module.register_forward_pre_hook(
                    lambda _, args, key=key: seen.__setitem__(key, args[0][0].double()), prepend=True
                )
                hooks.callback(handle.remove)
        model(torch.tensor([ids]))
    return seen


def test_a_second_pass_of_sequential_finds_the_first_ones_patch() -> None:
    """Why the study has no row of several passes: fitted anew under the whole patch, every block has the same rows."""
    model = model_of(4)
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, substitutions=0, ridge=0.2)
    pairs: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {key: [] for key in patch.entries}
    for example in EXAMPLES:
        header, chunk, e = tk.align(TOKENIZER, INSTRUCTION, example)
        prime = activations(model, header + chunk + e, len(e))
        plain = before_their_patches(model, patch, header + e)
        for key, found in pairs.items():
            found.append((prime[key], plain[key][-len(e) :]))
    for key, found in pairs.items():
        cross, gram, _ = sums(found)
        again, first = estimators.ridge_solve(cross, gram, 0.2), patch.matrix(*key)
        assert first is not None and (again - first).abs().max() <= SOLVED * first.abs().max()


def test_rows_are_measured_once_and_in_the_order_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.csv"
    wanted = ["weighted by KL", "words, own answers", "default"]
    command = ["recipes.py", "--model", str(BENCHMARKS / "models" / "small"), "--tasks", "first", "--examples", "4",
               "--seeds", "0", "--output", str(output), "--recipes"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command, *wanted])
    for _ in range(2):
        recipes.main()
    with output.open(newline="") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == wanted
    monkeypatch.setattr(sys, "argv", [*command, "defualt"])
    with pytest.raises(SystemExit):
        recipes.main()
    assert "defualt" in capsys.readouterr().err


def test_the_grid_names_every_row_once_and_holds_the_reports() -> None:
    labels = [label for label, _ in recipes.recipes(6)]
    assert len(labels) == len(set(labels)) and set(recipes.FINAL) | set(candidates.COPIES) | set(
        candidates.CANDIDATES
    ) <= set(labels)
