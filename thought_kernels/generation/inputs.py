"""Inputs written by the bare model itself, like those it is shown: a patch sees more of what an instruction does."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from thought_kernels.generation.completions import Ending
from thought_kernels.generation.continuations import context_length, continue_prompts
from thought_kernels.generation.processes import ALONE, Processes
from thought_kernels.prompts.chat import text_tokenizer

# A list shows given inputs up to so many tokens, as many lines as that may be.
_SHOWN_TOKENS = 512
# Lines that follow one list. Then the inputs are shuffled: what stands last in a list is followed most.
_DRAWS = 32
# Lines drawn for each that is wanted, at most: a small set of inputs, such as the continents, is soon used up.
_DRAWS_EACH = 2


def written_inputs(
    model: Any, tokenizer: Any, given: Sequence[str], *, count: int, batch_size: int, seed: int,
    progress: bool = False, processes: Processes = ALONE,
) -> list[str]:  # fmt: skip
    """New inputs: the model is shown a list of the given ones, a line each, and draws the next line.

    No chat template and no instruction: any language model goes on with a list. Lines that are blank, cut, given
    already or written before are left out.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its fast tokenizer.
        given: texts, one at least.
        count: how many are wanted.
        batch_size: lines at a time.
        seed: of the draws and of the lists' orders.
        progress: show a bar.
        processes: which share the writing.

    Returns:
        `count` texts, or fewer where the model has no more to say.
    """
    tokenizer = text_tokenizer(tokenizer)
    quoted = any(len(text.splitlines()) > 1 for text in given)
    lines = [json.dumps(text, ensure_ascii=False) if quoted else text.strip() for text in given]
    longest = max(len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines)
    behind = context_length(model) - longest - 1  # so many tokens leave room for a line
    end = tokenizer.eos_token_id
    ending = Ending(() if end is None else (end,), "\n", tokenizer)
    found: list[str] = []
    draw, seen = random.Random(f"{seed} inputs"), {_key(text) for text in given}
    for _ in range(-(-_DRAWS_EACH * count // _DRAWS)):
        shown = _list(tokenizer, draw.sample(lines, len(lines)), end, min(_SHOWN_TOKENS, behind))
        if len(shown) > behind:
            break
        seeds = processes.share([draw.getrandbits(63) for _ in range(_DRAWS)])
        answers = processes.gathered(continue_prompts(
            model, [shown] * len(seeds), ending.reached, max_new_tokens=longest + 1, batch_size=batch_size,
            seeds=seeds, progress="inputs" if progress else None,
        ))  # fmt: skip
        before = len(found)
        for text in (_read(line, quoted) for line in ending.texts([one for one in answers if ending.reached(one)])):
            if _key(text) and _key(text) not in seen:
                seen.add(_key(text))
                found.append(text)
        if len(found) >= count or len(found) == before:  # a model that wrote none of 32 does not know such lists
            break
    return found[:count]


def _list(tokenizer: Any, lines: Sequence[str], end: int | None, room: int) -> list[int]:
    """The ids of as many lines as there is room for, the last ones, one at least."""
    ids: list[int] = []
    for first in range(len(lines) - 1, -1, -1):
        longer = tokenizer("\n".join([*lines[first:], ""]))["input_ids"]
        if ids and len(longer) > room:
            break
        ids = longer
    return ids[:-1] if ids[-1] == end else ids  # some tokenizers close every text


def _read(line: str, quoted: bool) -> str:
    """The text of a line; blank where a quoted one cannot be read."""
    if not quoted:
        return line.strip()
    try:
        text = json.loads(line)
    except ValueError:
        return ""
    return text if isinstance(text, str) else ""


def _key(text: str) -> str:
    return " ".join(text.casefold().split())
