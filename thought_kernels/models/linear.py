"""Linear modules: their weights whichever way round they are stored, and their products where torch's are slow.

torch hands float32 products to MKL, which on AMD processors uses half of the vector units' width: oneDNN is faster
there, 1.4 to 2.5 times where it was measured (benchmarks/measure/bench_linear.py). It is part of torch; float64 it has
not, and bfloat16 torch gives it already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thought_kernels.ops.checks import FLOATS
from thought_kernels.ops.eager import is_eager


def is_transposed(module: Any) -> bool:
    """Whether it is transformers' Conv1D, a linear module (GPT-2's) whose weight is stored as Wᵀ, [d_in, d_out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: Any) -> bool:
    """Whether it is torch's linear module, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_plain(weight: object) -> bool:
    """Whether a weight can be read and written as it is.

    Quantised and sharded weights are integers, 8-bit floats, tensor subclasses, methods, or elsewhere (on meta).
    """
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        return False
    return weight.dtype in FLOATS and not weight.is_meta


def linear_weight(module: Any) -> Tensor:
    """W [d_out, d_in] of a linear module or Conv1D: the weight itself, or a view through which it can be written."""
    return module.weight.T if is_transposed(module) else module.weight


def bias_of(module: Any) -> Tensor | None:
    """b [d_out] of a linear module, None where it has none. Those that torch has quantised have a method for it."""
    bias = getattr(module, "bias", None)
    return bias() if callable(bias) else bias


def input_width(module: Any) -> int:
    """d_in of a linear module, quantised and wrapped ones included."""
    return module.nx if is_transposed(module) else module.in_features


# Below so many multiply-adds oneDNN's fixed cost of some 10 µs a call is more than it saves.
FEWEST_PRODUCTS = 1 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, the same but for rounding, where torch's own way is slow.

    x Wᵀ + b, x [..., d_in], W [d_out, d_in], in the dtype as before.

    - Large float32 products on CPUs are oneDNN's, without gradients. Each output is one chain of additions, where MKL
      has several: the rounding error, about √d_in eps / 4, is up to twice as large (bench_linear.py measures it).
      Processors without AVX-512, builds of torch without oneDNN, autocast, and biases that are spread or strided keep
      torch's own choice.
    - x [B, T, d_in] may be cut from a longer one, as the last tokens are that a language-model head is given. Torch
      then takes W B times, and in bfloat16 copies it each time, unless W takes gradients. Here it is one product.
    """
    if is_eager():
        if _AVAILABLE and _suits(x, weight, bias):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if _is_cut(x, weight, bias):
            return nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])
    return nn.functional.linear(x, weight, bias)


class FastLinear(TorchFunctionMode):
    """Within it, ``torch.nn.functional.linear`` is `linear`.

    It acts on the function, not on the module, so hooks, adapters and replaced modules take part as ever. It sees every
    call of torch's, which takes time where products are small: for a module or a few.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """torch's own linear modules of a model multiply by `linear`; those that somebody gave another forward keep it."""
    changed = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for module in changed:
        vars(module)["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:  # the name that torch has for it
    return linear(input, module.weight, module.bias)


def _is_cut(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether x has rows in several dimensions that do not lie one after the other, and may be multiplied in one."""
    if type(x) is not Tensor or x.layout != torch.strided or x.dim() < 3 or not x.numel():
        return False
    strided = any(x.stride(i) != x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    return strided and weight.dim() == 2 and (bias is None or bias.dim() == 1)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in operands)
        and all(t.layout == torch.strided for t in operands)
        and weight.dim() == 2
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and _is_laid_out(weight)
        # Of another bias the operator reads other numbers, or none, without a word.
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and x.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_laid_out(weight: Tensor) -> bool:
    """Whether rows, or columns, follow each other without overlap."""
    (rows, columns), (down, along) = weight.shape, weight.stride()
    return (along == 1 and down >= columns) or (down == 1 and along >= rows)


_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
