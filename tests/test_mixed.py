"""Rows of one batch under different patches: each as it would be alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import tiny
from models import tiny_gemma3
from patches import MATRICES, fitting_patch, random_patch
from tolerances import largest
from torch import Tensor

import thought_kernels as tk

ROWS = ["a", None, "b", "c", "a"]


def patches_of(model: Any, rank: int | None, **options: Any) -> dict[str, Any]:
    found = {
        name: fitting_patch(model, seed=seed, vectors=vectors, **options)
        for seed, (name, vectors) in enumerate((("a", True), ("b", False), ("c", True)))
    }
    return found if rank is None else {name: patch.truncate(rank + i) for i, (name, patch) in enumerate(found.items())}


def batch(model: Any, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.get_text_config().vocab_size, (len(ROWS), length), generator=generator)


@torch.no_grad()
def alone(model: Any, patches: dict[str, Any], ids: Tensor) -> Tensor:
    found = []
    for name, row in zip(ROWS, ids, strict=True):
        if name is None:
            found.append(model(row[None]).logits)
            continue
        with patches[name].applied(model):
            found.append(model(row[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize(("rank", "recorded"), [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("family", ["gemma3", "granite", "gpt2", "llama"])
def test_each_row_is_as_it_would_be_alone(family: str, rank: int | None, recorded: bool) -> None:
    model = tiny(family).double().requires_grad_(recorded)  # where gradients are recorded, products are torch's own
    patches = patches_of(model, rank, sites=("attention", "mlp", "down", "residual"))
    ids = batch(model)
    wanted, bare = alone(model, patches, ids), model(ids).logits
    with tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        found = model(ids).logits
        again = model(ids[:, :4]).logits
        mixed.choose(ROWS[::-1])
        turned = model(ids.flip(0)).logits
    assert largest(found - wanted) <= 1e-10 * largest(wanted)
    assert largest(turned.flip(0) - wanted) <= 1e-10 * largest(wanted)
    assert largest(again - wanted[:, :4]) <= 1e-10 * largest(wanted)
    assert largest(found - bare) > 0.01 * largest(bare)
    assert torch.equal(found[1], bare[1])  # the row without a patch
    assert torch.equal(model(ids).logits, bare)


def test_patches_of_other_blocks_and_of_none_at_a_site() -> None:
    model = tiny_gemma3(dtype=torch.float64)
    patches = {
        "a": random_patch(0, layers=(0,), sites=MATRICES),
        "b": random_patch(1, layers=(2,), sites=("residual",)),
    }
    patches["c"] = random_patch(2, sites=("attention",)).truncate(4)
    ids = batch(model)
    with tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        found = model(ids).logits
    wanted = alone(model, patches, ids)
    assert largest(found - wanted) <= 1e-10 * largest(wanted)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}])
def test_generation_writes_what_each_patch_writes(options: dict[str, Any]) -> None:
    model = tiny_gemma3(dtype=torch.float64)
    patches, ids = patches_of(model, 5), batch(model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    wanted = []
    for name, row in zip(ROWS, ids, strict=True):
        if name is None:
            wanted.append(model.generate(row[None], **options))
            continue
        with patches[name].applied(model):
            wanted.append(model.generate(row[None], **options))
    with tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        assert torch.equal(model.generate(ids, **options), torch.cat(wanted))


def test_the_factors_of_a_site_are_gathered_and_never_copied_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gemma3(dtype=torch.float64).requires_grad_(False)
    patches, ids, calls = patches_of(model, 3, sites=("attention", "down")), batch(model), []

    def spy(
        x: Tensor, right: Tensor, left: Tensor, index: Tensor, vector: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        calls.append((right, left, index))
        return tk.gathered_low_rank(x, right, left, index, vector=vector, residual=residual)  # which checks them

    monkeypatch.setattr("thought_kernels.patches.mixed.gathered", spy)
    with tk.MixedPatches(model, patches) as mixed:
        for rows in (ROWS, ["c"] * len(ROWS)):
            mixed.choose(rows)
            model(ids)
    sites = len(calls) // 2
    assert sites == len(patches["a"].entries)
    for before, after in zip(calls[:sites], calls[sites:], strict=True):
        assert before[0] is after[0] and before[1] is after[1] and len(before[0]) == len(patches)
        assert before[2].tolist() == [0, -1, 1, 2, 0] and after[2].tolist() == [2] * 5


def test_gradients_pass_as_they_would_alone() -> None:
    model = tiny_gemma3(dtype=torch.float64).requires_grad_(False)
    patches, ids = patches_of(model, 3, sites=("attention", "down")), batch(model)
    embedded = model.get_input_embeddings()(ids)

    def gradient(rows: list[int]) -> Tensor:
        inputs = embedded[rows].clone().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    with tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        found = gradient(list(range(len(ROWS))))
    for row, name in enumerate(ROWS):
        with patches[name].applied(model) if name else nullcontext():
            wanted = gradient([row])
        assert largest(found[row] - wanted[0]) <= 1e-10 * largest(wanted)


def test_tangents_pass_as_they_would_alone() -> None:
    """Forward-mode derivatives, also where no gradient is recorded."""
    model = tiny_gemma3(dtype=torch.float64).requires_grad_(False)
    model.set_attn_implementation("eager")
    patches, ids = patches_of(model, 3, sites=("attention", "down")), batch(model)
    embedded = model.get_input_embeddings()(ids)

    def tangent(rows: list[int]) -> Tensor:
        run = lambda inputs: model(inputs_embeds=inputs).logits  # noqa: E731
        return torch.func.jvp(run, (embedded[rows],), (torch.ones_like(embedded[rows]),))[1]

    with torch.no_grad(), tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        found = tangent(list(range(len(ROWS))))
    for row, name in enumerate(ROWS):
        with torch.no_grad(), patches[name].applied(model) if name else nullcontext():
            wanted = tangent([row])
        assert largest(found[row] - wanted[0]) <= 1e-10 * largest(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    model = tiny_gemma3(dtype=dtype).requires_grad_(False)
    patches, ids = patches_of(model, 3), batch(model)
    wanted = alone(model, patches, ids)
    with tk.MixedPatches(model, patches) as mixed:
        mixed.choose(ROWS)
        found = model(ids).logits
    assert found.dtype == dtype
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    assert largest((found - wanted).double()) <= allowed * largest(wanted.double())


def test_what_cannot_be_chosen_is_refused() -> None:
    model = tiny_gemma3()
    patches, ids = patches_of(model, 3), batch(model)
    with pytest.raises(ValueError, match="^MixedPatches: patches must be a dict with a patch at least, got"):
        tk.MixedPatches(model, {})
    with pytest.raises(ValueError, match="^MixedPatches: patch must have the model's hidden size"):
        tk.MixedPatches(tiny("granite"), patches)
    with tk.MixedPatches(model, patches) as mixed:
        with pytest.raises(ValueError, match="^MixedPatches: rows must be chosen for a batch of 5, none were; call"):
            model(ids)
        with pytest.raises(ValueError, match="^choose: rows must be names among a, b, c, or None, .* got 'd'"):
            mixed.choose(["a", "d"])
        mixed.choose(["a", None])
        with pytest.raises(ValueError, match="^MixedPatches: rows must be chosen for a batch of 5, 2 were"):
            model(ids)
    model(ids)
