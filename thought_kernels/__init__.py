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
from thought_kernels.ops.gathered_low_rank import gathered_low_rank
from thought_kernels.ops.library import available_backends
from thought_kernels.ops.paired_attention import paired_attention
from thought_kernels.ops.rms_norm_pair import rms_norm_pair
from thought_kernels.ops.shared_prefix_attention import shared_prefix_attention
from thought_kernels.version import __version__ as __version__

if TYPE_CHECKING:
    from thought_kernels.estimation.accumulator import ThoughtAccumulator as ThoughtAccumulator
    from thought_kernels.evaluation.evaluate import evaluate as evaluate
    from thought_kernels.fitting.chats import write_chats as write_chats
    from thought_kernels.fitting.recipe import Recipe as Recipe
    from thought_kernels.fitting.recipe import paper_recipe as paper_recipe
    from thought_kernels.fitting.transmute import transmute as transmute
    from thought_kernels.models.load import load as load
    from thought_kernels.pairing.replay import replay as replay
    from thought_kernels.patches.mixed import MixedPatches as MixedPatches
    from thought_kernels.patches.patch import ThoughtPatch as ThoughtPatch
    from thought_kernels.prompts.prompt import align as align

__all__ = [
    "MixedPatches",
    "Recipe",
    "ThoughtAccumulator",
    "ThoughtPatch",
    "accumulate",
    "accumulate_pair",
    "align",
    "available_backends",
    "evaluate",
    "gathered_low_rank",
    "load",
    "paired_attention",
    "paper_recipe",
    "replay",
    "rms_norm_pair",
    "shared_prefix_attention",
    "transmute",
    "write_chats",
]

_LAZY = {  # public name -> the module that defines it
    "MixedPatches": "thought_kernels.patches.mixed",
    "Recipe": "thought_kernels.fitting.recipe",
    "ThoughtAccumulator": "thought_kernels.estimation.accumulator",
    "ThoughtPatch": "thought_kernels.patches.patch",
    "align": "thought_kernels.prompts.prompt",
    "evaluate": "thought_kernels.evaluation.evaluate",
    "load": "thought_kernels.models.load",
    "paper_recipe": "thought_kernels.fitting.recipe",
    "replay": "thought_kernels.pairing.replay",
    "transmute": "thought_kernels.fitting.transmute",
    "write_chats": "thought_kernels.fitting.chats",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name == "spectral":
        value = import_module("thought_kernels.spectral")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
