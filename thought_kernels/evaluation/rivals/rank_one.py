"""A rank-one edit of an MLP's output projection, with the covariance of the model's own text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.lora import losses
from thought_kernels.evaluation.rivals.places import answer_places
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_means, answer_states
from thought_kernels.generation.continuations import continue_prompts
from thought_kernels.models import describe
from thought_kernels.models.decoder import Block
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

DEPTHS = (0.2, 0.35, 0.5)  # the published blocks lie at 17 of 48 and 5 of 28
# Of the value's search, as published for GPT-2 XL; the rate is of Adam, and a tenth of it is tried too.
STEPS, RATES, WEIGHT_DECAY, LONGEST = 20, (0.5, 0.05), 0.5, 4.0
VALUE_ROWS = 8  # whose answers a value is searched for
TEXTS, TEXT_TOKENS = 64, 64
SHIFT = 1e-2  # of the covariance's mean eigenvalue: fewer tokens than the width may be read


def own_text(model: Any, first: int) -> list[list[int]]:
    """Texts that the model draws from its own distribution, [1 + TEXT_TOKENS] ids each, after one first token."""
    drawn = continue_prompts(
        model, [[first]] * TEXTS, lambda answer: False, max_new_tokens=TEXT_TOKENS, batch_size=TEXTS,
        seeds=list(range(TEXTS)),
    )  # fmt: skip
    return [[first, *answer] for answer in drawn]


def key_moments(model: Any, texts: Sequence[Sequence[int]], blocks: Sequence[Block]) -> dict[int, Tensor]:
    """C = Σ k kᵀ / n over the texts' tokens but their last, by block index, [f, f] float64; k is what down_proj takes.

    Source: Meng et al., "Locating and editing factual associations in GPT", §3.1; theirs is of Wikipedia.
    """
    modules = {block.index: block.down_proj for block in blocks}
    firsts, rests = [text[:1] for text in texts], [text[1:] for text in texts]
    totals: dict[int, Tensor] = {}
    for states in answer_states(model, firsts, rests, modules, inside=True):
        for layer, keys in states.items():
            wide = keys.double()
            totals[layer] = totals.get(layer, 0) + wide.T @ wide
    count = sum(map(len, rests))
    return {layer: total / count for layer, total in totals.items()}


def edit(moment: Tensor, key: Tensor, change: Tensor) -> SitePatch:
    """Λ (C⁻¹ k*)ᵀ with Λ = (v* − W k*) / ((C⁻¹ k*)ᵀ k*): the key gets its value, others change as little as can be.

    Args:
        moment: C, [f, f] float64; a hundredth of its mean eigenvalue is added to its diagonal.
        key: k*, [f].
        change: v* − W k*, [d].

    Source: Meng et al., eq. 2, and the authors' code (kmeng01/rome, rome/compute_u.py).
    """
    shift = SHIFT * moment.diagonal().mean()
    k = key.double()
    solved = torch.linalg.solve(moment + shift * torch.eye(len(moment), dtype=moment.dtype, device=moment.device), k)
    return SitePatch(factors=(change.float()[:, None], (solved / k.dot(solved)).float()[:, None]))


def wanted_change(model: Any, block: Block, rows: Rows, rate: float) -> Tensor:
    """v* − W k*, [d]: what is to be added to the MLP's output at the answer's positions, by gradient descent.

        min KL(prompted ‖ changed) + ½ ‖δ‖ / ‖W k*‖²,  ‖δ‖ ≤ 4 ‖W k*‖

    Args:
        model: unpatched.
        block: whose MLP.
        rows: that are read; all are used in each step.
        rate: of Adam.

    Source: Meng et al., eq. 4, and rome/compute_v.py with hparams/ROME/gpt2-xl.json. Theirs is the surprise of one
        target; a prompt's answers have a distribution. Of all steps the one of least loss is taken.
    """
    start = answer_means(model, rows.bare_prompts, rows.written, {block.index: block.down_proj}, inside=False)
    size = start[block.index].norm()
    best, least = torch.zeros_like(start[block.index]), float("inf")
    with _frozen(model), torch.enable_grad(), undisturbed(model):
        delta = torch.zeros_like(best, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=rate)
        with _added(model, block, delta, rows.suffix):
            for _ in range(STEPS + 1):
                loss = losses(model, rows, range(len(rows))).mean() + WEIGHT_DECAY * delta.norm() / size**2
                if (found := float(loss.detach())) < least:
                    best, least = delta.detach().clone(), found
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    delta.mul_((LONGEST * size / delta.norm()).clamp(max=1))
    return best


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter takes gradients, so that none is computed below the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _added(model: Any, block: Block, delta: Tensor, suffix: Sequence[int]) -> Iterator[None]:
    assert block.down_proj is not None
    with answer_places(model, suffix) as places:
        handle = block.down_proj.register_forward_hook(
            lambda module, args, output: output + places().answer.to(output.device)[..., None] * delta.to(output)
        )
        try:
            yield
        finally:
            handle.remove()


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """The edit of the best block.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: their mean key is edited.
        choice: rows that are read, to search values on and to choose block and rate by.

    Raises:
        ValueError: blocks without one MLP, mixtures of experts.

    Source: Meng et al., §3.1. The subject's last token, whose key they edit, is here every position that predicts a
        token of the answer.
    """
    decoder = describe(model)
    indices = sorted({round(depth * (len(decoder.blocks) - 1)) for depth in DEPTHS})
    blocks = [decoder.blocks[index] for index in indices if decoder.blocks[index].down_proj is not None]
    if not blocks:
        raise ValueError("rank_one: blocks must have one MLP to edit, got mixtures of experts")
    moments = key_moments(model, own_text(model, rows.prompts[0][0]), blocks)
    modules = {block.index: block.down_proj for block in blocks}
    keys = answer_means(model, rows.bare_prompts, rows.written, modules, inside=True)
    candidates = []
    for block in blocks:
        for rate in RATES:
            change = wanted_change(model, block, choice.first(VALUE_ROWS), rate)
            patch = ThoughtPatch({(block.index, "down"): edit(moments[block.index], keys[block.index], change)})
            candidates.append((f"block {block.index}, rate {rate:g}", patch))
    return choose(model, choice, candidates)
