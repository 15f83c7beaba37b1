"""Steering vectors as they are published: added to the residual stream from the last prompt token on, or everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.models import describe
from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.models.linear import linear_weight
from thought_kernels.models.undisturbed import undisturbed

TOP_HEADS = 10
PLACES = ("answer", "everywhere")


class Steering:
    """Adds a vector to a block's output.

    Args:
        layer: 0-based block index.
        vector: v, [d].
        suffix: token ids that every prompt ends with, see common_suffix; v is added from their last token on. Empty
            adds it everywhere.
    """

    def __init__(self, layer: int, vector: Tensor, suffix: Sequence[int] = ()) -> None:
        self._layer, self._vector, self._suffix = layer, vector, tuple(suffix)

    def __mul__(self, factor: float) -> Steering:
        return Steering(self._layer, self._vector * factor, self._suffix)

    __rmul__ = __mul__

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with the vector added, as a context manager."""
        with answer_positions(model, self._suffix) as positions:

            def add(module: Any, args: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                mask = positions().to(stream.device)[..., None]
                stream = stream + mask * self._vector.to(stream.device, stream.dtype)
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            handle = describe(model).blocks[self._layer].layer.register_forward_hook(add)
            try:
                yield
            finally:
                handle.remove()


def common_suffix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The longest list of ids that all prompts end with: the generation prompt, and what the inputs share before it."""
    shortest = min(map(len, prompts))
    length = 0
    while length < shortest and len({prompt[-1 - length] for prompt in prompts}) == 1:
        length += 1
    return list(prompts[0][len(prompts[0]) - length :])


@contextlib.contextmanager
def answer_positions(model: Any, suffix: Sequence[int]) -> Iterator[Callable[[], Tensor]]:
    """Says during each forward of the model which positions write the answer: the prompt's last token and all after it.

    The prompt's end is the last occurrence of `suffix`; ids without one (a step of cached generation) are all answer.

    Args:
        model: a transformers model, called with input_ids.
        suffix: ids that end every prompt; empty makes every position count.

    Yields:
        A function that returns the current forward's mask, bool [B, T].
    """
    current: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        current[:] = [_after(ids, suffix)]

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lambda: current[0]
    finally:
        handle.remove()


def _after(ids: Tensor, suffix: Sequence[int]) -> Tensor:
    rows, length = ids.shape
    if not suffix or length < len(suffix):
        return torch.ones_like(ids, dtype=torch.bool)
    found = (ids.unfold(1, len(suffix), 1) == torch.tensor(list(suffix), device=ids.device)).all(-1)
    places = torch.arange(found.shape[1], device=ids.device).expand(rows, -1)
    last = places.masked_fill(~found, -len(suffix)).amax(1) + len(suffix) - 1  # −1 where there is none
    return torch.arange(length, device=ids.device)[None] >= last[:, None]


def mean_differences(trial: Trial, model: Any) -> dict[int, Tensor]:
    """Per block, the mean over answer positions of its output with minus without the instruction, [d], float32.

    Source: Rimsky et al., "Steering Llama 2 via contrastive activation addition", §3; the contrast is the instruction.
    """
    blocks = describe(model).blocks
    means = [
        _answer_means(model, prompts, trial.written, {block.index: block.layer for block in blocks}, inside=False)
        for prompts in (trial.prompts, trial.bare_prompts)
    ]
    return {index: means[0][index] - means[1][index] for index in means[0]}


@torch.no_grad()
def _answer_means(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    modules: dict[int, Any],
    *,
    inside: bool,
) -> dict[int, Tensor]:
    """The mean input (inside) or output of modules over the positions that predict the answers' tokens."""
    device = model.get_input_embeddings().weight.device
    totals: dict[int, Tensor] = {}
    count = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        seen: dict[int, Tensor] = {}

        def keep(index: int, seen: dict[int, Tensor] = seen) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any = None) -> None:
                seen[index] = args[0] if inside else (output[0] if isinstance(output, tuple) else output)

            return hook

        handles = [
            module.register_forward_pre_hook(keep(index)) if inside else module.register_forward_hook(keep(index))
            for index, module in modules.items()
        ]
        try:
            with undisturbed(model):
                model(input_ids=torch.tensor([[*prompt, *answer]], device=device), logits_to_keep=1, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for index, states in seen.items():
            rows = states[0, len(prompt) - 1 : -1].double().sum(0)
            totals[index] = totals.get(index, 0) + rows
        count += len(answer)
    return {index: (total / count).float() for index, total in totals.items()}


class _HeadReplaced:
    """One head's output at the answer positions replaced by a given mean."""

    def __init__(self, block: Block, head: int, mean: Tensor, suffix: Sequence[int]) -> None:
        self._block, self._suffix = block, suffix
        self._slice = slice(head * block.head_dim, (head + 1) * block.head_dim)
        self._mean = mean[self._slice]

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with the head replaced, as a context manager."""
        with answer_positions(model, self._suffix) as positions:

            def replace(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                o = args[0].clone()
                mask = positions().to(o.device)[..., None]
                o[..., self._slice] = torch.where(mask, self._mean.to(o.device, o.dtype), o[..., self._slice])
                return (o, *args[1:])

            handle = self._block.o_proj.register_forward_pre_hook(replace)
            try:
                yield
            finally:
                handle.remove()


def function_vector(trial: Trial, model: Any, suffix: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The sum of what the causally strongest heads write into the residual stream when the instruction is there.

    A head's causal effect is how much KL to the prompted model goes when its output at the answer positions of the bare
    model is replaced by its mean over those positions of the prompted one.

    Args:
        trial: the examples, with divergences.
        model: unpatched.
        suffix: as Steering's.

    Returns:
        (vector [d] float32, the chosen heads as (block, head), strongest first).

    Source: Todd et al., "Function vectors in large language models", eq. 2-5; averaged over all answer positions, since
        an instruction's answer need not differ in its first token.
    """
    decoder = describe(model)
    projections = {block.index: block.o_proj for block in decoder.blocks}
    means = _answer_means(model, trial.prompts, trial.written, projections, inside=True)
    effects = []
    for block in decoder.blocks:
        for head in range(block.num_attention_heads):
            with _HeadReplaced(block, head, means[block.index], suffix).applied(model):
                effects.append((trial.effect(model).patched, block.index, head))
    # Of a small model ten heads would be nearly all of them: at most a quarter are taken.
    chosen = [(layer, head) for _, layer, head in sorted(effects)[: max(1, min(TOP_HEADS, len(effects) // 4))]]
    vector = sum((_written_by(decoder, means, layer, head) for layer, head in chosen), torch.zeros(()))
    return vector, chosen


@torch.no_grad()
def _written_by(decoder: Decoder, means: dict[int, Tensor], layer: int, head: int) -> Tensor:
    """What one head's mean output adds to the residual stream, the post-attention norm's scale taken as at the mean."""
    block = decoder.blocks[layer]
    weight = linear_weight(block.o_proj).float().cpu()
    part = slice(head * block.head_dim, (head + 1) * block.head_dim)
    mean = means[layer].cpu()
    written = block.residual_multiplier * (weight[:, part] @ mean[part])
    norm = block.post_attention_norm
    if norm is None:
        return written
    whole = weight @ mean
    bias: Any = block.o_proj.bias
    whole = whole if bias is None else whole + bias.float().cpu()
    scale = norm.weight_offset + norm.module.weight.float().cpu()
    return written * torch.rsqrt(whole.square().mean() + norm.eps) * scale
