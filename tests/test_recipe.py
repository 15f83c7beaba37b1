"""A recipe is a value that is checked as it is made; the published one's sums are tested in test_pairing.py."""

from __future__ import annotations

import copy
import inspect
import json
import math
import operator
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tiny
from models import tiny_gemma3, tiny_tokenizer

import thought_kernels as tk
from thought_kernels.models import describe

TOKENIZER = tiny_tokenizer()
EXAMPLE = {"prompt": "8 76", "completion": "x=2 ok"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"c1": "1"}, TypeError, "c1 must be a number, got str"),
        ({"c1": math.nan}, ValueError, "c1 must be finite, got nan"),
        ({"c2": math.inf}, ValueError, "c2 must be finite, got inf"),
        ({"c1": 0}, ValueError, "c1 or c2 must not be 0, got 0 and 0.0; the patch would change nothing"),
        ({"steps": 0}, ValueError, "steps must be finite and positive, got 0"),
        ({"mlp_activation": "skip"}, ValueError, "mlp_activation must be one of input, residual, got 'skip'"),
        ({"steps": None}, TypeError, "steps must be a number, got NoneType"),
        ({"layers": 3}, TypeError, r"layers must be 0-based block indices or None, got 3; give a list or range"),
        ({"layers": "10-19"}, TypeError, "layers must be 0-based block indices or None, got '10-19'; give a list"),
        ({"layers": [1.5]}, TypeError, r"layers must be 0-based block indices or None, got \[1.5\]"),
        ({"layers": [True]}, TypeError, r"layers must be 0-based block indices or None, got \[True\]"),
        ({"layers": torch.tensor([True])}, TypeError, "layers must be 0-based block indices or None, got tensor"),
        ({"layers": b"12"}, TypeError, "layers must be 0-based block indices or None, got b'12'"),
        ({"layers": []}, ValueError, r"layers must be distinct 0-based block indices, one at least, got \[\]"),
        ({"layers": [-1]}, ValueError, r"layers must be distinct 0-based block indices, one at least, got \[-1\]"),
        ({"layers": [2, 2]}, ValueError, r"layers must be distinct 0-based block indices, one at least, got \[2, 2\]"),
    ],
)
def test_bad_options_of_the_paper_s_recipe_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^paper_recipe: {message}"):
        tk.paper_recipe(**options)


def test_a_recipe_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="^transmute: ridge must be finite and positive, got 0"):
        tk.Recipe(ridge=0)
    with pytest.raises(TypeError, match="^transmute: completions must be an integer, got 2.5"):
        replace(tk.Recipe(), completions=2.5)
    with pytest.raises(ValueError, match="^Recipe: options must be among layers, .*, got rigde"):
        tk.Recipe.from_dict({"rigde": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_activation": "skip"}, "must be one of input, residual, got 'skip'"),
        ({}, "must be 'input' where sites are without 'mlp', got 'residual' with sites of the default"),
        ({"sites": ["down"]}, r"must be 'input' where sites are without 'mlp', got 'residual' with sites \['down'\]"),
        ({"sites": "mlp"}, "must be 'input' with estimator 'ridge', got 'residual'; it would fit Δ to h"),
    ],
)
def test_the_residual_activation_is_refused_where_it_means_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^transmute: mlp_activation {message}"):
        tk.Recipe(**{"mlp_activation": "residual", **options})


def test_the_residual_activation_is_refused_where_the_mlp_runs_beside_attention() -> None:
    recipe = tk.paper_recipe(layers=[1], mlp_activation="residual")
    recipe.for_model(describe(tiny("gpt_neox, one after the other")))
    with pytest.raises(ValueError, match="^transmute: mlp_activation must be 'input' where .* at block 1, got 'resid"):
        recipe.for_model(describe(tiny("pythia")))


def test_the_options_of_transmute_are_the_recipe_s_fields_with_its_defaults() -> None:
    parameters = inspect.signature(tk.transmute).parameters
    assert {name: parameters[name].default for name in tk.Recipe()} == dict(tk.Recipe())


def test_recipes_compare_change_print_and_pass_through_json() -> None:
    recipe = tk.Recipe(layers=range(2, 0, -1), sites=["down", "mlp"], scale={"down": 1, "mlp": 2})
    assert recipe == tk.Recipe(layers=[1, 2], sites=("mlp", "down"), scale={"mlp": 2.0, "down": 1.0})
    assert recipe != replace(recipe, ridge=0.3) == tk.Recipe(**{**recipe, "ridge": 0.3})
    assert eval(repr(recipe), {"Recipe": tk.Recipe}) == recipe
    assert tk.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert recipe["layers"] == (1, 2) and "c1" not in recipe and len(recipe) == len(list(recipe))


def test_a_recipe_is_a_value_scales_and_all() -> None:
    recipe = tk.paper_recipe(layers=[1])
    same = tk.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert hash(recipe) == hash(same) == hash(pickle.loads(pickle.dumps(recipe))) and {recipe: 1}[same] == 1
    assert json.loads(json.dumps(dict(recipe))) == json.loads(json.dumps(recipe.to_dict()))
    before = dict(recipe.scale)
    for change in (
        lambda scale: scale.update(mlp=0), lambda scale: scale.__setitem__("mlp", 0), lambda scale: scale.pop("mlp"),
        lambda scale: scale.__delitem__("mlp"), lambda scale: scale.setdefault("down", 1),
        lambda scale: scale.popitem(), lambda scale: scale.clear(), lambda scale: operator.ior(scale, {"mlp": 0}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="^Recipe: scale must stay as it is, got a change; make another recipe"):
            change(recipe.scale)
    assert recipe.scale == before == {**recipe.scale}
    assert hash(recipe.for_model(describe(tiny_gemma3(0)))) == hash(same.for_model(describe(tiny_gemma3(0))))


@pytest.mark.parametrize("ridge", [torch.full((8,), 0.25), [0.25] * 8])
def test_a_ridge_for_each_input_is_the_accumulator_s(ridge: Any) -> None:
    with pytest.raises(TypeError, match="^transmute: ridge must be one number, got a .*; ThoughtAccumulator") as told:
        tk.Recipe(ridge=ridge)
    assert "0.25" not in str(told.value)


def test_a_recipe_for_a_model_says_what_none_stood_for() -> None:
    decoder = describe(tiny_gemma3(0))
    resolved = tk.Recipe(scale=0.5).for_model(decoder)
    assert resolved.layers == (0, 1, 2) and resolved.sites == ("attention", "down")
    assert resolved.scale == {"attention": 0.5, "down": 0.5} and resolved.for_model(decoder) == resolved
    with pytest.raises(ValueError, match=r"layers must be .* below 3, got \[1, 3\]; name blocks that this model has"):
        tk.Recipe(layers=[3, 1]).for_model(decoder)


def test_transmute_takes_a_recipe_and_the_patch_remembers_it() -> None:
    model = tiny_gemma3(0, torch.float64, vocab_size=len(TOKENIZER))
    recipe = tk.paper_recipe(c1=0.5, layers=[1])
    patch = tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE], batch_size=1, **recipe)
    assert tk.Recipe.from_dict(json.loads(json.dumps(patch.provenance["recipe"]))) == recipe
    flat = {"layers": [1], "sites": ["mlp", "residual"], "pairing": "two_pass", "estimator": "mean"}
    assert flat.items() <= patch.provenance.items()
    with pytest.raises(TypeError, match=r"transmute\(\) got multiple values for keyword argument 'layers'"):
        tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE], layers=[1], **recipe)
