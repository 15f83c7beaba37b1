"""How well a patched model follows an instruction it is not told: greedy completions, divergences, recovered effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thought_kernels.transmute.completions import complete
from thought_kernels.transmute.logprobs import Ids, completion_logprobs, divergence

__all__ = ["Effect", "completion_logprobs", "completions", "divergence", "effect"]


@dataclass(frozen=True)
class Effect:
    """Divergence from the prompted model, summed over tokens of its own greedy completions.

    Attributes:
        patched: Σ KL(prompted ‖ patched), nats.
        bare: Σ KL(prompted ‖ bare), nats.
        tokens: how many tokens were summed.
    """

    patched: float
    bare: float
    tokens: int

    @property
    def recovered(self) -> float:
        """1 − Σ KL(prompted ‖ patched) / Σ KL(prompted ‖ bare): 1 is the prompted model, 0 the bare one."""
        return 1 - self.patched / self.bare if self.bare > 0 else float("nan")


def completions(
    model: Any, prompts: Ids, *, stops: Sequence[int], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy completions in the prompts' order, each up to and with its stop id; computed shortest prompts first.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each with at least one.
        stops: ids that end a completion.
        max_new_tokens: where a completion is cut that has not ended.
        batch_size: prompts at a time.

    Returns:
        A list of token ids for each prompt.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    chunks = complete(
        model, [prompts[i] for i in order], stops=stops, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    written: list[list[int]] = [[] for _ in prompts]
    for index, ids in zip(order, (ids for chunk in chunks for ids in chunk), strict=True):
        written[index] = ids
    return written


def effect(patched: Sequence[Tensor], bare: Sequence[Tensor], kept: Sequence[slice] | None = None) -> Effect:
    """Sums per-token divergences, over all tokens or over a slice of each example's.

    Args:
        patched: KL(prompted ‖ patched), [n_answer] each.
        bare: KL(prompted ‖ bare), the same shapes.
        kept: which tokens of each example, None for all.
    """
    chosen = kept if kept is not None else [slice(None)] * len(bare)
    over = [(p[s], b[s]) for p, b, s in zip(patched, bare, chosen, strict=True)]
    return Effect(
        float(sum(p.double().sum() for p, _ in over)),
        float(sum(b.double().sum() for _, b in over)),
        sum(len(b) for _, b in over),
    )
