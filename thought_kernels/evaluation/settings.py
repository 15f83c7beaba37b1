"""What a report says of its own making: the settings it depends on, and what is to be held against its data."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from thought_kernels.evaluation.budget.plan import Plan
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.prompts.instruction import begins_with
from thought_kernels.version import __version__


def settings_of(subject: Subject) -> dict[str, Any]:
    """What was evaluated and how, as JSON values."""
    model, told, held_out = subject.model, subject.instruction, subject.held_out
    return {
        "instruction": told if isinstance(told, str) else [dict(turn) for turn in told],
        "patch": "transmuted from the examples" if subject.given_patch is None else "given",
        "recipe": subject.recipe.to_dict(),
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(subject.decoder.device),
        "examples": len(subject.examples), "pool": len(subject.pool), "held_out": len(held_out.questions),
        "labels": "given" if held_out.answers is not None else "agreement with the prompted model",
        "scorer": subject.scorer.name, "separator": subject.separator, "without": subject.without,
        "format": subject.format, "paraphrases": subject.paraphrases, "others": list(subject.others),
        "unrelated": len(subject.unrelated), "sweep_inputs": subject.sweep_inputs, "lora_steps": subject.lora_steps,
        "amounts": asdict(subject.amounts),
        "batch_size": subject.batch_size, "max_new_tokens": subject.max_new_tokens, "seed": subject.seed,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "thought_kernels": __version__, "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def warnings_of_plan(plan: Plan, minutes: float | None) -> list[str]:
    """A sentence where the least amounts do not fit into the minutes."""
    if plan.fits:
        return []
    return [
        f"The least that can be measured was expected to take {plan.total / 60:.0f} minutes, not {minutes:g}: leave "
        "sections out, or give fewer examples."
    ]


def warnings_of(subject: Subject) -> list[str]:
    """Sentences about data that are usable and yet say little."""
    found = []
    seen = {str(one._replace(completion=None)) for one in subject.examples}
    shared = sum(str(one) in seen for one in subject.held_out.questions)
    if shared:
        found.append(
            f"{shared} of {len(subject.held_out.questions)} held-out inputs are also examples: "
            "the figures on them say nothing about new inputs."
        )
    for name, chats in (("held-out inputs", subject.held_out.questions), ("examples", subject.examples)):
        told = sum(begins_with(subject.instruction, subject.separator, chat) for chat in chats)
        if told:
            found.append(
                f"{told} of {len(chats)} {name} begin with the instruction: what is called bare is told it too."
            )
    if len(subject.held_out.questions) < 30:
        found.append(f"Only {len(subject.held_out.questions)} held-out inputs: the intervals are wide.")
    return found
