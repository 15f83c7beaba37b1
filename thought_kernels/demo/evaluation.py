"""Everything that `evaluate` can be given, made from one of the shipped model's tasks."""

from __future__ import annotations

import random
from typing import Any

from thought_kernels.demo.tasks import NOUNS, NUMBERS, TASKS, VERBS, Task, held_out, inputs, split_by_symbols

UNRELATED, OTHERS, OTHER_INPUTS, POOL, LONGER = 64, 5, 64, 512, 96


def task_arguments(name: str, *, seed: int = 0, examples: int = 32, inputs: int = 256) -> dict[str, Any]:
    """Keyword arguments of evaluate for a task: data of every kind that the report has a section for.

    Examples and the pool are inputs that training may have seen, held-out inputs are ones it has not. Longer inputs, of
    four numbers or of a sentence and a half, are beyond what the model was trained on: without labels, since what they
    ask is whether the patched model still does what the prompted one does.

    Args:
        name: one of demo.tasks.TASKS.
        seed: of every choice of inputs.
        examples: that the patch is fitted on.
        inputs: held-out inputs.

    Returns:
        {"patch_or_instruction", "examples", "held_out", "pool", "outside", "longer", "paraphrases", "others",
        "unrelated"}.

    Raises:
        ValueError: an unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"evaluate: task must be one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    pool, fresh = _split(task, seed)
    near, far = split_by_symbols(task)
    others = [other for other in TASKS.values() if other is not task and other.on_words == task.on_words]
    if not others:  # one task alone is on words; what it may disturb is the rest of the model
        others = [other for other in TASKS.values() if other is not task]
    chosen = random.Random(f"{seed} others {name}").sample(others, min(OTHERS, len(others)))
    stranger = next(other for other in TASKS.values() if other.on_words != task.on_words)
    return {
        "patch_or_instruction": task.instruction,
        "examples": pool[:examples],
        "pool": pool[:POOL],
        "held_out": _labelled(task, fresh[:inputs]),
        "outside": {
            "examples": _sample(near, examples, f"{seed} {name} near"),
            "held_out": _labelled(task, _sample(far, max(2, inputs // 2), f"{seed} {name} far")),
        },
        "longer": _longer(task, seed),
        "paraphrases": list(task.wordings[1:]),
        "others": {
            other.instruction: {
                "instruction": other.instruction, "held_out": _labelled(other, _split(other, seed)[1][:OTHER_INPUTS])
            }
            for other in chosen
        },
        "unrelated": _split(stranger, seed)[1][:UNRELATED],
    }  # fmt: skip


def _split(task: Task, seed: int) -> tuple[list[str], list[str]]:
    """(inputs to fit on, inputs to measure on), shuffled; the same for all tasks of a kind."""
    every = inputs(task)
    random.Random(f"{seed} split {task.on_words}").shuffle(every)
    return [text for text in every if not held_out(text)], [text for text in every if held_out(text)]


def _sample(texts: list[str], count: int, seed: str) -> list[str]:
    return random.Random(seed).sample(texts, min(count, len(texts)))


def _labelled(task: Task, texts: list[str]) -> list[dict[str, str]]:
    return [{"prompt": text, "completion": task.answer(text)} for text in texts]


def _longer(task: Task, seed: int) -> list[str]:
    draw = random.Random(f"{seed} longer {task.on_words}")
    if task.on_words:
        words = ((NOUNS, VERBS, NOUNS, VERBS, NOUNS),) * LONGER
        return [" ".join(draw.choice(list(kind)) for kind in sentence) for sentence in words]
    return [" ".join(str(draw.choice(NUMBERS)) for _ in range(4)) for _ in range(LONGER)]
