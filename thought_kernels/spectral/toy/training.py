"""Training many toy models at once: closed-form gradients, one Adam, checkpoints, and exact restarts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from thought_kernels.ops.checks import check_number
from thought_kernels.ops.library import message
from thought_kernels.spectral.toy.inputs import checked_count
from thought_kernels.spectral.toy.models import Gradients, ToyModels, reconstruction_loss

STATE = "state.safetensors"
HISTORY = "step-{:08d}.safetensors"
SCHEDULES = ("cosine", "constant")
_EVALUATION = -1  # a step of the streams that is never trained on


@dataclass(frozen=True)
class Schedule:
    """How toy models are trained.

    Attributes:
        steps: of Adam.
        batch: fresh samples a step.
        learning_rate: at the start.
        shape: "cosine" falls to 0 at the last step, so that what is left of W is not the noise of the last batches;
            "constant" is what Elhage et al. (2022) use.
    """

    steps: int
    batch: int = 1024
    learning_rate: float = 1e-3
    shape: str = "cosine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_count("Schedule", "steps", self.steps, 0))
        object.__setattr__(self, "batch", checked_count("Schedule", "batch", self.batch, 1))
        check_number("Schedule", "learning_rate", self.learning_rate, positive=True)
        if self.shape not in SCHEDULES:
            raise ValueError(message("Schedule", "shape", f"be one of {SCHEDULES}", repr(self.shape)))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.shape == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """About ``count`` steps from 0 to ``steps``, both included, closer together at the start, where most happens.

    Args:
        steps: the last one.
        count: how many at most; 0 for none.

    Returns:
        Ascending, without repetitions.
    """
    if count <= 0:
        return []
    if count == 1:
        return [steps]
    return sorted({round(steps * (index / (count - 1)) ** 2) for index in range(count)})


def train(
    models: ToyModels,
    schedule: Schedule,
    *,
    folder: str | os.PathLike[str] | None = None,
    checkpoints: Sequence[int] = (),
    save_every: int | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> Tensor:
    """Trains the models in place by Adam on the reconstruction loss.

    A model ends the same (to rounding) whether it is trained alone or in a batch, and whether or not the run was
    interrupted: inputs depend on (stream, step) only, and no operation mixes models.

    Args:
        models: overwritten. Where ``folder`` holds a state, training goes on from it.
        schedule: steps, batch and learning rate.
        folder: for checkpoints; created if it does not exist. Nothing is written if not given.
        checkpoints: numbers of steps after which W and b are kept, in a file each.
        save_every: steps between two savings of everything a restart needs, which is also saved at the end; only at
            the end if not given.
        progress: called with the number of steps done since the last call.

    Returns:
        Each model's loss on fresh inputs after the last step, [B].

    Raises:
        ValueError: a folder whose state is of another run (other shapes, start, streams or schedule), or damaged.

    Source: SS §4, the loss of §4.1; optimiser and steps are not given there.
    """
    parameters = [torch.nn.Parameter(models.weight), torch.nn.Parameter(models.bias)]
    gradients = Gradients(models, schedule.batch)
    for parameter, gradient in zip(parameters, (gradients.weight, gradients.bias), strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate, fused=True)
    store = None if folder is None else _Store(Path(folder), models, schedule)
    first = store.load(parameters, optimizer) if store else 0
    kept = set(checkpoints) if store else set()
    if store and first == 0 and 0 in kept:
        store.keep(0, models)
    for step in range(first, schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        gradients.at(models, step)
        optimizer.step()
        done = step + 1
        if store and done in kept:
            store.keep(done, models)
        if store and (done == schedule.steps or (save_every and done % save_every == 0)):
            store.save(done, parameters, optimizer)
        progress(1)
    return evaluate(models, schedule.batch)


def evaluate(models: ToyModels, batch: int) -> Tensor:
    """Each model's loss on inputs it was never trained on, [B]; the same inputs whenever called."""
    return reconstruction_loss(models.weight, models.bias, models.inputs(batch).at(_EVALUATION), models.importance)


class _Store:
    """A run's folder: the state of a restart, replaced as a whole, and the checkpoints kept along the way."""

    def __init__(self, folder: Path, models: ToyModels, schedule: Schedule) -> None:
        self._folder = folder
        self._run = {
            "schedule": asdict(schedule),
            "shape": list(models.weight.shape),
            "dtype": str(models.weight.dtype),
            "streams": list(models.streams),
            "sparsity": models.sparsity.tolist(),
            "importance": models.importance.tolist(),
            "start": hashlib.sha256(models.weight.cpu().numpy().tobytes()).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Adam) -> int:
        """Copies a saved state into the parameters and the optimizer; returns the number of steps it had done."""
        path = self._folder / STATE
        if not path.exists():
            return 0
        try:
            with safetensors.safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(message("train", "folder", "hold a state of toy models", path, str(error))) from error
        step = record.pop("step")
        if record != self._run:
            wrong = sorted(name for name in self._run if record.get(name) != self._run[name])
            raise ValueError(
                message("train", "folder", "hold a state of this run", f"another {', '.join(wrong)}", str(path))
            )
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{index}.value"])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
                    "exp_avg": tensors[f"{index}.mean"].to(parameter),
                    "exp_avg_sq": tensors[f"{index}.square"].to(parameter),
                }
        return step

    def save(self, step: int, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Adam) -> None:
        """Everything a restart needs."""
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            values = {"value": parameter.detach(), "mean": state["exp_avg"], "square": state["exp_avg_sq"]}
            tensors |= {f"{index}.{name}": value for name, value in values.items()}
        write_tensors(self._folder / STATE, tensors, {"run": json.dumps({**self._run, "step": step})})

    def keep(self, step: int, models: ToyModels) -> None:
        """A checkpoint: W and b."""
        path = self._folder / HISTORY.format(step)
        write_tensors(path, {"weight": models.weight, "bias": models.bias}, {"step": str(step)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, complete under a temporary name before it takes its own."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(cpu, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def history(folder: str | os.PathLike[str]) -> list[tuple[int, Tensor, Tensor]]:
    """The checkpoints of a run, as (step, W [B, m, n], b [B, n]), by step.

    Args:
        folder: as given to ``train``.

    Raises:
        ValueError: a folder without checkpoints.
    """
    found = []
    for path in sorted(Path(folder).glob("step-*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        found.append((int(path.stem.removeprefix("step-")), tensors["weight"], tensors["bias"]))
    if not found:
        raise ValueError(message("history", "folder", "hold checkpoints", "none", str(folder)))
    return found
