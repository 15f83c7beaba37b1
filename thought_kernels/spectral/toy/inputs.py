"""Sparse inputs for many toy models at once, a pure function of (stream, step): nothing to save, nothing to replay."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.ops.library import message

_MASK = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """A 63-bit seed from several integers, far apart for neighbours (splitmix64 over each in turn)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def checked_count(function: str, name: str, number: Any, least: int) -> int:
    """The number as an int, numpy's integers too; raises unless it is one and at least ``least``."""
    try:
        count = operator.index(number)
    except TypeError:
        count = None
    if count is None or isinstance(number, bool):
        raise TypeError(message(function, name, "be an integer", repr(number)))
    if count < least:
        raise ValueError(message(function, name, f"be at least {least}", count))
    return count


class SparseInputs:
    """Batches x [models, batch, n] with P(x_i = 0) = S_i and x_i uniform on [0, 1] otherwise.

    x_i = max(u_i − S_i, 0) / (1 − S_i) for one uniform u_i, which has exactly that law. Models that name the same
    stream see the same u, each thresholded at its own sparsity, so a draw is made once per stream and not once per
    model; and since u depends on (stream, step) only, a model sees the same inputs alone, in any batch, and after a
    restart.

    Args:
        sparsity: S, [models, n] or [models, 1], in [0, 1).
        streams: one integer a model; runs of equal streams share a draw.
        batch: samples a step.
    """

    def __init__(self, sparsity: Tensor, streams: Sequence[int], features: int, batch: int) -> None:
        self._shape = (batch, features)
        self._sparsity = sparsity.unsqueeze(1)
        self._scale = 1 / (1 - self._sparsity)
        self._generator = torch.Generator(sparsity.device)
        ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(streams)))
        starts = [0, *ends[:-1]]
        self._runs = [(streams[start], slice(start, end)) for start, end in zip(starts, ends, strict=True)]

    def at(self, step: int, out: Tensor | None = None) -> Tensor:
        """The inputs of one step (counted from 0; negative steps are never trained on).

        Args:
            step: which batch of the streams.
            out: [models, batch, n], overwritten and returned; a new tensor if not given.

        Returns:
            x [models, batch, n], of sparsity's dtype and device.
        """
        sparsity = self._sparsity
        if out is None:
            out = torch.empty(sparsity.shape[0], *self._shape, dtype=sparsity.dtype, device=sparsity.device)
        drawn: dict[int, Tensor] = {}
        for stream, models in self._runs:
            if stream not in drawn:
                self._generator.manual_seed(mixed(stream, step))
                drawn[stream] = torch.rand(self._shape, generator=self._generator, dtype=out.dtype, device=out.device)
            torch.sub(drawn[stream], sparsity[models], out=out[models])
        return out.clamp_(min=0).mul_(self._scale)
