"""The rivals beside the packages that their users run: steering-vectors, repeng, pyvene, scikit-learn.

None of them is needed otherwise; where one is not installed its tests are skipped.
    pip install --no-deps steering-vectors repeng pyvene scikit-learn scipy joblib threadpoolctl cloudpickle
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from models import tiny_tokenizer
from tolerances import FORWARD, largest

from thought_kernels.evaluation.rivals import mean_difference, principal_direction, probe_direction
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.steering import Steering
from thought_kernels.models import describe

pytestmark = pytest.mark.slow
TOKENIZER = tiny_tokenizer()
QUESTIONS = ["3 1 4", "2 7 8", "1 9", "5 5 5 5", "6 1"]
TOLD, BARE = ([f"{before}{question}\n" for question in QUESTIONS] for before in ("Sum: ", ""))
IDS = torch.tensor([TOKENIZER("7 7 2\n")["input_ids"]])


def peer(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng names it, numpy 2 has it no more
    return pytest.importorskip(name, reason=f"{name} is not installed: the rival is tested by its definition alone")


@pytest.fixture
def model() -> Any:
    return tiny("llama", vocab_size=len(TOKENIZER))


def rows() -> Rows:
    """Prompts whose last token alone is read: answers of one token."""
    told, bare = ([TOKENIZER(text)["input_ids"] for text in texts] for texts in (TOLD, BARE))
    return Rows([], told, bare, [[9]] * len(QUESTIONS), (), [])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=FORWARD * largest(wanted))


def steered(model: Any, steering: Steering) -> torch.Tensor:
    with steering.applied(model):
        return model(IDS).logits


def test_mean_differences_are_those_of_steering_vectors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer("steering_vectors", monkeypatch)
    theirs = package.train_steering_vector(model, TOKENIZER, list(zip(TOLD, BARE, strict=True)))
    ours = mean_difference.mean_differences(model, rows())
    assert ours.keys() == theirs.layer_activations.keys()
    for layer, vector in ours.items():
        assert_close(vector, theirs.layer_activations[layer])
    with theirs.apply(model, multiplier=2.0):
        wanted = model(IDS).logits
    assert_close(steered(model, 2.0 * Steering(ours)), wanted)


@pytest.mark.parametrize("name", ["steering_vectors", "repeng"])
def test_principal_directions_are_the_peers(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer(name, monkeypatch)
    ours = {layer: found[0] for layer, found in principal_direction.principal_directions(model, rows()).items()}
    theirs: dict[int, Any]
    if name == "repeng":
        pairs = [package.DatasetEntry(told, bare) for told, bare in zip(TOLD, BARE, strict=True)]
        trained = package.ControlVector.train(model, TOKENIZER, pairs, method="pca_center")
        theirs = {layer: found for layer, found in trained.directions.items() if layer < max(ours)}
    else:
        trained = package.train_steering_vector(
            model, TOKENIZER, list(zip(TOLD, BARE, strict=True)), aggregator=package.pca_aggregator()
        )
        theirs = trained.layer_activations
    # repeng leaves out the first block, and reads the last behind the final norm.
    assert set(theirs) == (set(ours) if name == "steering_vectors" else {1})
    for layer, direction in theirs.items():
        assert float(torch.as_tensor(direction) @ ours[layer]) == pytest.approx(1, abs=1e-5)


def test_several_blocks_are_steered_as_repeng_does(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer("repeng", monkeypatch)
    vectors = {layer: torch.randn(36, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
    ours = steered(model, 1.5 * Steering(vectors))
    control = package.ControlModel(model, list(vectors))
    control.set_control(package.ControlVector("llama", {k: v.numpy() for k, v in vectors.items()}), 1.5)
    wanted = control(IDS).logits
    control.unwrap()
    assert_close(ours, wanted)


def test_heads_are_moved_as_pyvene_does(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer("pyvene", monkeypatch)
    found = probe_direction.probes(model, rows())
    kind, block = "mass mean shift", describe(model).blocks[found[0].layer]
    part = slice(found[0].head * block.head_dim, (found[0].head + 1) * block.head_dim)
    shift = torch.zeros(block.attention_width)
    shift[part] = 5 * found[0].spreads[kind] * found[0].directions[kind]

    def moved(base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
        return base + shift

    component = f"model.layers[{block.index}].self_attn.o_proj.input"
    theirs = package.IntervenableModel([{"component": component, "intervention": moved}], model)
    _, output = theirs({"input_ids": IDS})
    assert_close(steered(model, probe_direction.intervention(model, found[:1], kind, 5.0, ())), output.logits)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_probes_are_those_of_scikit_learn(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear: Callable[..., Any] = peer("sklearn.linear_model", monkeypatch).LogisticRegression
    generator = torch.Generator().manual_seed(0)
    points = size * (torch.randn(80, 6, generator=generator, dtype=torch.float64) + 1)
    labels = points[:, 0] + size * torch.randn(80, generator=generator, dtype=torch.float64) > size
    weights, bias = probe_direction.logistic_weights(points, labels)
    theirs = linear(tol=1e-9, max_iter=10000).fit(points.numpy(), labels.numpy())
    wanted = torch.tensor([*theirs.coef_[0], theirs.intercept_[0]])
    torch.testing.assert_close(torch.cat([weights, bias[None]]), wanted, rtol=1e-3, atol=1e-5)
