"""The paper's experiments on real models without any: data, what is right, rows, the judge of the judge, tables."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tables"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import experiment_tables
import judged
import published
import published_tables
import translations

from thought_kernels.evaluation.records.files import write_csv, write_json
from thought_kernels.evaluation.records.journal import Journal

TOKENIZER = tiny_tokenizer()
SETTINGS = [(model, name) for model, experiments in published.EXPERIMENTS.items() for name in experiments]


@pytest.mark.parametrize(("model", "name"), SETTINGS)
def test_a_setting_fits_on_nothing_that_it_measures_on(model: str, name: str) -> None:
    setting = published.EXPERIMENTS[model][name](name, 600, 32)
    fit, validation, fresh = ({pair.question for pair in part} for part in setting.data)
    assert [len(part) for part in setting.data] == [600, 16, 32] and len(validation) == 16 and len(fresh) == 32
    assert not (fit & validation or fit & fresh or validation & fresh) and len(fit) >= 30
    if isinstance(setting.instruction, list):
        assert not {turn["content"] for turn in setting.instruction} & (fit | validation | fresh)
    fewer = published.EXPERIMENTS[model][name](name, 10, 32)
    assert fewer.data.fresh == setting.data.fresh and fewer.data.fit == setting.data.fit[:10]
    for pair, other in zip(setting.data.fresh, setting.data.fresh[1:], strict=False):
        assert setting.match(pair.answer, pair.answer, pair.question) == 1 and pair.answer != pair.question
        if other.answer != pair.answer and name == "translation":
            assert setting.match(other.answer, pair.answer, pair.question) < 0.8
    at = published.points(model, setting.data.fit)
    assert at["points"][-1] == 600 and at["default_points"][-1] == min(32, len(fit))


def test_what_counts_as_right() -> None:
    assert published.last_value("4 + 6 + 8 = 18.", "4 + 6 + 8 = 18", "4 6 8")
    assert not published.last_value("18 is the sum of 4 6 8", "4 + 6 + 8 = 18", "4 6 8")
    common = translations.words_in_common
    assert common("le chat dort\nThe cat sleeps.", "Le chat dort.", "") == 1
    assert common("Le chien dort", "Le chat dort.", "") == pytest.approx(2 / 3)
    assert common("The cat sleeps", "Le chat dort.", "") == common("", "Le chat dort.", "") == 0
    assert common("le le le le", "Le chat dort.", "") == pytest.approx(2 / 7)


def test_sentences_are_different_and_whole() -> None:
    pairs = translations.sentences()
    assert len({pair.question for pair in pairs}) == len({pair.answer for pair in pairs}) == len(pairs) == 112
    assert all(text.strip() == text and text[-1] in ".?" for pair in pairs for text in pair)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model; the paths that it was read from."""
    paths: list[str] = []

    def load(path: str) -> Any:
        paths.append(path)
        return tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER), layer_types=["full_attention"] * 2), TOKENIZER

    monkeypatch.setattr(published, "load", load)
    return paths


def options(output: Path, **others: Any) -> Namespace:
    return Namespace(
        **{"output": output, "only": "qwen/addition", "steps": 3, "inputs": 2, "estimate": False, **others}
    )


@pytest.mark.filterwarnings("ignore:transmute")  # a random model ends no answer
def test_what_is_finished_is_not_measured_again(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "qwen" / "addition"
    published.run(options(tmp_path, estimate=True), "qwen", "there")
    least, most = map(float, capsys.readouterr().out.split("addition: ")[1].split(" minutes")[0].split(" to "))
    assert 0 <= least <= most and not tmp_path.joinpath("qwen").exists()
    monkeypatch.setattr(published, "estimate", lambda *_: (0.0, 1.0))
    published.run(options(tmp_path), "qwen", "there")
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.csv", "figure.png", "points.csv", "results.json", "samples.csv",
    ]  # fmt: skip
    found = json.loads((folder / "results.json").read_text())
    assert [[point["steps"] for point in line["points"]] for line in found["lines"]] == [[0, 1, 2, 3]] * 3 + [[0, 3]]
    assert found["settings"]["instruction"] == "Sum the numbers" and found["settings"]["match"] == "last_value"
    published.run(options(tmp_path), "qwen", "there")
    assert len(opened) == 2
    (folder / "journal.jsonl").write_text("")  # of a run that was stopped after another one
    published.run(options(tmp_path, only="qwen/multiplication"), "qwen", "there")
    assert len(opened) == 3 and (folder / "journal.jsonl").exists()
    published.run(options(tmp_path), "qwen", "there")
    assert len(opened) == 4 and not (folder / "journal.jsonl").exists()


class Reader:
    """A judge that leans to No, to the reference less than to all else, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        self.asked += len(texts)
        return [-3.0 if text == answer else -5.0 for text, answer in zip(texts, answers, strict=True)]


def answer(line: str, steps: int, query: str, patched: str, grades: tuple[float, float] = (1, 1)) -> dict[str, Any]:
    return {
        "line": line, "steps": steps, "query": query, "answer": "oui", "prompted": "oui", "patched": patched,
        "prompted_grade": grades[0], "patched_grade": grades[1],
    }  # fmt: skip


def test_the_judge_is_judged_and_asked_once(tmp_path: Path) -> None:
    reader = Reader()
    judge = judged.Kept(reader, Journal(tmp_path / "journal.jsonl", {}))
    rows = judged.judge_known(judge, 20)
    assert [(row["asked"], row["above"]) for row in rows] == [
        (asked, above) for asked in ("sentences", "words") for above in (1, 0, 0)
    ]
    assert {(row["yes"], row["threshold"]) for row in rows} == {(0, -4)}
    assert all(row["count"] == 20 for row in rows) and reader.asked == 120
    again = judged.Kept(reader, Journal(tmp_path / "journal.jsonl", {}))
    assert judged.judge_known(again, 20) == rows and reader.asked == 120

    file = tmp_path / "answers.csv"
    answers = [("yes", "oui", (1, 1)), ("no", "non", (1, 0.6)), ("yes", "no", (1, 0)), ("no", "oui", (1, 1))]
    write_csv([answer("paper", 5 * (n // 2), q, text, g) for n, (q, text, g) in enumerate(answers)], file)
    points = judged.judge_answers(judge, file, "here", -4.0)
    assert [(row["line"], row["steps"], row["inputs"]) for row in points] == [
        ("prompted", "0", 2), ("paper", "0", 2), ("paper", "5", 2),
    ]  # fmt: skip
    assert [row["judged"] for row in points] == [1, 0.5, 0.5] and [row["agree"] for row in points] == [1, 0.5, 1]
    assert points[1]["graded"] == 0.8 and reader.asked == 120 + 4  # "oui" to "yes" and "no", "non", "no"


def test_a_threshold_is_where_right_and_wrong_part_best() -> None:
    assert judged.threshold([1.0, 2.0, 3.0], [-1.0, 0.0, 2.5]) == 0.5
    assert judged.threshold([5.0], [5.0]) == 5.0
    assert judged.share([1.0, 2.0, 3.0, 4.0], 2.0) == 0.5


def line(name: str, accuracies: list[float]) -> dict[str, Any]:
    points = [{"steps": 5 * n, "accuracy": value, "effective_c1": 0.1 * n} for n, value in enumerate(accuracies)]
    samples = [{**point, "query": "a|b", "prompted": "x\ny", "patched": "`z`"} for point in points]
    sweep = [[0.5, 0.25, None], [1.0, 0.5, 0.75]] if name in ("tuned", "residual") else []
    return {"name": name, "c1": 1.0, "c2": 0.0, "layers": None if name == "default" else [1, 2], "points": points,
            "samples": samples, "sweep": sweep}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(experiment_tables, "RESULTS", tmp_path)
    folder = tmp_path / "experiments" / "real" / "qwen" / "multiplication"
    folder.mkdir(parents=True)
    lines = [line(name, [0, low, low / 2]) for name, low in (("paper", 0.1), ("tuned", 0.4), ("residual", 0.6))]
    found = {"prompted": 0.75, "base": 0.1, "inputs": 4, "sampled": [0, 6], "lines": [*lines, line("default", [0, 1])]}
    write_json(found, folder / "results.json")
    write_csv([
        answer("paper", 5, "a", "A", (1, 0)), answer("paper", 5, "b", "B", (0, 0.5)),
        answer("paper", 10, "a", "A", (0, 1)), answer("paper", 10, "b", "B", (0.4, 0.4)),
    ], folder / "answers.csv")  # fmt: skip
    return folder


def test_tables_say_what_is_reproduced(results: Path) -> None:
    # Multiplication's share is 0.8: 0.6 of 0.75 is just enough.
    (row,) = published_tables.summary().splitlines()[2:]
    assert row.endswith("| 0.100 | 0.750 | 0.100 | 0.400 | 0.600 | 1.000 from 5 | 1.333 | 0.800 | yes |")
    for change, said in (({"prompted": 0.76}, "no"), ({"prompted": 0.1}, "– (told, it does no better)")):
        found = json.loads((results / "results.json").read_text())
        write_json({**found, **change}, results / "results.json")
        assert published_tables.summary().endswith(f"| {said} |")
    assert published_tables.PUBLISHED["published qwen addition"]() == "Not measured yet."


def test_the_summary_says_whether_addition_reaches_what_was_wanted(results: Path) -> None:
    addition = results.with_name("addition")
    results.rename(addition)
    said = "Addition on Qwen, default from 5 examples: 1.333 x prompted, at least 0.99 wanted: met. One answer of the 4"
    assert said in published_tables.summary()
    found = json.loads((addition / "results.json").read_text())
    write_json({**found, "lines": [*found["lines"][:3], line("default", [0, 0.7])]}, addition / "results.json")
    assert "0.933 x prompted, at least 0.99 wanted: not met." in published_tables.summary()


def test_tables_show_effective_c1_and_who_was_right(results: Path) -> None:
    shown = published_tables.PUBLISHED["published qwen multiplication"]()
    assert "| paper: c₁ = 1, blocks 1-2 | 0.100 | 5 (0.1) | 0.050 | 10 (0.2) | – |" in shown
    assert "| paper | 5 | 0 | 1 | 1 | 0 |\n| paper | 10 | 0 | 1 | 0 | 1 |" in shown
    alone = shown.split("Prompted wrong, patched right")[1].split("\n\n")[1].splitlines()[2:]
    assert alone == ["| paper | 10 | `a` | `oui` | `A` |"]
    assert r"| tuned | 5 (0.1) | `a\|b` | `x ⏎ y` | `'z'` |" in shown
    assert "c₁ of residual: accuracy (recovered effect) on other inputs, 0.5: 0.25 (–), 1: 0.50 (0.75). The " in shown


def test_the_judges_table_has_what_was_judged(results: Path) -> None:
    assert published_tables.judge() == "Not measured yet."
    base = results.parents[1]
    kinds = {"the reference": 1, "another's reference": 0.0, "the English": 0.25}
    known = [
        {"asked": "words", "answers": kind, "count": 4, "yes": 0, "threshold": 1, "above": yes}
        for kind, yes in kinds.items()
    ]
    write_csv(known, base / "judge.csv")
    assert "| words | the English | 4 | 0.000 | 0.250 |" in published_tables.judge()
    assert published_tables.judge().endswith("by 0.75, where 1 would be a perfect judge: what it says is worth little.")
    write_csv(known[:2], base / "judge.csv")
    assert published_tables.judge().endswith("by 1.00, where 1 would be a perfect judge: it can be used.")
    (base / "gemma" / "translation").mkdir(parents=True)
    found = {"line": "paper", "steps": 9, "inputs": 4, "yes": 0.0, "judged": 0.5, "graded": 0.75, "agree": 0.25}
    write_csv([found], base / "gemma" / "translation" / "judged.csv")
    assert published_tables.judge().endswith("| Gemma 3 270M | paper | 9 | 0.000 | 0.500 | 0.750 | 0.250 |")


def test_the_shipped_models_results_are_in_the_form_that_the_tables_read() -> None:
    for name in experiment_tables.CURVES:
        with (experiment_tables.RESULTS / "experiments" / name / "answers.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found = experiment_tables.results(name)
        assert {row["line"] for row in rows} == {line["name"] for line in found["lines"]}
        for line in found["lines"]:
            grades = [float(row["patched_grade"]) for row in rows if row["line"] == line["name"]]
            best, last = experiment_tables.best_point(line), line["points"][-1]
            points = [best] if best == last else [best, last]
            assert sum(grades) == pytest.approx(sum(point["accuracy"] * found["inputs"] for point in points))
