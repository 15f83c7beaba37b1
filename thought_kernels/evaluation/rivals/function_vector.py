"""The function vector: what the causally strongest heads write into the residual stream."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, spread
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_means
from thought_kernels.evaluation.rivals.steering import ANSWER, steered
from thought_kernels.generation.prefix import cache_of
from thought_kernels.models import describe
from thought_kernels.models.decoder import Block, Decoder
from thought_kernels.models.linear import bias_of
from thought_kernels.models.quantised import weight_of
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.prompts.prompt import EncodedExample, Instruction

TOP_HEADS = 10
TRIALS = 25  # prompts with shuffled labels, of whose answers the first token counts
TOLD_TRIALS = 8  # prompts without the instruction, all of whose answers' tokens count
Head = tuple[int, int]  # block, head


def with_shuffled_answers(instruction: Instruction, draw: random.Random) -> list[dict[str, str]] | None:
    """Demonstrations whose answers have changed places; None where the instruction is no demonstrations."""
    turns = [] if isinstance(instruction, str) else [dict(turn) for turn in instruction]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if len(answers) < 2:
        return None
    texts = [turn["content"] for turn in answers]
    draw.shuffle(texts)
    for turn, text in zip(answers, texts, strict=True):
        turn["content"] = text
    return turns


def shuffled_prompts(
    encoded: Sequence[EncodedExample], instruction: Instruction, encode: Callable[[Instruction], EncodedExample]
) -> list[list[int]]:
    """The prompts of the first examples behind demonstrations with shuffled answers, in another order each.

    Args:
        encoded: the examples.
        instruction: their demonstrations.
        encode: any of them behind another instruction.

    Returns:
        Token ids, TRIALS lists at most; none where the instruction is no demonstrations, or where examples differ in
        what stands before them.

    Source: Todd et al., "Function vectors in large language models", §2.3, the uninformative prompts.
    """
    draw = random.Random("shuffled answers")
    trials = encoded[:TRIALS]
    if with_shuffled_answers(instruction, draw) is None or any(
        row.with_prefix != trials[0].with_prefix for row in trials
    ):
        return []
    found = []
    for row in trials:
        shuffled = with_shuffled_answers(instruction, draw)
        assert shuffled is not None
        found.append([*encode(shuffled).with_prefix, *row.tokens[: row.answer_start]])
    return found


def indirect_effects(model: Any, rows: Rows, means: dict[int, Tensor]) -> dict[Head, float]:
    """By how much the answer gets likelier where a head's output is replaced by its mean behind the instruction.

        CIE(a | p̃, y) = f(p̃ | a := ā)[y] − f(p̃)[y], averaged over prompts p̃ and the tokens y that count

    p̃ are the rows' prompts with shuffled labels, and y the first token of the answer; where there are none, p̃ are the
    prompts without the instruction, and y all tokens of the answer, since an instruction's need not differ in the
    first.

    Args:
        model: unpatched.
        rows: the examples.
        means: ā, what o_proj takes in, by block index, [Hq·D].

    Source: Todd et al., eq. 3-4, and the authors' code (ericwtodd/function_vectors, src/compute_indirect_effect.py).
    """
    if rows.shuffled:
        prompts, answers = rows.shuffled[:TRIALS], [answer[:1] for answer in rows.written[:TRIALS]]
    else:
        prompts, answers = rows.bare_prompts[:TOLD_TRIALS], rows.written[:TOLD_TRIALS]
    heads = [(block, head) for block in describe(model).blocks for head in range(block.num_attention_heads)]
    effects = dict.fromkeys(((block.index, head) for block, head in heads), 0.0)
    count = sum(map(len, answers))
    for group in _of_equal_length(prompts):
        trial = _Trial(model, [prompts[i] for i in group], [answers[i] for i in group])
        clean = trial.probability()
        for block, head in heads:
            with _replaced(block, head, means[block.index]):
                effects[block.index, head] += (trial.probability() - clean) / count
    return effects


def _of_equal_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of prompts that need no padding, so that windows and positions are their own."""
    found: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(len(prompt), []).append(index)
    return list(found.values())


class _Trial:
    """Prompts of one length up to their last token, run once: heads are replaced from that on only."""

    @torch.no_grad()
    def __init__(self, model: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self._model, device = model, model.get_input_embeddings().weight.device
        longest = max(map(len, answers))
        padding = [[0] * (longest - len(answer)) for answer in answers]  # behind: nothing before it sees it
        rows = zip(prompts, answers, padding, strict=True)
        self._ids = torch.tensor([[prompt[-1], *answer[:-1], *pad] for prompt, answer, pad in rows], device=device)
        self._answers = torch.tensor([[*a, *pad] for a, pad in zip(answers, padding, strict=True)], device=device)
        counts = torch.tensor([len(answer) for answer in answers], device=device)
        self._counted = torch.arange(longest, device=device) < counts[:, None]
        before = torch.tensor([prompt[:-1] for prompt in prompts], device=device)
        with undisturbed(model):
            self._cache = cache_of(model(input_ids=before, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def probability(self) -> float:
        """The sum of the probabilities of the tokens that count."""
        with undisturbed(self._model):
            logits = self._model(input_ids=self._ids, use_cache=True, **copy.deepcopy(self._cache)).logits
        chosen = logits.gather(-1, self._answers[..., None])[..., 0] - logits.logsumexp(-1)
        return float(chosen.exp().double()[self._counted].sum())


@contextlib.contextmanager
def _replaced(block: Block, head: int, mean: Tensor) -> Iterator[None]:
    """A head's output replaced by its mean, at every token of a forward."""
    part = slice(head * block.head_dim, (head + 1) * block.head_dim)

    def replace(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        o = args[0].clone()
        o[..., part] = mean[part].to(o)
        return (o, *args[1:])

    handle = block.o_proj.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def function_vector(model: Any, rows: Rows) -> tuple[Tensor, list[Head]]:
    """The sum of what the strongest heads write into the residual stream behind the instruction, in the mean.

    Args:
        model: unpatched.
        rows: the examples.

    Returns:
        (vector [d] float32, the chosen heads, strongest first).

    Source: Todd et al., eq. 2-5: the mean at the prompt's last token, ten heads. Where there are no shuffled labels it
        is the mean over all positions that predict an answer's token.
    """
    decoder = describe(model)
    modules = {block.index: block.o_proj for block in decoder.blocks}
    tokens = 1 if rows.shuffled else None
    means = answer_means(model, rows.prompts, rows.written, modules, inside=True, tokens=tokens)
    effects = indirect_effects(model, rows, means)
    # Of a small model ten heads would be nearly all of them: at most a quarter are taken.
    count = max(1, min(TOP_HEADS, len(effects) // 4))
    chosen = sorted(effects, key=lambda head: -effects[head])[:count]
    vector = sum((_written_by(decoder, means, layer, head) for layer, head in chosen), torch.zeros(()))
    return vector, chosen


@torch.no_grad()
def _written_by(decoder: Decoder, means: dict[int, Tensor], layer: int, head: int) -> Tensor:
    """What one head's mean output adds to the residual stream, the post-attention norm's scale taken as at the mean."""
    block = decoder.blocks[layer]
    found = weight_of(block.o_proj, decoder.dtype, block.device)
    if found is None:
        raise ValueError(
            f"function_vector: o_proj must have its weights in memory, got {type(block.o_proj).__name__} without them, "
            f"block {layer}; load the model without offloading or sharding it"
        )
    weight = found.float().cpu()
    part = slice(head * block.head_dim, (head + 1) * block.head_dim)
    mean = means[layer].cpu()
    written = block.residual_multiplier * (weight[:, part] @ mean[part])
    norm = block.post_attention_norm
    if norm is None:
        return written
    whole = weight @ mean
    bias = bias_of(block.o_proj)
    whole = whole if bias is None else whole + bias.float().cpu()
    scale = norm.weight_offset + norm.module.weight.float().cpu()
    return written * torch.rsqrt(whole.square().mean() + norm.eps) * scale


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """The vector added to a block's output from the prompt's last token on, at the best block and multiplier.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: to take the heads' means and effects from.
        choice: rows that are read, to choose by.

    Source: Todd et al., §2.3; they add it once, at a third of the depth, and show other blocks too.
    """
    vector, heads = function_vector(model, rows)
    found = steered(model, choice, dict.fromkeys(spread(len(describe(model).blocks)), vector), [ANSWER])
    shown = ", ".join(f"{layer}.{head}" for layer, head in heads)
    return found._replace(settings=f"{found.settings}; heads (block.head) {shown}")
