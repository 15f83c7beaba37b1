"""Generation in batches behind a prefix that is run once.

A loop of our own, and not transformers' generate: the prefix's keys and values are the same for every row, positions
must be right where rows of different lengths are padded behind it, and what ends a row may be a text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from thought_kernels.generation.padding import Ids, may_pad, padded
from thought_kernels.generation.prefix import behind, cache_of, run_prefix, sees_all, shared_length
from thought_kernels.models.sharded import agreed, group_of
from thought_kernels.models.undisturbed import undisturbed

Ended = Callable[[Sequence[int]], bool]
# Rows that are done are dropped when at most this share of a batch is left: the caches of the rest are copied then.
_LEFT = 0.75


class Begun(NamedTuple):
    """A row: its own tokens, how many may follow, and what they are drawn from, None for the likeliest."""

    ids: list[int]
    room: int
    draws: torch.Generator | None


@torch.no_grad()
def continue_prompts(
    model: Any,
    prompts: Ids,
    ended: Ended,
    *,
    max_new_tokens: int,
    batch_size: int,
    seeds: Sequence[int | None] = (),
    progress: str | None = None,
) -> list[list[int]]:
    """Continuations of id lists, in order, each up to and with the token that ends it.

    Args:
        model: a transformers causal language model.
        prompts: token ids, each with at least one.
        ended: whether a continuation ends with its last token; asked after each token.
        max_new_tokens: where a continuation is cut that has not ended, if the model's context goes so far.
        batch_size: prompts at a time.
        seeds: of each prompt's draws from the model's own distribution, whatever batch it is in; None, or no seeds at
            all, for the likeliest token each time.
        progress: what a progress bar on stderr says is written, None for no bar.

    Raises:
        ValueError: if a prompt leaves no room for a token in the model's context, or has a token without an embedding.
    """
    if not prompts:
        return []
    _check_known(model, prompts)
    rooms = [min(max_new_tokens, room) for room in rooms_behind(model, prompts)]
    draws = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds] or [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    shared = shared_length(prompts)
    written: list[list[int]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    with undisturbed(model), bar:
        prefix = run_prefix(model, prompts[0][:shared])
        for rows in _batches(model, prompts, order, shared, max_new_tokens, batch_size):
            begun = [Begun(list(prompts[index][shared:]), rooms[index], draws[index]) for index in rows]
            for index, answer in zip(rows, _continue(model, prefix, shared, begun, ended), strict=True):
                written[index] = answer
            bar.update(len(rows))
    return written


def _check_known(model: Any, prompts: Ids) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for index, prompt in enumerate(prompts):
        unknown = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise ValueError(
                f"complete: prompts[{index}] must be of tokens that the model has an embedding for, ids below "
                f"{vocabulary}, got {unknown}; take the model's own tokenizer"
            )


def _batches(
    model: Any, prompts: Ids, order: list[int], shared: int, max_new_tokens: int, batch_size: int
) -> Iterator[list[int]]:
    """Indices of prompts that may be run together, shortest prompts first."""
    mixed, start = may_pad(model), 0
    while start < len(order):
        rows = order[start : start + batch_size]
        longest = len(prompts[rows[-1]])
        if not mixed or (shared and not sees_all(model, longest + max_new_tokens)):
            rows = [index for index in rows if len(prompts[index]) == len(prompts[rows[0]])]
        yield rows
        start += len(rows)


def context_length(model: Any) -> int:
    """The tokens of a model's longest prompt; sys.maxsize where its configuration names no end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def rooms_behind(model: Any, prompts: Ids) -> list[int]:
    """How many tokens the model's context holds behind each prompt; sys.maxsize where its configuration names no end.

    Raises:
        ValueError: if a prompt leaves no room for a token.
    """
    limit = context_length(model)
    for index, prompt in enumerate(prompts):
        if len(prompt) >= limit:
            raise ValueError(
                f"complete: prompts[{index}] must be shorter than the model's context of {limit} tokens, "
                f"got {len(prompt)}; shorten it or drop it"
            )
    return [limit - len(prompt) for prompt in prompts]


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


class _Running:
    """The rows of a batch that are still written, as the model's next step takes them."""

    def __init__(self, model: Any, prefix: dict[str, Any], shared: int, begun: Sequence[Begun]) -> None:
        self._model, self.rows = model, list(range(len(begun)))
        self._ids, self._mask, self._positions = padded([row.ids for row in begun], _device(model), before=shared)
        self._cache = behind(prefix, len(begun), self._ids.shape[1], room=max(row.room for row in begun))
        self._group = group_of(model)

    def step(self, draws: Sequence[torch.Generator | None]) -> list[int]:
        """The next token of each row."""
        whole = bool(self._mask.all())
        out = self._model(
            input_ids=self._ids, attention_mask=None if whole else self._mask, position_ids=self._positions,
            use_cache=True, logits_to_keep=1, **self._cache,
        )  # fmt: skip
        self._cache = cache_of(out)
        chosen = _chosen(out.logits[:, -1], [draws[row] for row in self.rows])
        self._ids = agreed(chosen, self._group)[:, None]
        return self._ids[:, 0].tolist()

    def go_on(self, going: Sequence[bool]) -> None:
        """Makes room for the next token of rows that are going; many that are done are dropped."""
        left = [place for place, row in enumerate(self.rows) if going[row]]
        if len(left) <= _LEFT * len(self.rows):
            picked = torch.tensor(left, device=self._ids.device)
            for kept in self._cache.values():
                kept.batch_select_indices(picked)
            self._ids, self._mask, self._positions = self._ids[picked], self._mask[picked], self._positions[picked]
            self.rows = [self.rows[place] for place in left]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        # Rows that are done and still here stay where they are: no position may be left for them.
        moves = torch.tensor([going[row] for row in self.rows], device=self._ids.device)
        self._positions = self._positions[:, -1:] + moves[:, None]


def _continue(model: Any, prefix: dict[str, Any], shared: int, begun: list[Begun], ended: Ended) -> list[list[int]]:
    """Continues one batch behind a prefix of `shared` tokens."""
    running, draws = _Running(model, prefix, shared, begun), [row.draws for row in begun]
    answers: list[list[int]] = [[] for _ in begun]
    going = [True] * len(begun)
    while any(going):
        for row, token in zip(running.rows, running.step(draws), strict=True):
            if going[row]:
                answers[row].append(token)
                going[row] = len(answers[row]) < begun[row].room and not ended(answers[row])
        if any(going):
            running.go_on(going)
    return answers


def _chosen(logits: Tensor, draws: Sequence[torch.Generator | None]) -> Tensor:
    """The next token of each row, [B]: drawn from softmax(logits) where the row has draws, else the likeliest."""
    chosen = logits.argmax(-1)
    for index, draw in enumerate(draws):
        if draw is not None:
            shares = torch.softmax(logits[index].to(torch.promote_types(logits.dtype, torch.float32)), -1).cumsum(-1)
            place = torch.rand((), generator=draw, dtype=torch.float64).to(shares) * shares[-1]
            chosen[index] = torch.searchsorted(shares, place, right=True).clamp(max=len(shares) - 1)
    return chosen
