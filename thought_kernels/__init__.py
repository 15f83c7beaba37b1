"""Thought kernels: turn an instruction into a weight update, on a CPU or a GPU.

Importing the package registers the operators `torch.ops.thought_kernels.*` and nothing else: the model adapters, the
fitting and the spectral tools are imported when one of their names is first used. Neither the compiled extension, nor
triton, transformers or a GPU need be present.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("torch") is None:
    raise ImportError(
        "thought_kernels: torch must be installed, got none; install the build for your machine first, "
        "for example `pip install torch==2.13.0`"
    )

from thought_kernels.ops.accumulate import accumulate, accumulate_pair
from thought_kernels.ops.library import available_backends
from thought_kernels.ops.paired_attention import paired_attention
from thought_kernels.ops.rms_norm_pair import rms_norm_pair
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention

if TYPE_CHECKING:
    from thought_kernels.evaluate.evaluate import evaluate as evaluate
    from thought_kernels.models.load import load as load
    from thought_kernels.transmute.accumulator import ThoughtAccumulator as ThoughtAccumulator
    from thought_kernels.transmute.patch import ThoughtPatch as ThoughtPatch
    from thought_kernels.transmute.prompt import align as align
    from thought_kernels.transmute.recipe import paper_recipe as paper_recipe
    from thought_kernels.transmute.replay import replay as replay
    from thought_kernels.transmute.transmute import transmute as transmute

__version__ = "0.1.0"

__all__ = [
    "ThoughtAccumulator",
    "ThoughtPatch",
    "accumulate",
    "accumulate_pair",
    "align",
    "available_backends",
    "evaluate",
    "load",
    "paired_attention",
    "paper_recipe",
    "replay",
    "rms_norm_pair",
    "shared_prefix_attention",
    "transmute",
]

_LAZY = {  # public name -> the module that defines it
    "ThoughtAccumulator": "thought_kernels.transmute.accumulator",
    "ThoughtPatch": "thought_kernels.transmute.patch",
    "align": "thought_kernels.transmute.prompt",
    "load": "thought_kernels.models.load",
    "paper_recipe": "thought_kernels.transmute.recipe",
    "replay": "thought_kernels.transmute.replay",
}
# Packages, imported at first use; evaluate and transmute are called like the functions they hold, see
# callable_package.py.
_LAZY_PACKAGES = ("evaluate", "spectral", "transmute")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _LAZY_PACKAGES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
