"""How well a patched model follows an instruction it is not told: divergences, recovered effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
