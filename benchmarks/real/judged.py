"""A local model as the judge of published.py's translations, as the paper had a remote one, and what it is worth.

    python benchmarks/real/judged.py --judge DIR [--results ../results/experiments/real]

First the judge is judged, into judge.csv, by answers whose worth is known, to inputs that no experiment reports: other
translations than the reference, which are right, and one with a wrong word, another input's reference and the English
itself, which are wrong. A small judge leans to one reply whatever it reads, so it is given a threshold of its log-odds,
the one that tells half of these answers apart best, and is judged by the other half. Then it grades every answer at
each line's best and last point, into judged.csv beside the answers. A run that was stopped goes on from judge.jsonl,
which is removed when it is finished.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from published import OUTPUT
from tqdm import tqdm
from translations import known_translations

from thought_kernels.evaluation.experiments.published import PUBLISHED
from thought_kernels.evaluation.measures.scorers import Judge
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.evaluation.records.files import write_csv
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.models.load import load
from thought_kernels.version import __version__

RIGHT = "another translation"
BATCH = 16  # answers between two lines of the journal
Asked = tuple[str, str, str]  # text, reference, question


def known_answers(reported: Container[str]) -> dict[tuple[str, str], list[Asked]]:
    """Answers that are right or wrong beyond doubt, by what was asked for and what they are.

    The reference itself is not among them: the judge sees it, so equal texts would do.
    """
    found: dict[tuple[str, str], list[Asked]] = {}
    for asked, every in known_translations().items():
        known = [one for one in every if one.question not in reported]
        texts = {
            RIGHT: [one.right for one in known], "a wrong word": [one.wrong for one in known],
            "another's reference": [one.reference for one in [*known[1:], *known[:1]]],
            "the English": [one.question for one in known],
        }  # fmt: skip
        for kind, answers in texts.items():
            found[asked, kind] = [
                (text, one.reference, one.question) for text, one in zip(answers, known, strict=True)
            ]  # fmt: skip
    return found


class Kept:
    """A judge's log-odds, kept as they come."""

    def __init__(self, odds: Callable[[Sequence[str], Sequence[str], Sequence[str]], list[float]], journal: Journal):
        self._odds, self._journal = odds, journal

    def __call__(self, asked: Sequence[Asked], name: str) -> list[float]:
        """The log-odds of each, which are asked for once."""
        distinct = list(dict.fromkeys(asked))
        found: dict[Asked, float] = {}
        for start in tqdm(range(0, len(distinct), BATCH), desc=name, leave=False):
            part = distinct[start : start + BATCH]
            odds = self._journal.once(f"{name} {start}", lambda part=part: self._odds(*zip(*part, strict=True)))  # type: ignore[misc]
            found.update(zip(part, odds, strict=True))
        return [found[one] for one in asked]


def threshold(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Log-odds above which the largest share of right and the smallest of wrong answers lie."""
    every = sorted({*right, *wrong})
    between = [(low + high) / 2 for low, high in itertools.pairwise(every)] or every

    def told(least: float) -> float:
        return share(right, least) - share(wrong, least)

    return max(between, key=told)


def share(odds: Sequence[float], least: float) -> float:
    """How many are above."""
    return round(sum(value > least for value in odds) / len(odds), 4)


def judge_known(judge: Kept, known: Mapping[tuple[str, str], Sequence[Asked]]) -> list[dict[str, Any]]:
    """How often the judge says Yes to answers that are known, and is above the threshold that others of them chose."""
    odds = {key: judge(answers, ", ".join(key)) for key, answers in known.items()}
    rows = []
    for asked in dict.fromkeys(asked for asked, _ in odds):
        of = {kind: found for (other, kind), found in odds.items() if other == asked}
        wrong = [value for kind, found in of.items() if kind != RIGHT for value in found[::2]]
        least = threshold(of[RIGHT][::2], wrong)
        rows += [
            {"asked": asked, "answers": kind, "count": len(found[1::2]), "yes": share(found[1::2], 0.0),
             "threshold": round(least, 4), "above": share(found[1::2], least)}
            for kind, found in of.items()
        ]  # fmt: skip
    return rows


def judge_answers(judge: Kept, file: Path, name: str, least: float) -> list[dict[str, Any]]:
    """Each point's share above the threshold, the prompted model's too, beside the experiment's own grades."""
    rows = rows_of(file)
    told = {row["query"]: row for row in rows}
    points: dict[tuple[str, str], list[tuple[Asked, float]]] = {
        ("prompted", "0"): [
            ((row["prompted"], row["answer"], row["query"]), float(row["prompted_grade"])) for row in told.values()
        ]
    }
    for row in rows:
        asked = (row["patched"], row["answer"], row["query"])
        points.setdefault((row["line"], row["steps"]), []).append((asked, float(row["patched_grade"])))
    judged = iter(judge([asked for point in points.values() for asked, _ in point], name))
    found = []
    for (line, steps), point in points.items():
        odds, grades = [next(judged) for _ in point], [grade for _, grade in point]
        agree = [(value > least) == (grade >= 0.5) for value, grade in zip(odds, grades, strict=True)]
        found.append({
            "line": line, "steps": steps, "inputs": len(point), "yes": share(odds, 0.0), "judged": share(odds, least),
            "graded": round(sum(grades) / len(grades), 4), "agree": round(sum(agree) / len(agree), 4),
        })  # fmt: skip
    return found


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, metavar="DIR")
    parser.add_argument("--results", type=Path, default=OUTPUT)
    options = parser.parse_args()
    model, tokenizer = load(options.judge)
    files = sorted(options.results.glob("*/translation/answers.csv"))
    known = known_answers({row["query"] for file in files for row in rows_of(file)})
    settings = {
        "judge": fingerprint(model), "known": data_hash(list(known.values())), "version": __version__,
        "answers": {file.parents[1].name: data_hash(file.read_text(encoding="utf-8")) for file in files},
    }  # fmt: skip
    journal = Journal(options.results / "judge.jsonl", settings)
    judge = Kept(Judge(model, tokenizer, PUBLISHED["translation"].instruction).odds, journal)
    judged = judge_known(judge, known)
    write_csv(judged, options.results / "judge.csv")
    least = {row["asked"]: row["threshold"] for row in judged}
    for file in files:
        name = file.parents[1].name
        rows = judge_answers(judge, file, name, least["words" if name == "gemma" else "sentences"])
        write_csv(rows, file.with_name("judged.csv"))
    (options.results / "judge.jsonl").unlink()


if __name__ == "__main__":
    main()
