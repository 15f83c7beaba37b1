"""RMSNorm and LayerNorm, in float64 for a float64 model, and how they change when their input is shifted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thought_kernels.ops.rms_norm_pair import rms_norm_pair


@dataclass(frozen=True, eq=False)
class Norm:
    """n(z) = (weight_offset + weight) ⊙ z / √(mean z² + eps) + bias, in float64 for float64 z and float32 otherwise.

    LayerNorm is the same of z − mean z.

    Attributes:
        module: holds `weight`, perhaps `bias`, and the forward hooks to run.
        eps: added to the mean square.
        weight_offset: 1.0 where the checkpoint stores the scale minus one, as Gemma does.
        centred: whether it is a LayerNorm.
    """

    module: Any
    eps: float
    weight_offset: float = 0.0
    centred: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        z = self._centre(x.to(dtype))
        normed = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        out = self._plus_bias(normed.mul_(self.weight_offset + self.module.weight.to(dtype)))
        return hooked(self.module, (x,), out.to(x.dtype))

    def pair(self, x: Tensor, delta: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(n(x), n(x + delta) − n(x)), the second in delta's dtype and in difference form (theory §4).

        With a residual stream the first is residual + n(x), in one kernel unless hooks are to see n(x) itself.
        """
        run = partial(rms_norm_pair, weight=self.module.weight, eps=self.eps, weight_offset=self.weight_offset)
        if self.centred:
            # In float32 at least: centring in bfloat16 would round what the norm then divides by its size.
            z = self._centre(x.to(wide(x.dtype)))
            normed, change = run(z, self._centre(delta))
            normed = self._plus_bias(normed).to(x.dtype)
        elif residual is not None and residual.dtype == x.dtype and not self.module._forward_hooks:
            return run(x, delta, residual=residual)
        else:
            normed, change = run(x, delta)
        normed = hooked(self.module, (x,), normed)
        return normed if residual is None else residual + normed, change

    def _centre(self, z: Tensor) -> Tensor:
        return z - z.mean(-1, keepdim=True) if self.centred else z

    def _plus_bias(self, out: Tensor) -> Tensor:
        bias = getattr(self.module, "bias", None)
        return out if bias is None else out + bias.to(out.dtype)


def hooked(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """`out` after the forward hooks of a module whose own forward was not called but computed here.

    Patches and steering tools add to a norm's or a layer's output by such hooks. These hooks take part:

    - on linear modules, the embedding, the MLP and the head, which are called: all of theirs, and pre-hooks;
    - on norms: forward hooks, given the norm's input; norms of a head's queries and keys see heads before tokens. The
      change that Norm.pair returns does not pass through them;
    - on decoder layers: forward hooks, given the residual stream and no keyword arguments; `out` is a tensor.

    These do not: pre-hooks of norms and decoder layers, any hook of the attention, the decoder or the model itself, and
    hooks that are registered for all modules at once.
    """
    for key, hook in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        result = hook(module, args, {}, out) if with_kwargs else hook(module, args, out)
        out = out if result is None else result
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
