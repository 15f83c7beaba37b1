"""Which positions write the answer: what published vectors are added to, or put in the place of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.prompts.prompt import EncodedExample

_UNLIKE = ("a", "7", "Z?", "3.")  # inputs that end in nothing alike


class Places(NamedTuple):
    """Positions of one forward, bool [B, T] each.

    Attributes:
        answer: the prompt's last token and all after it, which predict the answer.
        end: the prompt's last token alone.
    """

    answer: Tensor
    end: Tensor


def prompt_end(encode: Callable[[str], EncodedExample]) -> list[int]:
    """The ids that every prompt ends with, whatever the input: the generation prompt.

    Args:
        encode: a user's text as an example without a completion.
    """
    prompts = [[*row.without_prefix, *row.tokens] for row in map(encode, _UNLIKE)]
    shortest = min(map(len, prompts))
    length = 0
    while length < shortest and len({prompt[-1 - length] for prompt in prompts}) == 1:
        length += 1
    return prompts[0][len(prompts[0]) - length :]


@contextlib.contextmanager
def answer_places(model: Any, suffix: Sequence[int]) -> Iterator[Callable[[], Places]]:
    """Says during each forward of the model which positions write the answer.

    The prompt's end is the last occurrence of `suffix`. Ids without one are all answer behind a cache, a step of
    generation, and where no cache is made, text that is read; else they begin a prompt, and none is.

    Args:
        model: a transformers model, called with input_ids.
        suffix: ids that end every prompt, see prompt_end; empty makes every position an answer's, and none a
            prompt's end.

    Yields:
        A function that returns the current forward's Places.
    """
    current: list[Places] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        current[:] = [_places(ids, suffix, begins=_begins_prompt(kwargs))]

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lambda: current[0]
    finally:
        handle.remove()


def _begins_prompt(kwargs: dict[str, Any]) -> bool:
    """Whether a forward makes a cache that nothing is in yet."""
    caches = [kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
    return kwargs.get("use_cache") is not False and not any(cache.get_seq_length() for cache in caches)


def _places(ids: Tensor, suffix: Sequence[int], *, begins: bool) -> Places:
    rows, length = ids.shape
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if not suffix:
        return Places(everywhere, ~everywhere)
    last = torch.full((rows,), -1, device=ids.device)
    if length >= len(suffix):
        found = (ids.unfold(1, len(suffix), 1) == torch.tensor(list(suffix), device=ids.device)).all(-1)
        starts = torch.arange(found.shape[1], device=ids.device).expand(rows, -1)
        last = starts.masked_fill(~found, -len(suffix)).amax(1) + len(suffix) - 1  # −1 where there is none
    here = torch.arange(length, device=ids.device)[None]
    without = (last < 0)[:, None]
    return Places(torch.where(without, torch.tensor(not begins, device=ids.device), here >= last[:, None]),
                  ~without & (here == last[:, None]))  # fmt: skip
