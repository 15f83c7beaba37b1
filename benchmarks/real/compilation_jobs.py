"""What is measured of prompts as patches, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compilation_cases import CONTRARY, CONTRASTS, HELD_OUT, SERVED, contrast, length, shortened
from tasks import Task

FULL = "full"
FIT, TEXT, TIMES = "fit", "ordinary text", "times"  # beside the situations, which have answers
OWN, CONTRAST = "own", "contrast"
CHATS = "chats"  # fitted on inputs, and on chats that ask them in later turns
PLUS = " + "
NEARLY = 0.8  # of a prompt is nearly the whole of it


@dataclass(frozen=True)
class Job:
    """Patches of a prompt, or of its beginning, in one situation.

    Attributes:
        of: the prompt.
        cut: FULL, or about how many tokens of it are left.
        case: FIT, TEXT, TIMES or a situation of compilation_cases.py.
        patches: OWN, CHATS, CONTRAST or what `plus` names.
    """

    of: Task
    cut: str
    case: str
    patches: tuple[str, ...]


def jobs(tokenizer: Any, prompts: Sequence[Task], lengths: Sequence[int]) -> Iterator[Job]:
    """All patches are fitted first, and a chat's turns follow those that they go on from.

    Args:
        tokenizer: the model's, which counts tokens.
        prompts: the whole ones.
        lengths: of beginnings, in tokens.
    """
    beginnings = [list(_beginnings(tokenizer, of, lengths)) for of in prompts]
    pairs = [contrast(name) for name in CONTRASTS]
    for of, shorter in zip(prompts, beginnings, strict=True):
        yield from (replace(job, case=FIT) for job in [Job(of, FULL, FIT, (OWN, CHATS)), *shorter])
    yield from (Job(pair, FULL, FIT, (OWN, CONTRAST)) for pair in pairs)
    for of, shorter in zip(prompts, beginnings, strict=True):
        others = [other.name for other in prompts if other.name != of.name]
        together = [plus(*others)] if len(others) > 1 else []
        yield Job(of, FULL, HELD_OUT, (OWN, CHATS, *map(plus, others), *together))
        yield from shorter
        yield from (Job(of, FULL, situation, (OWN, CHATS)) for situation in (*SERVED, TEXT))
        yield Job(of, FULL, TIMES, (OWN,))
    for pair in pairs:
        yield from (Job(pair, FULL, situation, (OWN, CONTRAST)) for situation in (HELD_OUT, CONTRARY, TEXT))


def plus(*others: str) -> str:
    """The name of a patch with other prompts' patches added, which says whose."""
    return PLUS.join([OWN, *sorted(others)])


def added(patch: str) -> list[str]:
    """The prompts whose patches such a name says are added."""
    return patch.split(PLUS)[1:]


def _beginnings(tokenizer: Any, of: Task, lengths: Sequence[int]) -> Iterator[Job]:
    for most in lengths:
        if most < NEARLY * length(tokenizer, of):
            yield Job(shortened(tokenizer, of, most), str(most), HELD_OUT, (OWN,))
