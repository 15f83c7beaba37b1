"""Toy models: the law of the inputs, gradients in closed form, one model alone as in a batch, restarts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from thought_kernels.spectral.toy import (
    Schedule,
    ToyModels,
    checkpoint_steps,
    history,
    reconstruction_loss,
    toy_models,
    train,
)
from thought_kernels.spectral.toy.models import Gradients
from thought_kernels.spectral.toy.sweeps import Plan

# float32 sums of 16 to 64 terms in another order, grown over 60 steps of Adam, whose first steps are of size lr
# whatever the gradient's: seen up to 2e-6.
SAME = {torch.float32: 2e-4, torch.float64: 1e-11}


def several(dtype: torch.dtype = torch.float64, **changes: object) -> ToyModels:
    options = {"seeds": (3, 1, 4, 1), "streams": (0, 0, 7, 0), "importance": [1.0, 0.5, 2.0, 1.0]} | changes
    return toy_models(9, 3, [0.0, 0.5, 0.9, 0.7], dtype=dtype, **options)


def test_inputs_are_sparse_and_uniform() -> None:
    sparsity = torch.tensor([[0.0, 0.5, 0.95], [0.2, 0.8, 0.0]])
    models = toy_models(3, 2, sparsity, seeds=(0, 1))
    x = models.inputs(40_000).at(0)
    assert x.shape == (2, 40_000, 3)
    active = x > 0
    # Six standard deviations of a share and of a mean of 2,000 uniform numbers or more.
    torch.testing.assert_close(active.double().mean(1), 1 - sparsity.double(), rtol=0, atol=0.015)
    for model in range(2):
        for feature in range(3):
            values = x[model, :, feature][active[model, :, feature]].double()
            bound = 6 / len(values) ** 0.5
            assert abs(values.mean() - 0.5) < bound * 0.29
            assert abs(values.var() - 1 / 12) < bound * 0.08
            assert values.max() <= 1
    assert torch.corrcoef(x[1].T).fill_diagonal_(0).abs().max() < 0.03


def test_inputs_depend_on_stream_and_step_only() -> None:
    models = toy_models(5, 2, 0.3, seeds=(10, 11, 12, 13), streams=(1, 2, 2, 1))
    inputs = models.inputs(8)
    first, other = inputs.at(4), inputs.at(5)
    torch.testing.assert_close(first, inputs.at(4), rtol=0, atol=0)
    assert (first != other).any()
    torch.testing.assert_close(first[0], first[3], rtol=0, atol=0)
    torch.testing.assert_close(first[1], first[2], rtol=0, atol=0)
    assert (first[0] != first[1]).any()
    alone = toy_models(5, 2, 0.3, seeds=(99,), streams=(2,)).inputs(8).at(4)
    torch.testing.assert_close(first[1], alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("importance", [1.0, torch.linspace(0.1, 2, 36).reshape(4, 9)])
def test_gradients_in_closed_form(importance: float | Tensor) -> None:
    models = several(importance=importance)
    models.bias.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    gradients = Gradients(models, 16)
    gradients.at(models, 2)
    weight, bias = models.weight.clone().requires_grad_(), models.bias.clone().requires_grad_()
    reconstruction_loss(weight, bias, models.inputs(16).at(2), models.importance).sum().backward()
    torch.testing.assert_close(gradients.weight, weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients.bias, bias.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_in_a_batch_is_the_model_alone(dtype: torch.dtype) -> None:
    schedule = Schedule(60, batch=32, learning_rate=3e-3)
    together = several(dtype)
    losses = train(together, schedule)
    for index, (seed, stream, sparsity, importance) in enumerate(
        [(3, 0, 0.0, 1.0), (1, 0, 0.5, 0.5), (4, 7, 0.9, 2.0), (1, 0, 0.7, 1.0)]
    ):
        alone = toy_models(9, 3, sparsity, importance=importance, seeds=[seed], streams=[stream], dtype=dtype)
        loss = train(alone, schedule)
        for name in ("weight", "bias"):
            torch.testing.assert_close(
                getattr(together, name)[index], getattr(alone, name)[0], rtol=0, atol=SAME[dtype]
            )
        torch.testing.assert_close(losses[index], loss[0], rtol=SAME[dtype], atol=0)


def test_training_is_adam_by_autograd() -> None:
    schedule = Schedule(25, batch=32, learning_rate=1e-2)
    models = several()
    weight, bias = models.weight.clone().requires_grad_(), models.bias.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias])
    inputs = models.inputs(32)
    for step in range(25):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        reconstruction_loss(weight, bias, inputs.at(step), models.importance).sum().backward()
        optimizer.step()
    start = models.weight.clone()
    train(models, schedule)
    assert (models.weight - start).abs().max() > 0.02
    torch.testing.assert_close(models.weight, weight.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(models.bias, bias.detach(), rtol=0, atol=1e-11)


class Interrupted(Exception):
    """Stands for a machine that stops."""


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    schedule = Schedule(40, batch=16)
    whole = several(torch.float32)
    losses = train(whole, schedule, folder=tmp_path / "whole", checkpoints=(0, 10, 30, 40), save_every=10)

    done = 0

    def stop(steps: int) -> None:
        nonlocal done
        done += steps
        if done == 27:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(
            several(torch.float32),
            schedule,
            folder=tmp_path / "cut",
            checkpoints=(0, 10, 30, 40),
            save_every=10,
            progress=stop,
        )
    again, rest = several(torch.float32), []
    resumed = train(
        again, schedule, folder=tmp_path / "cut", checkpoints=(0, 10, 30, 40), save_every=10, progress=rest.append
    )
    assert sum(rest) == 20  # of 40: it went on from 20
    torch.testing.assert_close(again.weight, whole.weight, rtol=0, atol=0)
    torch.testing.assert_close(resumed, losses, rtol=0, atol=0)
    for (step, weight, bias), (other, same, level) in zip(
        history(tmp_path / "whole"), history(tmp_path / "cut"), strict=True
    ):
        assert step == other
        torch.testing.assert_close(weight, same, rtol=0, atol=0)
        torch.testing.assert_close(bias, level, rtol=0, atol=0)
    assert [step for step, _, _ in history(tmp_path / "whole")] == [0, 10, 30, 40]
    assert not list(tmp_path.rglob(".*"))  # no temporary files are left

    finished = several(torch.float32)
    torch.testing.assert_close(train(finished, schedule, folder=tmp_path / "whole"), losses, rtol=0, atol=0)
    torch.testing.assert_close(finished.weight, whole.weight, rtol=0, atol=0)


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    train(several(), Schedule(2, batch=4), folder=tmp_path)
    with pytest.raises(ValueError, match="train: folder must hold a state of this run, got another start"):
        train(several(seeds=(3, 1, 4, 2)), Schedule(2, batch=4), folder=tmp_path)
    with pytest.raises(ValueError, match="got another schedule"):
        train(several(), Schedule(3, batch=4), folder=tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    models = several()
    before = models.weight.clone()
    with pytest.raises(ValueError, match="train: folder must hold a state of toy models"):
        train(models, Schedule(2, batch=4), folder=tmp_path)
    torch.testing.assert_close(models.weight, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="history: folder must hold checkpoints, got none"):
        history(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sparsity": 1.0}, r"toy_models: sparsity must be in \[0, 1\), got 1 to 1"),
        ({"sparsity": float("nan")}, "toy_models: sparsity must be in"),
        ({"sparsity": [0.1, 0.2, 0.3]}, "toy_models: sparsity must be a number"),
        ({"importance": -1.0}, "toy_models: importance must be finite and at least 0"),
        ({"seeds": ()}, "toy_models: seeds must name at least one model"),
        ({"streams": (1,)}, "toy_models: streams must be one for each of 2 models"),
        ({"features": 0}, "toy_models: features must be at least 1, got 0"),
        ({"dimensions": 2.5}, "toy_models: dimensions must be an integer, got 2.5"),
        ({"sparsity": "much"}, "toy_models: sparsity must be numbers, got 'much'"),
        ({"seeds": ("a", 1)}, "toy_models: seeds must be an integer, got 'a'"),
    ],
)
def test_bad_models_are_refused(arguments: dict[str, object], sentence: str) -> None:
    options = {"features": 4, "dimensions": 2, "sparsity": 0.5, "seeds": (0, 1)} | arguments
    with pytest.raises((ValueError, TypeError), match=sentence):
        toy_models(**options)


def test_bad_schedules_are_refused() -> None:
    for arguments in (
        {"steps": -1},
        {"steps": 1, "batch": 0},
        {"steps": 1, "learning_rate": 0.0},
        {"steps": 1, "learning_rate": "fast"},
        {"steps": 1, "shape": "x"},
        {"steps": 2.5},
        {"steps": "many"},
    ):
        with pytest.raises((ValueError, TypeError), match="Schedule: .* must .*, got "):
            Schedule(**arguments)


def test_numpys_integers_are_integers() -> None:
    five, one = np.int64(5), np.int32(1)
    schedule = Schedule(five, batch=np.int64(8))
    ours = toy_models(five, np.uint8(2), 0.5, seeds=np.array([3, one]), streams=np.array([0, 7]))
    theirs = toy_models(5, 2, 0.5, seeds=(3, 1), streams=(0, 7))
    assert torch.equal(train(ours, schedule), train(theirs, Schedule(5, batch=8)))
    plan = Plan(five, tuple(np.arange(1, 3)), (0.5,), one, schedule)
    assert json.dumps(asdict(plan)) == json.dumps(asdict(Plan(5, (1, 2), (0.5,), 1, Schedule(5, batch=8))))


def test_checkpoint_steps_end_with_the_last() -> None:
    assert checkpoint_steps(100, 5) == [0, 6, 25, 56, 100]
    assert checkpoint_steps(3, 50) == [0, 1, 2, 3]
    assert checkpoint_steps(10, 1) == [10]
    assert checkpoint_steps(10, 0) == []
