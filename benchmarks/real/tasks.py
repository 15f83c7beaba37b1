"""The tasks: word pairs, natural instructions, long system prompts and arithmetic, half of each kind reserved."""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

from rules import rules

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
    if table.get("each_rule"):
        rows = _each_rule_asked(draw, name, rows)
    if kind == "word":
        rows, shown = rows[DEMONSTRATIONS:], rows[:DEMONSTRATIONS]
        instruction = [
            {"role": role, "content": text}
            for pair in shown
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    return Task(name, kind, seed, table["reserved"], instruction, rest[:inputs], held_out)


def _each_rule_asked(draw: random.Random, name: str, rows: list[tuple[str, None]]) -> list[tuple[str, None]]:
    """The rows of a system prompt, of each rule's inputs half, at least one, among the held-out ones."""
    asked = [[row for row in rows if rule.applies(row[0])] for rule in rules(name) if rule.asked is not None]
    chosen = list(dict.fromkeys(row for of in asked for row in of[: max(len(of) // 2, 1)]))
    free = [row for row in rows if not any(row in of for of in asked)]
    left = [row for row in rows if row not in chosen and row not in free]
    drawn = [*chosen, *free, *left]
    held_out, rest = drawn[:HELD_OUT], drawn[: HELD_OUT - 1 : -1]
    fit = rest[:HELD_OUT]  # what is left over meets no rule
    draw.shuffle(held_out)
    draw.shuffle(fit)
    return [*held_out, *fit, *rest[HELD_OUT:]]


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
