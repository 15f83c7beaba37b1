"""English to French for the paper's translation experiment: short sentences, and words behind demonstrations.

The sentences are written for this benchmark. Fewer are at hand than the paper has steps, so those to fit on are gone
through again and again: a step adds c1/300 of an example, whichever it is.
"""

from __future__ import annotations

import csv
import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tasks import task

from thought_kernels.evaluation.experiments.pairs import Pair, Split

SENTENCES = Path(__file__).with_name("sentences.tsv")
KNOWN = Path(__file__).with_name("known_translations.tsv")
VALIDATION = 16  # at most, to choose c1 on

Turns = list[dict[str, str]]


def sentences() -> list[Pair]:
    """Every sentence with one of its translations."""
    with SENTENCES.open(newline="", encoding="utf-8") as file:
        return [Pair(row["english"], row["french"]) for row in csv.DictReader(file, delimiter="\t")]


def sentence_split(steps: int, inputs: int) -> Split:
    """Sentences to fit on, to choose c1 on and to measure on; the last do not depend on how many steps there are."""
    pairs = sentences()
    random.Random("sentences").shuffle(pairs)
    return _split(pairs, steps, inputs)


def word_split(steps: int, inputs: int) -> tuple[Turns, Split]:
    """Demonstrations of words and their translations, and a split of other words.

    Without those that are the same in both languages, which a model that repeats its input gets right.
    """
    demonstrations, pairs = _words()
    return demonstrations, _split([pair for pair in pairs if pair.question != pair.answer], steps, inputs)


class Known(NamedTuple):
    """A question with answers whose worth is known: its reference, another right answer, and one with a wrong word."""

    question: str
    reference: str
    right: str
    wrong: str


def known_translations() -> dict[str, list[Known]]:
    """Sentences and words that the experiments fit or choose c1 on, by their kind."""
    references = {"sentences": dict(sentences()), "words": dict(_words()[1])}
    with KNOWN.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        kind: [
            Known(row["english"], of[row["english"]], row["french"], row["wrong"])
            for row in rows if row["english"] in of
        ]
        for kind, of in references.items()
    }  # fmt: skip


def _words() -> tuple[Turns, list[Pair]]:
    words = task("english-french", seed=0, inputs=1000)
    assert isinstance(words.instruction, list)
    return words.instruction, [Pair(*pair) for pair in [*words.held_out, *words.inputs]]


def _split(pairs: list[Pair], steps: int, inputs: int) -> Split:
    stop = inputs + min(VALIDATION, inputs)
    fresh, validation, fit = pairs[:inputs], pairs[inputs:stop], pairs[stop:]
    return Split(list(itertools.islice(itertools.cycle(fit), steps)), validation, fresh)


def words_in_common(text: str, answer: str, question: str) -> float:
    """F1 of the words of the text's first line and the reference's, case aside: a sentence has many translations.

    2 · words in common / (words of the text + words of the reference)
    """
    found, right = (Counter(re.findall(r"\w+", line.casefold())) for line in (text.strip().partition("\n")[0], answer))
    return 2 * (found & right).total() / max(1, found.total() + right.total())
