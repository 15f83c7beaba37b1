"""A local model as the judge of published.py's translations, as the paper had a remote one, and what it is worth.

    python benchmarks/real/judged.py --judge DIR [--results ../results/experiments/real]

First the judge is judged: references as answers, which are right, and references of other sentences and the English
itself, which are wrong, into judge.csv. Then it grades every answer at each line's best and last point, into judged.csv
beside the answers. A run that was stopped goes on from judge.jsonl, which is removed when it is finished.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from published import OUTPUT
from tqdm import tqdm
from translations import sentences, word_split

from thought_kernels.evaluation.experiments.published import PUBLISHED
from thought_kernels.evaluation.measures.scorers import Judge
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.evaluation.records.files import write_csv
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.models.load import load
from thought_kernels.version import __version__

BATCH = 16  # answers between two lines of the journal
Asked = tuple[str, str, str]  # text, reference, question


def known_answers(count: int) -> dict[tuple[str, str], list[Asked]]:
    """Answers that are right or wrong beyond doubt, by what was asked for and what they are."""
    words = word_split(1, count)[1].fresh
    found: dict[tuple[str, str], list[Asked]] = {}
    for asked, pairs in (("sentences", sentences()[:count]), ("words", words)):
        others = [*pairs[1:], pairs[0]]
        found[asked, "the reference"] = [(pair.answer, pair.answer, pair.question) for pair in pairs]
        found[asked, "another's reference"] = [
            (other.answer, pair.answer, pair.question) for pair, other in zip(pairs, others, strict=True)
        ]
        found[asked, "the English"] = [(pair.question, pair.answer, pair.question) for pair in pairs]
    return found


class Kept:
    """A judge whose verdicts are kept as they come."""

    def __init__(self, judge: Any, journal: Journal) -> None:
        self._judge, self._journal = judge, journal

    def __call__(self, asked: Sequence[Asked], name: str) -> list[float]:
        """The judge's grades, each question asked once."""
        distinct = list(dict.fromkeys(asked))
        grades: dict[Asked, float] = {}
        for start in tqdm(range(0, len(distinct), BATCH), desc=name, leave=False):
            part = distinct[start : start + BATCH]
            found = self._journal.once(f"{name} {start}", lambda part=part: self._judge(*zip(*part, strict=True)))  # type: ignore[misc]
            grades.update(zip(part, found, strict=True))
        return [grades[one] for one in asked]


def judge_known(judge: Kept, count: int) -> list[dict[str, Any]]:
    """How often the judge says Yes to answers that are known."""
    rows = []
    for (asked, kind), answers in known_answers(count).items():
        grades = judge(answers, f"{asked}, {kind}")
        rows.append({"asked": asked, "answers": kind, "count": len(grades), "yes": round(sum(grades) / len(grades), 4)})
    return rows


def judge_answers(judge: Kept, file: Path, name: str) -> list[dict[str, Any]]:
    """Each point's share of Yes, the prompted model's too, beside the grades that the experiment was run with."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
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
        pairs = [(next(judged), grade) for _, grade in point]
        found.append({
            "line": line, "steps": steps, "inputs": len(pairs),
            "judged": round(sum(yes for yes, _ in pairs) / len(pairs), 4),
            "graded": round(sum(grade for _, grade in pairs) / len(pairs), 4),
            "agree": round(sum(yes == (grade >= 0.5) for yes, grade in pairs) / len(pairs), 4),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, metavar="DIR")
    parser.add_argument("--known", type=int, default=32, help="answers of each kind that are known")
    parser.add_argument("--results", type=Path, default=OUTPUT)
    options = parser.parse_args()
    model, tokenizer = load(options.judge)
    files = sorted(options.results.glob("*/translation/answers.csv"))
    settings = {
        "judge": fingerprint(model), "known": options.known, "version": __version__,
        "answers": {file.parents[1].name: data_hash(file.read_text(encoding="utf-8")) for file in files},
    }  # fmt: skip
    journal = Journal(options.results / "judge.jsonl", settings)
    judge = Kept(Judge(model, tokenizer, PUBLISHED["translation"].instruction), journal)
    write_csv(judge_known(judge, options.known), options.results / "judge.csv")
    for file in files:
        write_csv(judge_answers(judge, file, file.parents[1].name), file.with_name("judged.csv"))
    (options.results / "judge.jsonl").unlink()


if __name__ == "__main__":
    main()
