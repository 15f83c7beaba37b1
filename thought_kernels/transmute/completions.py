"""Completions written by the prompted model itself, for examples that come without one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.transmute.logprobs import equal_lengths, may_pad
from thought_kernels.transmute.prompt import EncodedExample, Example, Instruction, encode


def stop_ids(model: Any, end_of_turn: int) -> list[int]:
    """Ids that end a completion: the chat's end-of-turn token and what the model's generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({end_of_turn, *([named] if isinstance(named, int) else named or [])})


def end_of_turn_id(tokenizer: Any, instruction: Instruction, example: Example, separator: str) -> int:
    """The token that closes a completion in this tokenizer's chats."""
    return encode(tokenizer, instruction, Example(example.messages, "x"), separator=separator).tokens[-1]


@torch.no_grad()
def complete(
    model: Any, prompts: Sequence[Sequence[int]], *, stops: Sequence[int], max_new_tokens: int, batch_size: int
) -> Iterator[list[list[int]]]:
    """Greedy continuations of id lists, a batch at a time, in order.

    Each ends with the first stop id, which it includes, or has max_new_tokens tokens. What the model's own generation
    config says of sampling, beams or penalties does not apply.
    """
    greedy = type(model.generation_config)(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stops), pad_token_id=stops[0]
    )
    padded, start = may_pad(model), 0
    while start < len(prompts):
        rows = prompts[start : start + batch_size]
        rows = rows if padded else rows[: equal_lengths(rows)]
        start += len(rows)
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), stops[0])
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.as_tensor(row)
            mask[index, longest - len(row) :] = 1
        device = model.get_input_embeddings().weight.device
        with undisturbed(model), _generating_by(model, greedy):
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        yield [_until_stop(row, stops) for row in out[:, longest:].tolist()]


@contextlib.contextmanager
def _generating_by(model: Any, config: Any) -> Iterator[None]:
    """The model with another generation config: what generate() is given is merged with the model's own otherwise."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def with_completions(
    model: Any, encoded: Sequence[EncodedExample], *, end_of_turn: int, max_new_tokens: int, batch_size: int
) -> list[EncodedExample]:
    """The same examples, those without a completion completed by the prompted model.

    Completions that reach max_new_tokens stay cut there, with a warning.
    """
    open_ended = [index for index, example in enumerate(encoded) if example.answer_start == len(example.tokens)]
    prompts = [[*encoded[i].header, *encoded[i].instruction, *encoded[i].tokens] for i in open_ended]
    stops = stop_ids(model, end_of_turn)
    completed, cut, done = list(encoded), 0, 0
    for batch in complete(model, prompts, stops=stops, max_new_tokens=max_new_tokens, batch_size=batch_size):
        for answer in batch:
            example = encoded[open_ended[done]]
            completed[open_ended[done]] = example._replace(tokens=[*example.tokens, *answer])
            cut += not answer or answer[-1] not in stops
            done += 1
    if cut:
        warnings.warn(
            f"transmute: {cut} of {len(prompts)} completions did not end within max_new_tokens={max_new_tokens} tokens "
            "and were cut there",
            stacklevel=3,
        )
    return completed


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    first = next((index for index, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: first + 1]
