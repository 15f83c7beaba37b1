"""Published recipes as keyword arguments of transmute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thought_kernels.ops.checks import check_number


def paper_recipe(
    *, c1: float = 0.015, c2: float = 0.0, layers: Iterable[int] = range(10, 20), steps: int = 300
) -> dict[str, Any]:
    """Algorithm 1 with the paper's practice, as arguments for transmute: `transmute(..., **paper_recipe())`.

        ΔW_l = c1/steps Σ_e (1/n_e) Σ_i δ_i a_iᵀ / ‖a_i‖          δb_l = c2/steps Σ_e (1/n_e) Σ_i δ_i

    `steps` is the constant that the paper divides by (300), not the number of examples, so that the effective c1,
    c1 · examples / steps, grows with the examples. An example without a completion gets one, the likeliest.

    Args:
        c1: scale of the matrices. The paper took 0.015 for addition and multiplication, 0.03 for translation.
        c2: scale of the vectors: 0 for addition and multiplication, 0.2 for translation.
        layers: 0-based block indices; the paper's "10 through 20" of 26 blocks, read as 10..19.
        steps: the constant divisor.

    Returns:
        Keyword arguments of transmute. The matrices act on the MLP inputs, the vectors on the block outputs.

    Raises:
        ValueError: if c1 or c2 is not finite, or steps is not positive.
        TypeError: if one of them is not a number.

    Source: "Transmuting prompts into weights", Algorithm 1 and §4.1 to §4.3.
    """
    check_number("paper_recipe", "c1", c1)
    check_number("paper_recipe", "c2", c2)
    check_number("paper_recipe", "steps", steps, positive=True)
    return {
        "layers": list(layers),
        "sites": ("mlp", "residual"),
        "pairing": "two_pass",
        "estimator": "mean",
        "normalization": "norm",
        "tokens": "all",
        "header_weight": 0.0,
        "completions": 1,
        "scale": {"mlp": c1 / steps, "residual": c2 / steps},
    }
