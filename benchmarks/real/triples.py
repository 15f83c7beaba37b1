"""Three numbers and their sum or product, for the paper's addition and multiplication, and what is right."""

from __future__ import annotations

import itertools
import random
import re

from translations import VALIDATION

from thought_kernels.demo.tasks import NUMBERS, TASKS
from thought_kernels.evaluation.experiments.pairs import Pair, Split
from thought_kernels.evaluation.measures.answers import final_value

TASK = {"addition": "sum", "multiplication": "multiply"}
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")  # 18, 336.0, 1,000


def triple_split(name: str, steps: int, inputs: int) -> Split:
    """Triples to fit on, to choose c1 on and to measure on; the last do not depend on how many steps there are.

    No two parts share three numbers in any order. Triples that end in their result are left out, since a repetition of
    the question would be right, and products of 0, since any answer that ends in 0 would be.

    Args:
        name: addition or multiplication.
        steps: triples to fit on, at most; those of the same numbers in another order count apart.
        inputs: to measure on.
    """
    draw = random.Random(f"triples {name}")
    orders = [_asked(name, numbers) for numbers in itertools.combinations_with_replacement(NUMBERS, 3)]
    orders = [found for found in orders if found]
    draw.shuffle(orders)
    stop = inputs + min(VALIDATION, inputs)
    fresh, validation = ([draw.choice(found) for found in part] for part in (orders[:inputs], orders[inputs:stop]))
    fit = [pair for found in orders[stop:] for pair in found]
    draw.shuffle(fit)
    return Split(fit[:steps], validation, fresh)


def _asked(name: str, numbers: tuple[int, ...]) -> list[Pair]:
    """A pair for each order of the numbers that can be asked about."""
    answer = TASKS[TASK[name]].answer
    texts = [" ".join(map(str, order)) for order in sorted(set(itertools.permutations(numbers)))]
    pairs = [Pair(text, answer(text)) for text in texts]
    return [
        pair for pair in pairs
        if not last_value(pair.question, pair.answer, pair.question)
        and (name == "addition" or final_value(pair.answer) != "0")
    ]  # fmt: skip


def last_value(text: str, answer: str, question: str) -> bool:
    """The last number that the text names, with separators or a decimal point or without, is the result."""
    found = NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(final_value(answer))
