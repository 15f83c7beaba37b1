"""The report of `thought-kernels evaluate` on real pretrained models, as docs/reports has it.

    python benchmarks/real/report.py --models gemma=DIR smol=DIR [--minutes 15] [--work DIR]

Everything measured lies in the work folder as it is finished: the same command goes on where it was stopped. The page,
the figures as JSON and CSV are then copied to docs/reports/MODEL-TASK.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from measure import MAX_NEW_TOKENS, first_line
from styles import same_style
from tasks import WORD_FORMAT, Task, task

import thought_kernels as tk
from thought_kernels.models.load import load

REPORTS = Path(__file__).parents[2] / "docs" / "reports"
TASKS = {"gemma": "antonym", "smol": "french"}
OTHERS = {"gemma": ("country-capital", "english-french"), "smol": ("pirate", "short")}
PARAPHRASES = {"gemma": (), "smol": ("Reply in French.", "Please write your whole answer in the French language.")}
# Not questions but orders, remarks and fragments; and questions with much around them.
OUTSIDE = (
    "List three planets.", "Good evening, I would like some advice.", "my printer is broken", "Describe blue.",
    "Count from one to ten.", "I have just moved to a new town and know nobody.", "Finish this sentence: Every morning",
    "Compose a slogan for a bakery.", "weather tomorrow?", "Tell me something interesting.",
    "Convert 10 miles to kilometres.", "Thank you, that was helpful.",
)  # fmt: skip
LONGER = (
    "I am going to visit my grandmother next weekend. She lives in a small house by the sea, she is eighty-four years "
    "old, and she loves flowers and crossword puzzles. What could I bring her as a present?",
    "Yesterday I planted tomatoes on my balcony. The pots are rather small, the balcony faces south, and in the "
    "afternoon it gets very hot there. How often should I water the plants?",
    "My son is nine and has to give a talk about volcanoes at school. He has ten minutes and may show three pictures. "
    "He is shy and speaks quietly. What would you tell him to say first?",
    "We are four friends, two of us do not eat meat and one cannot have nuts. We want to cook something together on "
    "Saturday that takes less than an hour. What do you suggest?",
    "I read that some birds fly thousands of kilometres every year and come back to the same tree. That sounds "
    "incredible to me. How do they find their way?",
    "Our office has one meeting room and five teams who all want to use it on Monday morning. There are quarrels every "
    "week. How could we share it fairly?",
)


def labelled(rows: list[tuple[str, str | None]]) -> list[Any]:
    return [text if answer is None else {"prompt": text, "completion": answer} for text, answer in rows]


def arguments(name: str, of: Task, inputs: int) -> dict[str, Any]:
    """What tk.evaluate is given of a task."""
    told = [task(other, seed=0) for other in OTHERS[name]]
    common = {
        "examples": [text for text, _ in of.inputs[:inputs]], "pool": [text for text, _ in of.inputs],
        "held_out": labelled(of.held_out), "max_new_tokens": MAX_NEW_TOKENS[of.kind],
    }  # fmt: skip
    if of.kind == "word":
        others = {
            other.name: {"instruction": other.instruction, "held_out": labelled(other.held_out)} for other in told
        }
        return {**common, "others": others, "scorer": first_line, "format": WORD_FORMAT}
    return {
        **common, "others": [other.instruction for other in told], "paraphrases": PARAPHRASES[name],
        "outside": list(OUTSIDE), "longer": list(LONGER), "scorer": same_style,
    }  # fmt: skip


def announce(plan: Any) -> None:
    print(
        f"{plan.total / 60:.1f} minutes, {plan.memory_mib:.0f} MiB, {plan.inputs} and {plan.swept} inputs", flush=True
    )
    print({name: round(seconds) for name, seconds in plan.seconds.items()}, plan.left_out, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--sections", default="all", help="all, or some, comma-separated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "thought-kernels-reports")
    parser.add_argument("--output", type=Path, default=REPORTS)
    options = parser.parse_args()
    for name, _, path in (given.partition("=") for given in options.models):
        of = task(TASKS[name], seed=0, inputs=2 * options.inputs)
        folder = options.work / f"{name}-{of.name}"
        model, tokenizer = load(path)
        given = arguments(name, of, options.inputs)
        sections = options.sections if options.sections == "all" else options.sections.split(",")
        found = tk.evaluate(
            model, tokenizer, of.instruction, output=folder, minutes=options.minutes, announce=announce,
            sections=sections, progress=lambda done, total, title: print(f"{done} of {total}. {title}", flush=True),
            **given,
        )  # fmt: skip
        print(f"{found.seconds:.0f} s;", *(f"{line.status}: {line.question}" for line in found.verdict), sep="\n")
        place = options.output / folder.name
        place.mkdir(parents=True, exist_ok=True)
        for part in ("html", "json", "csv"):
            shutil.copyfile(folder / f"evaluation.{part}", place / f"evaluation.{part}")


if __name__ == "__main__":
    main()
