"""The situations in which a compiled system prompt is asked: what is told on either side, and the chats."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks import HERE, Task, task

from thought_kernels.evaluation.measures.prose import PROSE
from thought_kernels.prompts.instruction import Instruction

HELD_OUT, TURN_2, TURN_3 = "held-out", "turn 2", "turn 3"
OTHER_SYSTEM, UNRELATED, LONG = "other system message", "unrelated requests", "long inputs"
CONTRARY = "against the contrary"
SERVED = (TURN_2, TURN_3, OTHER_SYSTEM, UNRELATED, LONG)
OTHER = "You are a helpful assistant. Today is Thursday, the twelfth of March."
# What is wanted, and its contrary.
CONTRASTS = {"polite": ("Answer politely.", "Answer rudely.")}
LONG_WORDS = 220  # of a passage, about 300 tokens

Answers = Sequence[tuple[str, str]]  # questions, each with the prompted model's answer


@dataclass(frozen=True)
class Case:
    """What the prompted side and the other side are told, and what both are asked."""

    instruction: Instruction
    without: Instruction | None
    questions: list[Any]


def case(name: str, of: Task, count: int, said: Sequence[Answers] = ()) -> Case:
    """A situation of a task.

    Args:
        name: HELD_OUT, one of SERVED, or CONTRARY.
        of: the task; its held-out inputs are asked.
        count: how many chats.
        said: for TURN_2 and TURN_3 what was said in each turn before, in the order of the held-out inputs.
    """
    questions = [question for question, _ in of.held_out]
    if name == OTHER_SYSTEM:
        return Case(_system(f"{_told(of)}\n\n{OTHER}"), _system(OTHER), questions[:count])
    if name == UNRELATED:
        return Case(of.instruction, None, _everyday(of.name)[:count])
    if name == LONG:
        return Case(of.instruction, None, [f"{passage(i)}\n\n{text}" for i, text in enumerate(questions[:count])])
    if name in (TURN_2, TURN_3):
        chats = [chat(questions, said, index) for index in range(count)]
        return Case(of.instruction, None, chats)
    return Case(of.instruction, CONTRASTS[of.name][1] if name == CONTRARY else None, questions[:count])


def chat(questions: Sequence[str], said: Sequence[Answers], index: int) -> list[dict[str, str]]:
    """A chat whose earlier turns the prompted model has answered; each turn asks the next held-out input."""
    turns = []
    for question, answer in (turn[index] for turn in said):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    following = questions[(index + len(said)) % len(questions)]
    return [*turns, {"role": "user", "content": following}]


def passage(index: int) -> str:
    """Ordinary text of about 300 tokens, another kind first each time."""
    texts, taken = list(PROSE.values()), []
    while sum(len(text.split()) for text in taken) < LONG_WORDS:
        taken.append(texts[(index + len(taken)) % len(texts)])
    return "\n\n".join(taken)


def question(text: str) -> str:
    """What is asked, without the passage before it."""
    return text.rpartition("\n\n")[2]


def contrast(name: str) -> Task:
    """The task of a contrast pair, on everyday inputs: the wanted instruction as it is told."""
    return replace(task("formal", seed=0), name=name, reserved=False, instruction=CONTRASTS[name][0])


def shortened(tokenizer: Any, of: Task, tokens: int) -> Task:
    """A task whose system prompt is cut at the sentence end that is nearest to so many tokens."""
    cuts = sentence_ends(_told(of))
    best = min(cuts, key=lambda cut: abs(length(tokenizer, cut) - tokens))
    return replace(of, instruction=_system(best))


def sentence_ends(text: str) -> list[str]:
    """The beginnings of a text that end with a sentence."""
    return [text[: match.end()].rstrip() for match in re.finditer(r"[.!?]\"?(?=\s|$)", text)]


def length(tokenizer: Any, of: Task | str) -> int:
    """Tokens of a system prompt alone, without what a chat template writes around it."""
    return len(tokenizer(of if isinstance(of, str) else _told(of), add_special_tokens=False)["input_ids"])


def _told(of: Task) -> str:
    return of.instruction if isinstance(of.instruction, str) else of.instruction[0]["content"]


def _system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}]


def _everyday(name: str) -> list[str]:
    lines = (HERE / "inputs.txt").read_text(encoding="utf-8").splitlines()
    random.Random(name).shuffle(lines)
    return lines
