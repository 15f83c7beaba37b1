"""How effect and cost grow with the number of inputs and the size of the model: ../results/scaling.csv.

    python benchmarks/real/scaling.py --models smol=DIR gemma=DIR qwen=DIR [--inputs 4 8 16 32 64 128 256 512]

A base model (gemma) writes numbers out in words after eight demonstrations, the others answer everyday questions as a
pirate would. Inputs are made of parts (scaling.toml), so that there are enough of them; 32 others are held out, numbers
that no fit has seen or questions in the same patterns about things that none has seen. Rows that are there are kept.
"""

from __future__ import annotations

import argparse
import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from run import OUTPUT, run
from tasks import HELD_OUT, HERE, Task

OTHER_THINGS = 3  # of each part, held out
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)
TASKS = {"gemma": "numbers", "smol": "questions", "qwen": "questions"}


def spelled(number: int, words: Mapping[str, str]) -> str:
    """A number below 1,000 in words, as "three hundred forty-two"."""
    below_twenty, tens = words["below_twenty"].split(), words["tens"].split()
    if number < 20:
        return below_twenty[number]
    if number < 100:
        ten, unit = tens[number // 10 - 2], number % 10
        return f"{ten}-{below_twenty[unit]}" if unit else ten
    hundreds, rest = f"{below_twenty[number // 100]} hundred", number % 100
    return f"{hundreds} {spelled(rest, words)}" if rest else hundreds


def scaling_task(model: str, seed: int = 0) -> Task:
    """The model's task with all of its inputs, in an order drawn by `seed`; the held-out ones come first."""
    name, draw = TASKS[model], random.Random(seed)
    table = tomllib.loads((HERE / "scaling.toml").read_text())[name]
    if name == "numbers":
        rows = [(str(number), spelled(number, table)) for number in range(1000) if number not in table["shown"]]
        told = [
            {"role": role, "content": text}
            for number in table["shown"]
            for role, text in (("user", str(number)), ("assistant", spelled(number, table)))
        ]
        kind = "word"
        held_out, fitted = _split(draw, rows, HELD_OUT)
    else:
        held_out, fitted = [], []
        for part in table["parts"]:  # what is held out is of other things, in the same patterns
            for things, rows in zip(_split(draw, part["things"], OTHER_THINGS), (held_out, fitted), strict=True):
                rows += [(pattern.format(thing), None) for pattern in part["patterns"] for thing in things]
        told, kind = table["text"], "instruction"
        held_out, fitted = _split(draw, held_out, HELD_OUT)[0], _split(draw, fitted, 0)[1]
    return Task(name, kind, seed, False, told, fitted, held_out)


def _split(draw: random.Random, rows: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """So many rows drawn at random, and the others, in random order too."""
    drawn = draw.sample(rows, len(rows))
    return drawn[:count], drawn[count:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--inputs", type=int, nargs="+", default=COUNTS, help="to fit on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT.with_name("scaling.csv"))
    parser.set_defaults(recipe=[], rival=[])
    options = parser.parse_args()
    for entry in options.models:
        name, _, path = entry.partition("=")
        if name not in TASKS or not path:
            parser.error(f"models must be NAME=PATH with a name of {', '.join(TASKS)}, got {entry!r}")
        task = scaling_task(name, options.seed)
        if max(options.inputs) > len(task.inputs):
            parser.error(f"inputs must be at most {len(task.inputs)} for {name}, got {max(options.inputs)}")
        run(options, name, path, [task])


if __name__ == "__main__":
    main()
