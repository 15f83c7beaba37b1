"""Toy models of superposition, many of one shape side by side: x' = ReLU(WᵀW x + b) for each, by batched products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.toy.inputs import SparseInputs, checked_count, mixed

_INITIAL = 1  # the second word of a seed: what is drawn from it


@dataclass
class ToyModels:
    """B toy models of one shape, each with its own weights, sparsity and importance.

    Attributes:
        weight: W, [B, m, n], features in columns.
        bias: b, [B, n].
        sparsity: S, [B, n] or [B, 1], in [0, 1).
        importance: I, [B, n] or [B, 1], at least 0.
        streams: which stream of inputs each model sees (see SparseInputs).
    """

    weight: Tensor
    bias: Tensor
    sparsity: Tensor
    importance: Tensor
    streams: tuple[int, ...]

    def __len__(self) -> int:
        return self.weight.shape[0]

    def inputs(self, batch: int) -> SparseInputs:
        """What the models are trained on."""
        return SparseInputs(self.sparsity, self.streams, self.weight.shape[2], batch)


def toy_models(
    features: int,
    dimensions: int,
    sparsity: Tensor | Sequence[float] | float,
    *,
    importance: Tensor | Sequence[float] | float = 1.0,
    seeds: Sequence[int] = (0,),
    streams: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ToyModels:
    """Untrained toy models of one shape, one a seed.

    W ~ N(0, 2/(n + m)), drawn from the model's seed alone, and b = 0.

    Args:
        features: n.
        dimensions: m.
        sparsity: S of every model; one number, one a model [B], or one a model and feature [B, n]; in [0, 1).
        importance: I, in the same forms; a vector is one number a model, so give [1, n] for one a feature.
        seeds: one a model, which sets B.
        streams: the inputs' stream, one a model; the seeds if not given. Models that share one are trained on the same
            draws, which costs less.
        device, dtype: of all tensors; float32 or float64.

    Returns:
        The models. A model is the same whatever the batch around it.

    Raises:
        ValueError: no features, dimensions or seeds, a sparsity outside [0, 1), a negative importance, or lengths that
            do not agree.
        TypeError: another dtype, or what is no number.

    Source: SS §4 and Elhage et al. (2022); the paper leaves the initialisation open, which is theirs here.
    """
    features = checked_count("toy_models", "features", features, 1)
    dimensions = checked_count("toy_models", "dimensions", dimensions, 1)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(message("toy_models", "dtype", "be float32 or float64", dtype))
    count = len(seeds)
    if count == 0:
        raise ValueError(message("toy_models", "seeds", "name at least one model", "none"))
    seeds = [checked_count("toy_models", "seeds", seed, 0) for seed in seeds]
    streams = tuple(seeds if streams is None else (checked_count("toy_models", "streams", s, 0) for s in streams))
    if len(streams) != count:
        raise ValueError(message("toy_models", "streams", f"be one for each of {count} models", len(streams)))
    chosen = _per_model("sparsity", sparsity, count, features, device, dtype)
    if not bool(((chosen >= 0) & (chosen < 1)).all()):
        raise ValueError(message("toy_models", "sparsity", "be in [0, 1)", _range(chosen)))
    weighed = _per_model("importance", importance, count, features, device, dtype)
    if not bool(((weighed >= 0) & weighed.isfinite()).all()):
        raise ValueError(message("toy_models", "importance", "be finite and at least 0", _range(weighed)))

    weight = torch.empty(count, dimensions, features, dtype=dtype)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(mixed(seed, _INITIAL))
        weight[index].normal_(std=(2 / (features + dimensions)) ** 0.5, generator=generator)
    bias = torch.zeros(count, features, dtype=dtype, device=device)
    return ToyModels(weight.to(device), bias, chosen, weighed, streams)


def _per_model(
    name: str,
    value: Tensor | Sequence[float] | float,
    count: int,
    features: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """The value as [B, n] or [B, 1]."""
    try:
        tensor = torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(message("toy_models", name, "be numbers", repr(value)[:80], str(error))) from error
    if tensor.dim() == 0:
        tensor = tensor.reshape(1, 1)
    elif tensor.dim() == 1:
        tensor = tensor.unsqueeze(1)
    if tensor.dim() != 2 or tensor.shape[0] not in (1, count) or tensor.shape[1] not in (1, features):
        rule = f"be a number, [B] or [B, n] with B = {count}, n = {features}"
        raise ValueError(message("toy_models", name, rule, list(tensor.shape)))
    return tensor.expand(count, tensor.shape[1]).contiguous()


def _range(tensor: Tensor) -> str:
    return f"{float(tensor.min()):g} to {float(tensor.max()):g}"


def reconstruct(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """What the models make of their inputs, x' = ReLU(WᵀW x + b).

    Args:
        weight: W, [..., m, n].
        bias: b, [..., n].
        x: [..., batch, n].

    Returns:
        x', like x.

    Source: SS §4.
    """
    return torch.relu(x @ weight.mT @ weight + bias.unsqueeze(-2))


def reconstruction_loss(weight: Tensor, bias: Tensor, x: Tensor, importance: Tensor) -> Tensor:
    """Each model's loss, L = ½ · mean over samples of Σ_i I_i (x_i − x'_i)².

    Args:
        weight: W, [..., m, n].
        bias: b, [..., n].
        x: [..., batch, n].
        importance: I, [..., n] or [..., 1].

    Returns:
        [...], differentiable.

    Source: SS appendix F.2, whose ½ §4.1 leaves out.
    """
    error = reconstruct(weight, bias, x) - x
    return 0.5 * (importance.unsqueeze(-2) * error * error).sum(-1).mean(-1)


class Gradients:
    """The loss's gradients in closed form, for a batch of models, without a graph and without new memory.

    With δ = I ⊙ (x − x') ⊙ 1(u > 0), averages over samples: ∂L/∂b = −δ and ∂L/∂W = −W(δxᵀ + xδᵀ) = WΦ, taken as
    −(Wδ)xᵀ − (Wx)δᵀ: five products of [batch, n] with m, and never an n x n matrix.

    Args:
        models: whose shapes are used.
        batch: samples a step.

    Source: SS appendix F, equations F.2 and ∇_W L = WΦ of Theorem 18.
    """

    def __init__(self, models: ToyModels, batch: int) -> None:
        count, _, features = models.weight.shape
        self._x = models.weight.new_empty(count, batch, features)
        self._error = torch.empty_like(self._x)
        self._active = torch.empty_like(self._x)
        self._importance = models.importance.unsqueeze(1) / batch
        self._plain = bool((models.importance == 1).all())
        self._batch = batch
        self._inputs = models.inputs(batch)
        self.weight = torch.empty_like(models.weight)
        self.bias = torch.empty_like(models.bias)

    def at(self, models: ToyModels, step: int) -> None:
        """Overwrites ``weight`` [B, m, n] and ``bias`` [B, n] with the gradients on one step's inputs."""
        x = self._inputs.at(step, out=self._x)
        hidden = torch.bmm(x, models.weight.mT)  # [B, batch, m]
        drive = torch.baddbmm(models.bias.unsqueeze(1), hidden, models.weight, out=self._error)  # u, [B, batch, n]
        # (x' − x) where u > 0, and 0 elsewhere, where ReLU passes nothing back.
        torch.gt(drive, 0, out=self._active)
        error = drive.sub_(x).mul_(self._active)
        error.mul_(1 / self._batch) if self._plain else error.mul_(self._importance)
        torch.sum(error, 1, out=self.bias)
        torch.bmm(hidden.mT, error, out=self.weight)
        self.weight.baddbmm_(torch.bmm(models.weight, error.mT), x)
