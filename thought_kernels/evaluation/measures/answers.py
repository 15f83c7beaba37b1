"""When an answer counts as right, and which of its tokens hold the value."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Match = Callable[[str, str, str], bool]


def exact(text: str, answer: str, question: str) -> bool:
    """The text is the answer, whitespace at its ends aside."""
    return text.strip() == answer.strip()


def contains(text: str, answer: str, question: str) -> bool:
    """The text holds the answer's final value as whole words, elsewhere than in a repetition of the question.

    For verbose models: "The largest of 3, 9 and 5 is **9**." holds 9, and so does "3 9 5: 9"; the bare "3 9 5" does
    not. Where the value is the question itself (sorting sorted numbers) the repetition counts.
    """
    value = final_value(answer)
    if value != question.strip():
        text = text.replace(question.strip(), " ", 1)
    return re.search(rf"(?<![\w.]){re.escape(value)}(?!\w|\.\d)", text) is not None


MATCHES: dict[str, Match] = {"exact": exact, "contains": contains}


def final_value(answer: str) -> str:
    """What follows the last "= " of an answer ("8 + 7 + 6 = 21" gives "21"), or the whole answer, stripped."""
    return answer.rpartition("= ")[2].strip()


def value_tokens(tokenizer: Any, answer: Sequence[int], stops: Sequence[int]) -> slice:
    """The tokens of a completion that hold its value, as opposed to its form.

    In a completion with an equals sign, those from the first visible one after the last "=": the result of a sum or a
    product. Otherwise all. The stop token that ends the completion is never one of them.

    Args:
        tokenizer: the model's.
        answer: a completion's token ids, with or without a stop id at the end.
        stops: ids that end a completion.

    Returns:
        A slice into `answer`; never empty unless the completion is.
    """
    stop = len(answer) - (len(answer) > 0 and answer[-1] in stops)
    pieces = [tokenizer.decode([token]) for token in answer[:stop]]
    signs = [index for index, piece in enumerate(pieces) if "=" in piece]
    if not signs:
        return slice(0, max(stop, min(1, len(answer))))
    after = signs[-1] + (not pieces[signs[-1]].rpartition("=")[2].strip())
    start = next((index for index in range(after, stop) if pieces[index].strip()), signs[-1])
    return slice(start, stop)
