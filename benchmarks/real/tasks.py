"""The tasks: word pairs, natural instructions, long system prompts and arithmetic, half of each kind reserved."""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WORD_FORMAT = "{prompt}\n->\n{completion}\n\n"
DEMONSTRATIONS = 8
HELD_OUT = 32


@dataclass(frozen=True)
class Task:
    """What is told to the model, and inputs with the answers that count as right (None: there is no right answer)."""

    name: str
    kind: str  # word, instruction, system, arithmetic
    seed: int
    reserved: bool  # no recipe or default may be chosen by it
    instruction: str | list[dict[str, str]]
    inputs: list[tuple[str, str | None]]  # to fit on
    held_out: list[tuple[str, str | None]]


def names(kind: str | None = None, reserved: bool | None = None) -> list[str]:
    """The tasks of a kind and of a half; None takes all."""
    return [
        name
        for name, (of_kind, table) in _tables().items()
        if kind in (None, of_kind) and reserved in (None, table["reserved"])
    ]


def task(name: str, *, seed: int, inputs: int = 32) -> Task:
    """A task whose demonstrations, inputs and held-out inputs are drawn by `seed`; held-out ones do not depend on
    how many inputs there are."""
    kind, table = _tables()[name]
    draw = random.Random(f"{name} {seed}")
    if kind == "arithmetic":
        rows, instruction = _sums(draw, table), table["text"]
    elif kind == "word":
        rows = word_pairs(table)
    elif kind == "system":
        rows = [(line, None) for line in table["inputs"].strip().splitlines()]
        instruction = [{"role": "system", "content": table["text"].strip()}]
    else:
        rows = [(line, None) for line in (HERE / "inputs.txt").read_text().splitlines()]
        instruction = table["text"]
    draw.shuffle(rows)
    if kind == "word":
        rows, shown = rows[DEMONSTRATIONS:], rows[:DEMONSTRATIONS]
        instruction = [
            {"role": role, "content": text}
            for pair in shown
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    return Task(name, kind, seed, table["reserved"], instruction, rest[:inputs], held_out)


def word_pairs(table: dict) -> list[tuple[str, str]]:
    """Pairs of a word task, as "prompt: completion, prompt: completion" writes them."""
    return [tuple(entry.strip().split(": ")) for entry in table["pairs"].replace("\n", " ").split(",") if entry.strip()]


def _sums(draw: random.Random, table: dict) -> list[tuple[str, str]]:
    """Different rows of numbers with their sum or product, enough for every number of inputs."""
    low, high, count = table["low"], table["high"], table["numbers"]
    rows: dict[str, str] = {}
    while len(rows) < 2 * HELD_OUT + 16:
        numbers = [draw.randint(low, high) for _ in range(count)]
        answer = sum(numbers) if table["operation"] == "sum" else numbers[0] * numbers[1]
        rows[" ".join(map(str, numbers))] = str(answer)
    return list(rows.items())


def _tables() -> dict[str, tuple[str, dict]]:
    files = {"word": "words", "instruction": "instructions", "system": "system_prompts", "arithmetic": "arithmetic"}
    return {
        name: (kind, table)
        for kind, file in files.items()
        for name, table in tomllib.loads((HERE / f"{file}.toml").read_text()).items()
    }
