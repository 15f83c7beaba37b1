"""The paper's experiments on real models without any: data, what is right, rows, the judge of the judge, tables."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
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
import triples

import thought_kernels as tk
from thought_kernels.evaluation.records.digests import data_hash
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


@pytest.mark.parametrize("name", ["addition", "multiplication"])
def test_triples_are_other_numbers_and_their_results_are_no_accident(name: str) -> None:
    setting = published.EXPERIMENTS["qwen"][name](name, 600, 32)
    numbers = [{tuple(sorted(pair.question.split())) for pair in part} for part in setting.data]
    assert all(not one & other for one, other in itertools.combinations(numbers, 2))
    assert [len(part) for part in numbers[1:]] == [16, 32] and setting.max_new_tokens == 64
    for pair in itertools.chain(*setting.data):
        assert not setting.match(pair.question, pair.answer, pair.question)
        assert name == "addition" or not pair.answer.endswith("= 0")
    assert not any(setting.match("0 0 0 0 0", pair.answer, pair.question) for pair in setting.data.fresh)
    a, b, c = map(int, setting.data.fresh[0].question.split())
    assert setting.data.fresh[0].answer.endswith(f" = {a + b + c if name == 'addition' else a * b * c}")


def test_what_counts_as_right() -> None:
    assert triples.last_value("4 + 6 + 8 = 18.", "4 + 6 + 8 = 18", "4 6 8")
    assert triples.last_value("It is 336.0", "6 * 7 * 8 = 336", "6 7 8")
    assert triples.last_value("10 × 10 × 10 = 1,000", "10 * 10 * 10 = 1000", "10 10 10")
    for text in ("18 is the sum of 4 6 8", "18.5", "1,018", "", "none"):
        assert not triples.last_value(text, "4 + 6 + 8 = 18", "4 6 8")
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
    assert found["settings"]["data"] == data_hash(published.EXPERIMENTS["qwen"]["addition"]("addition", 3, 2).data)
    assert found["settings"]["instruction"] == "Sum the numbers" and found["settings"]["match"] == "last_value"
    published.run(options(tmp_path), "qwen", "there")
    assert len(opened) == 2
    for other in ({"steps": 4}, {"inputs": 1}):  # a trial is not taken for what was asked for
        with pytest.raises(ValueError, match=r"must hold results of the same settings, got .* there and \d here"):
            published.run(options(tmp_path, **other), "qwen", "there")
    monkeypatch.setattr(sys, "argv", ["published", "--models", "qwen=x", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        published.main()
    assert "steps 3 there and 600 here, inputs 2 there and 32 here" in capsys.readouterr().err and len(opened) == 2
    (folder / "journal.jsonl").write_text("")  # of a run that was stopped after another one
    published.run(options(tmp_path, only="qwen/multiplication"), "qwen", "there")
    assert len(opened) == 3 and (folder / "journal.jsonl").exists()
    published.run(options(tmp_path), "qwen", "there")
    assert len(opened) == 4 and not (folder / "journal.jsonl").exists()


def test_the_estimate_counts_what_transmute_writes(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer takes a minute and all else nothing, so that minutes are counts of answers."""
    clock = iter([0.0, 180.0, 0.0, 0.0, 0.0, 0.0])  # three prompted answers; a read and a fitted example take nothing
    monkeypatch.setattr(published, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(published, "PROBED", 3)
    monkeypatch.setattr(published, "prompted_texts", lambda *_, **__: ["a"] * 3)
    monkeypatch.setattr(published, "paper_patch", lambda *_, **__: None)
    monkeypatch.setattr(published.tk, "transmute", lambda *_, **__: None)
    model, tokenizer = published.load("there")
    setting = published.EXPERIMENTS["qwen"]["addition"]("addition", 10, 4)
    at = {"points": [5, 10], "default_points": [4, 8]}
    least, _ = published.estimate(model, tokenizer, setting, at)
    asked = (3 * 2 + 2 + 2) * 4
    tried = 2 * 2 * len(published.C1_FACTORS) * 4
    recipe = tk.Recipe()
    written = sum(2 * recipe.written_inputs + recipe.completions * n for n in (4, 8))
    assert least == asked + tried + written


class Reader:
    """A judge that leans to No, to right answers less than to all else, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self._right = {one.right for every in translations.known_translations().values() for one in every}

    def __call__(self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str]) -> list[float]:
        self.asked += len(texts)
        return [-3.0 if text in {*self._right, answer} else -5.0 for text, answer in zip(texts, answers, strict=True)]


def answer(line: str, steps: int, query: str, patched: str, grades: tuple[float, float] = (1, 1)) -> dict[str, Any]:
    return {
        "line": line, "steps": steps, "query": query, "answer": "oui", "prompted": "oui", "patched": patched,
        "prompted_grade": grades[0], "patched_grade": grades[1],
    }  # fmt: skip


def test_the_judge_is_judged_and_asked_once(tmp_path: Path) -> None:
    reader = Reader()
    judge = judged.Kept(reader, Journal(tmp_path / "journal.jsonl", {}))
    known = {key: found[:20] for key, found in judged.known_answers(()).items()}
    rows = judged.judge_known(judge, known)
    assert [(row["asked"], row["above"]) for row in rows] == [
        (asked, above) for asked in ("sentences", "words") for above in (1, 0, 0, 0)
    ]
    assert {(row["yes"], row["threshold"]) for row in rows} == {(0, -4)}
    assert all(row["count"] == 10 for row in rows) and reader.asked == 160
    again = judged.Kept(reader, Journal(tmp_path / "journal.jsonl", {}))
    assert judged.judge_known(again, known) == rows and reader.asked == 160

    file = tmp_path / "answers.csv"
    answers = [("yes", "oui", (1, 1)), ("no", "non", (1, 0.6)), ("yes", "no", (1, 0)), ("no", "oui", (1, 1))]
    write_csv([answer("paper", 5 * (n // 2), q, text, g) for n, (q, text, g) in enumerate(answers)], file)
    points = judged.judge_answers(judge, file, "here", -4.0)
    assert [(row["line"], row["steps"], row["inputs"]) for row in points] == [
        ("prompted", "0", 2), ("paper", "0", 2), ("paper", "5", 2),
    ]  # fmt: skip
    assert [row["judged"] for row in points] == [1, 0.5, 0.5] and [row["agree"] for row in points] == [1, 0.5, 1]
    assert points[1]["graded"] == 0.8 and reader.asked == 160 + 4  # "oui" to "yes" and "no", "non", "no"


def test_known_answers_are_what_they_are_called_and_no_answers_that_are_reported() -> None:
    settings = [published.EXPERIMENTS[model]["translation"]("translation", 600, 32) for model in ("qwen", "gemma")]
    reported = {pair.question for setting in settings for pair in setting.data.fresh}
    assert len(reported) == 64
    known = translations.known_translations()
    assert {kind: len(every) for kind, every in known.items()} == {"sentences": 48, "words": 36}
    for one in itertools.chain(*known.values()):
        assert one.question not in reported and len({*one}) == 4
        assert translations.words_in_common(one.wrong, one.reference, "") < 1
        if " " in one.question:
            found, right = (re.findall(r"\w+", text) for text in (one.wrong, one.reference))
            assert sum(a != b for a, b in zip(found, right, strict=True)) == 1
    for (_, kind), answers in judged.known_answers(()).items():
        assert all((text == question) == (kind == "the English") and text != reference
                   for text, reference, question in answers)  # fmt: skip
    left = judged.known_answers({"rain", "They sold their house."})
    assert len(left["words", judged.RIGHT]) == 35 and len(left["sentences", judged.RIGHT]) == 47


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
    lines = [line(name, [0.25, low, low / 2]) for name, low in (("paper", 0.1), ("tuned", 0.4), ("residual", 0.6))]
    found = {"prompted": 0.75, "base": 0.25, "inputs": 40, "sampled": [0, 6], "settings": {"match": "last_value"},
             "lines": [*lines, line("default", [0, 1])]}  # fmt: skip
    write_json(found, folder / "results.json")
    write_csv([
        answer("paper", 5, "a", "A", (1, 0)), answer("paper", 5, "b", "B", (0, 0.5)),
        answer("paper", 10, "a", "A", (0, 1)), answer("paper", 10, "b", "B", (0.4, 0.4)),
    ], folder / "answers.csv")  # fmt: skip
    return folder


def changed(folder: Path, **changes: Any) -> list[str]:
    """The summary's last cells of an experiment when some of its results are others."""
    found = json.loads((folder / "results.json").read_text())
    write_json({**found, **changes}, folder / "results.json")
    (row,) = published_tables.summary().splitlines()[2:3]
    write_json(found, folder / "results.json")
    return [cell.strip() for cell in row.split("|")[1:-1]]


def at_c1(accuracy: float, *, last: float = 0.0) -> list[dict[str, Any]]:
    """Lines whose tuned one has this accuracy at 300 steps, 0 before and another after."""
    tuned = line("tuned", [0.25, 0, accuracy, last])
    for point, steps in zip(tuned["points"], (0, 150, 300, 600), strict=True):
        point["steps"] = steps
    return [line("paper", [0.25, 0]), tuned, line("residual", [0.25, 0]), line("default", [0, 1])]


def test_the_point_that_is_reported_was_not_chosen_by_its_inputs(results: Path) -> None:
    cells = changed(results)
    assert cells[:5] == ["multiplication", "Qwen2.5 Coder 0.5B Instruct", "about 1", "0.800", "0.800"]
    assert [cell[:5] for cell in cells[5:10]] == ["0.250", "0.750", "0.050", "0.200", "0.300"]  # the last steps
    assert cells[6] == "0.750 (0.60 to 0.86)"
    assert cells[10] == "0.100" and cells[12:] == ["1.000 (0.91 to 1.00) from 5", "1.500"]
    # A c1 that was chosen is the effective one at 300 steps, whatever comes before or after.
    assert [cell[:5] for cell in changed(results, lines=at_c1(0.7, last=0.9))[7:10]] == ["0.000", "0.700", "0.000"]


def test_what_is_reproduced_is_a_share_of_what_being_told_adds(results: Path) -> None:
    # Multiplication keeps 0.8 in the paper: 0.25 + 0.8 · 0.5 = 0.65 is just enough here, 0.8 · 0.75 = 0.6 is not.
    for accuracy, said in (
        (0.65, "yes, within chance"), (0.625, "no, within chance"), (0.9, "yes"), (0.25, "no"), (0.0, "no"),
    ):  # fmt: skip
        assert changed(results, lines=at_c1(accuracy))[11] == said
    # Neither the bare model's point nor a patch that does nothing reproduces anything, however good the bare model is.
    assert changed(results, base=0.74, lines=at_c1(0.0))[10:12] == ["–", "– (told, it is not clearly better)"]
    for base, prompted, told in ((0.25, 0.4, False), (0.25, 0.7, True), (0.5, 0.6, False)):
        assert (changed(results, base=base, prompted=prompted)[10] != "–") is told
    assert published_tables.PUBLISHED["published qwen addition"]() == "Not measured yet."


def test_f1_is_not_compared_with_a_judges_verdicts(results: Path) -> None:
    cells = changed(results, settings={"match": "words_in_common"}, lines=at_c1(0.7))
    assert cells[11] == "– (F1, where the paper's are a judge's verdicts)"
    found = json.loads((results / "results.json").read_text())
    shown = published_tables.PUBLISHED["published qwen multiplication"]()
    assert "| line | step | right: both | patched alone |" in shown and "Prompted wrong, patched right, at" in shown
    write_json({**found, "settings": {"match": "words_in_common"}}, results / "results.json")
    shown = published_tables.PUBLISHED["published qwen multiplication"]()
    assert "| line | step | F1 at least 0.5: both | patched alone |" in shown and "right," not in shown
    assert "Patched alone with F1 at least 0.5, at the lines' last points" in shown


def test_the_summary_says_whether_addition_reaches_its_target(results: Path) -> None:
    addition = results.with_name("addition")
    results.rename(addition)
    said = published_tables.summary()
    assert "Addition on Qwen, default from 5 examples: 1.000 (0.91 to 1.00), 1.333 x prompted. The target" in said
    assert said.endswith("loses none: reached. One answer of the 40 is 0.033 x prompted.")
    assert changed(addition)[2:5] == ["not given", "1.000", "1.000"]
    found = json.loads((addition / "results.json").read_text())
    write_json({**found, "lines": [*found["lines"][:3], line("default", [0, 0.7])]}, addition / "results.json")
    assert "0.933 x prompted" in published_tables.summary() and "none: not reached." in published_tables.summary()
    write_json({**found, "prompted": 0.0}, addition / "results.json")
    assert published_tables.summary().endswith("where the prompted model gets nothing right.")


def test_tables_show_effective_c1_and_who_was_right(results: Path) -> None:
    shown = published_tables.PUBLISHED["published qwen multiplication"]()
    assert "| paper: c₁ = 1, blocks 1-2 | 0.250 | 0 (0) | 0.050 | 10 (0.2) | – |" in shown
    assert "| paper | 5 | 0 | 1 | 1 | 0 |\n| paper | 10 | 0 | 1 | 0 | 1 |" in shown
    alone = shown.split("Prompted wrong, patched right")[1].split("\n\n")[1].splitlines()[2:]
    assert alone == ["| paper | 10 | `a` | `oui` | `A` |"]
    assert r"| tuned | 5 (0.1) | `a\|b` | `x ⏎ y` | `'z'` |" in shown
    assert "c₁ of residual: accuracy (recovered effect) on other inputs, 0.5: 0.25 (–), 1: 0.50 (0.75). The " in shown


def test_the_judges_table_has_what_was_judged(results: Path) -> None:
    assert published_tables.judge() == "Not measured yet."
    base = results.parents[1]

    def known(count: int, **above: float) -> None:
        kinds = {judged.RIGHT: 1.0, "a wrong word": above.get("word", 0.0), "the English": 0.0}
        write_csv([
            {"asked": "words", "answers": kind, "count": count, "yes": 0, "threshold": 1, "above": share}
            for kind, share in kinds.items()
        ], base / "judge.csv")  # fmt: skip

    known(24, word=0.25)
    assert "| words | a wrong word | 24 | 0.000 | 0.250 (0.12 to 0.45) |" in published_tables.judge()
    assert "that it takes most often (a wrong word) by 0.75 (0.51 to 0.88)" in published_tables.judge()
    assert published_tables.judge().endswith("where 1 would be a perfect judge: it can be used.")
    known(24, word=0.5)
    assert published_tables.judge().endswith("what it says is worth little.")
    known(4)  # perfect, on too few answers to say so
    assert "by 1.00 (0.31 to 1.00)" in published_tables.judge()
    assert published_tables.judge().endswith("what it says is worth little.")
    (base / "gemma" / "translation").mkdir(parents=True)
    found = {"line": "paper", "steps": 9, "inputs": 4, "yes": 0.0, "judged": 0.5, "graded": 0.75, "agree": 0.25}
    write_csv([found], base / "gemma" / "translation" / "judged.csv")
    assert published_tables.judge().endswith(
        "| Gemma 3 270M | paper | 9 | 0.000 | 0.500 (0.15 to 0.85) | 0.750 | 0.250 |"
    )


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
