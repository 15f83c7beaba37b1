"""Training many toy models at once against training them one after another, and on a GPU the paper's sweep.

python benchmarks/measure/bench_toy.py [--device cuda] [--sweep paper]

The rivals train the same models on the same inputs: the usual loop (autograd, Adam), and this package's closed-form
gradients and fused Adam one model at a time. Every provider's gradients and final losses are held to float64 first.
``--sweep`` takes a few steps of the smallest and the largest m of a preset and says what its whole sweep would take;
what it does take is printed by `thought-kernels toy sweep`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import torch
from torch import Tensor

from thought_kernels.spectral.toy import PRESETS, Schedule, ToyModels, reconstruction_loss, toy_models, train
from thought_kernels.spectral.toy.cost import models_that_fit, training_seconds
from thought_kernels.spectral.toy.models import Gradients

FEATURES, BATCH, STEPS = 128, 32, 10


def sparsities(count: int) -> list[float]:
    return torch.linspace(0, 0.99, count).tolist()


def models(count: int, m: int, device: str) -> ToyModels:
    return toy_models(FEATURES, m, sparsities(count), seeds=range(count), streams=[0] * count, device=device)


def alone(count: int, m: int, device: str) -> list[ToyModels]:
    return [
        toy_models(FEATURES, m, sparsity, seeds=[seed], streams=[0], device=device)
        for seed, sparsity in enumerate(sparsities(count))
    ]


def by_autograd(toys: list[ToyModels], dtype: torch.dtype, steps: int) -> dict[str, Tensor]:
    """The usual loop: one model, one graph, one optimizer. The first gradients, and the last losses."""
    gradients, losses = [], []
    schedule = Schedule(STEPS, BATCH)
    for toy in toys:
        weight = toy.weight.to(dtype, copy=True)[0].requires_grad_()
        bias = toy.bias.to(dtype, copy=True)[0].requires_grad_()
        importance = toy.importance.to(dtype)[0]
        optimizer = torch.optim.Adam([weight, bias], lr=schedule.learning_rate)
        inputs = toy.inputs(BATCH)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            reconstruction_loss(weight, bias, inputs.at(step).to(dtype)[0], importance).backward()
            if step == 0:
                gradients.append(weight.grad.clone())
            optimizer.step()
        with torch.no_grad():
            losses.append(reconstruction_loss(weight, bias, inputs.at(-1).to(dtype)[0], importance))
    return {"gradient": torch.stack(gradients), "loss": torch.stack(losses)}


def closed_form(toys: list[ToyModels]) -> dict[str, Tensor]:
    """First gradients and last losses of ``train``."""
    gradients, losses = [], []
    for toy in toys:
        found = Gradients(toy, BATCH)
        found.at(toy, 0)
        gradients.append(found.weight.clone())
        losses.append(train(toy, Schedule(STEPS, BATCH)))
    return {"gradient": torch.cat(gradients), "loss": torch.cat(losses)}


def bench(count: int, m: int, device: str, seconds: float) -> None:
    schedule = Schedule(STEPS, BATCH)

    def provider(name: str, make: Callable[[], list[ToyModels]]) -> harness.Provider:
        toys = make()

        def run() -> None:
            for toy in toys:
                train(toy, schedule)

        return harness.Provider(name, run, lambda: closed_form(make()))

    singles = alone(count, m, device)
    truth = by_autograd(singles, torch.float64, STEPS)
    plain = by_autograd(singles, torch.float32, STEPS)
    providers = [
        harness.Provider(
            "one by one, autograd", lambda: by_autograd(singles, torch.float32, STEPS),
            lambda: by_autograd(singles, torch.float32, STEPS),
        ),
        provider("one by one, closed form", lambda: alone(count, m, device)),
        provider("all at once", lambda: [models(count, m, device)]),
    ]  # fmt: skip
    case = harness.Case("toy", f"{STEPS} steps of {BATCH} samples", f"{count} x {m} x {FEATURES}", "float32")
    harness.measure(case, providers, truth, plain, device=device, seconds=seconds)


def sweep_time(preset: str, device: str, steps: int) -> None:
    """What a preset's whole training takes, from some steps of its smallest and its largest m."""
    plan = PRESETS[preset]
    at_once = models_that_fit(plan, torch.device(device))
    total = training_seconds(plan, torch.device(device), at_once, steps=steps)
    case = harness.Case(
        "toy", f"{preset} sweep, from {steps} steps of two m", f"{len(plan)} x {plan.features}", "float32"
    )
    name = f"all at once, up to {at_once}"
    harness.record(
        [
            harness.row(case, name, "time of the sweep", total, "s", device),
            harness.row(case, name, "rate of the sweep", len(plan) / total, "models/s", device),
        ],
        device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", choices=PRESETS, help="also this preset's time; paper on a GPU if not given")
    parser.add_argument("--steps", type=int, default=20, help="of two m, for --sweep")
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for all of them
    for count, m in ((32, 16), (32, 64)):
        bench(count, m, options.device, options.seconds)
    preset = options.sweep or ("paper" if options.device.startswith("cuda") else None)
    if preset:
        sweep_time(preset, options.device, options.steps)


if __name__ == "__main__":
    main()
