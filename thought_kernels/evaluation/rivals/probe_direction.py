"""Directions of linear probes on heads, inference-time intervention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_states
from thought_kernels.evaluation.rivals.steering import Steering
from thought_kernels.models import describe

PROBED_ROWS = 64
HELD_BACK = 0.2  # of the rows, for the probes' accuracy
# The paper's 48 of 1024 heads at strength 15, and more heads moved less, which small models take better.
HEAD_SHARES = (1 / 20, 1 / 8, 1 / 4, 1 / 2)
STRENGTHS = (0.5, 1.0, 2.0, 5.0, 15.0)
NEWTON_STEPS = 30


class Probe(NamedTuple):
    """What is known of one head.

    Attributes:
        layer, head: where it is.
        accuracy: of the probe on rows held back.
        loss: its cross entropy there, nats: of probes that err alike, such as never, the surer is the better.
        directions: unit vectors by kind, "probe weight" and "mass mean shift", [D].
        spreads: standard deviation of the head's outputs along each, by kind.
    """

    layer: int
    head: int
    accuracy: float
    loss: float
    directions: dict[str, Tensor]
    spreads: dict[str, float]


def logistic_weights(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression by Newton's method, w and b of  min ½ ‖w‖² + Σ log(1 + exp(−y (w·x + b))).

    Args:
        points: x, [n, D].
        labels: bool [n], y = 1 where true and −1 elsewhere.

    Returns:
        w [D] and b [], float64: what scikit-learn's LogisticRegression finds with its defaults.
    """
    x = torch.cat([points.double(), torch.ones(len(points), 1, dtype=torch.float64)], 1)
    target, penalty = labels.double(), torch.ones(x.shape[1], dtype=torch.float64)
    penalty[-1] = 0

    def loss(weights: Tensor) -> float:
        margins = torch.where(labels, -(x @ weights), x @ weights)
        return float(0.5 * (penalty * weights.square()).sum() + torch.nn.functional.softplus(margins).sum())

    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(x @ weights)
        gradient = penalty * weights + x.T @ (p - target)
        hessian = torch.diag(penalty + 1e-9) + (x * (p * (1 - p))[:, None]).T @ x
        step, length = torch.linalg.solve(hessian, gradient), 1.0
        while loss(weights - length * step) > loss(weights) and length > 1e-6:
            length /= 2
        weights = weights - length * step
        if float(step.norm()) < 1e-8 * float(1 + weights.norm()):
            break
    return weights[:-1], weights[-1]


def probes(model: Any, rows: Rows) -> list[Probe]:
    """A probe of every head, told outputs with the instruction from those without, best accuracy first.

    Args:
        model: unpatched.
        rows: the examples; outputs are read at each position that predicts a token of the answer.

    Source: Li et al., "Inference-time intervention: eliciting truthful answers from a language model", §3.1-3.2, and
        the authors' code (likenneth/honest_llama, utils.py and validation/validate_2fold.py).
    """
    rows = rows.first(PROBED_ROWS)
    held_back = math.ceil(HELD_BACK * len(rows))
    blocks = describe(model).blocks
    modules = {block.index: block.o_proj for block in blocks}
    read = [
        list(answer_states(model, prompts, rows.written, modules, inside=True))
        for prompts in (rows.prompts, rows.bare_prompts)
    ]
    found = []
    for block in blocks:
        told, bare = ([states[block.index].float().cpu() for states in side] for side in read)
        for head in range(block.num_attention_heads):
            part = slice(head * block.head_dim, (head + 1) * block.head_dim)
            found.append(_probe(block.index, head, [t[:, part] for t in told], [b[:, part] for b in bare], held_back))
    return sorted(found, key=lambda probe: (-probe.accuracy, probe.loss))


def _probe(layer: int, head: int, told: Sequence[Tensor], bare: Sequence[Tensor], held_back: int) -> Probe:
    """The last rows are held back from fitting the probe, and only its accuracy is measured on them."""
    # Of one row alone nothing can be held back.
    kept = max(1, len(told) - held_back)
    points, labels = _labelled(told[:kept], bare[:kept])
    weights, bias = logistic_weights(points, labels)
    tested, truth = _labelled(told[kept:] or told, bare[kept:] or bare)
    margins = (tested.double() @ weights + bias) * torch.where(truth, 1.0, -1.0)
    accuracy, loss = float((margins > 0).double().mean()), float(torch.nn.functional.softplus(-margins).mean())
    shift = points[labels].mean(0) - points[~labels].mean(0)
    directions = {
        "probe weight": torch.nn.functional.normalize(weights.float(), dim=0),
        "mass mean shift": torch.nn.functional.normalize(shift, dim=0),
    }
    every, _ = _labelled(told, bare)
    spreads = {kind: float((every @ direction).std()) for kind, direction in directions.items()}
    return Probe(layer, head, accuracy, loss, directions, spreads)


def _labelled(told: Sequence[Tensor], bare: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    points = torch.cat([*told, *bare])
    return points, torch.arange(len(points)) < sum(map(len, told))


def intervention(model: Any, chosen: Sequence[Probe], kind: str, strength: float, suffix: Sequence[int]) -> Steering:
    """α σ θ added to the output of each chosen head from the prompt's last token on.

    Source: Li et al., eq. 2.
    """
    blocks = describe(model).blocks
    vectors: dict[int, Tensor] = {}
    for probe in chosen:
        block = blocks[probe.layer]
        vector = vectors.setdefault(probe.layer, torch.zeros(block.attention_width))
        part = slice(probe.head * block.head_dim, (probe.head + 1) * block.head_dim)
        vector[part] = strength * probe.spreads[kind] * probe.directions[kind]
    return Steering(vectors, suffix, heads=True)


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """The best kind of direction, number of heads K and strength α.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: to fit probes on.
        choice: rows that are read, to choose by.

    Source: Li et al., §3.2 (the intervention), §4.2 (its two hyperparameters), table 3 (both kinds of direction).
    """
    found = probes(model, rows)
    suffix = choice.suffix
    counts = sorted({max(1, round(share * len(found))) for share in HEAD_SHARES})
    candidates = [
        (f"{kind}, {count} heads, strength {strength:g}", intervention(model, found[:count], kind, strength, suffix))
        for kind in ("probe weight", "mass mean shift")
        for count in counts
        for strength in STRENGTHS
    ]
    return choose(model, choice, candidates)
