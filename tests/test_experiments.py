"""The paper's experiments on a tiny random model: what is measured, kept, resumed, drawn and refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app, scoring
from thought_kernels.cli.experiment import task_split
from thought_kernels.demo.tasks import held_out
from thought_kernels.evaluation.experiments import curves, experiments, measured
from thought_kernels.evaluation.experiments.curves import default_steps, paper_steps
from thought_kernels.evaluation.experiments.experiments import run_experiment
from thought_kernels.evaluation.experiments.pairs import Pair, Split, read_pairs, split_pairs, usable
from thought_kernels.evaluation.experiments.published import LINES
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.pictures.curves import draw_experiment
from thought_kernels.evaluation.records.digests import fingerprint
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.evaluation.rivals.paper import C1_FACTORS, best_c1, paper_patch, sweep_c1
from thought_kernels.models import describe

TOKENIZER = tiny_tokenizer()
LAYERS = ["full_attention"] * 2


def build(seed: int = 0, **changes: Any) -> Any:
    model = tiny_gemma3(seed, vocab_size=len(TOKENIZER), layer_types=LAYERS, tie_word_embeddings=False, **changes)
    # Any token ends a completion, or a random model would go on for as long as it may.
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def data() -> Split:
    return task_split("sum", steps=5, inputs_count=3, seed=1)


@pytest.fixture(scope="module")
def ran(model: Any, data: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("addition")
    report = run_experiment(model, TOKENIZER, "addition", data, output, max_new_tokens=3)
    draw_experiment(report, output / "figure.png")
    return report, output


def test_a_split_measures_on_what_training_has_not_seen(data: Split) -> None:
    assert [len(part) for part in data] == [5, 3, 3]
    assert all(held_out(pair.question) for pair in data.fresh)
    assert not any(held_out(pair.question) for pair in [*data.fit, *data.validation])
    assert len({pair.question for part in data for pair in part}) == 11
    a, b, c = map(int, data.fit[0].question.split())
    assert data.fit[0].answer == f"{a} + {b} + {c} = {a + b + c}"


def test_the_lines_are_what_their_recipes_give(model: Any, data: Split, ran: tuple[Any, Path]) -> None:
    report, _ = ran
    paper, tuned, residual, default = report.lines
    assert [point.steps for point in paper.points] == [0, *paper_steps(5)] == [0, 1, 2, 3, 4, 5]
    assert [point.steps for point in default.points] == [0, *default_steps(5)] == [0, 4, 5]
    assert (paper.c1, paper.c2, paper.layers) == (0.015, 0.0, [1])
    assert paper.points[-1].effective_c1 == pytest.approx(0.015 * 5 / 300)
    for line in (tuned, residual):
        assert line.c1 == best_c1(line.sweep) and len(line.sweep) == len(C1_FACTORS)
    assert paper.sweep == default.sweep == [] and tuned.sweep != residual.sweep
    assert default.points[0].accuracy == paper.points[0].accuracy == report.base

    questions, answers = zip(*data.fresh, strict=True)
    trial = Trial(model, TOKENIZER, "Sum the numbers", questions, answers, max_new_tokens=3)
    labelled = [{"prompt": pair.question, "completion": pair.answer} for pair in data.fit]
    for line, activation in ((tuned, "input"), (residual, "residual")):
        recipe = tk.paper_recipe(c1=line.c1, layers=[1], mlp_activation=activation)
        with tk.transmute(model, TOKENIZER, "Sum the numbers", labelled, **recipe).applied(model):
            accuracy, texts = trial.answer(model)
        assert line.points[-1].accuracy == accuracy
        assert line.samples[-1].patched == texts[5 % 3] and line.samples[-1].query == questions[5 % 3]
        assert line.samples[-1].prompted == trial.prompted_texts[5 % 3]
        last = [answer for answer in report.answers if (answer.line, answer.steps) == (line.name, 5)]
        assert [answer.patched for answer in last] == texts and [answer.query for answer in last] == list(questions)
        assert [answer.patched_grade for answer in last] == trial.grade(texts)
        assert [answer.prompted_grade for answer in last] == trial.prompted_grades


def test_the_default_line_is_transmute_as_a_user_calls_it(
    model: Any, data: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, dict[str, Any], Any]] = []

    def transmute(model: Any, tokenizer: Any, told: Any, examples: Any, **options: Any) -> Any:
        calls.append((examples, options, tk.transmute(model, tokenizer, told, examples, **options)))
        return calls[-1][2]

    monkeypatch.setattr(curves, "transmute", transmute)
    given = {"format": "{prompt}\n->\n{completion}\n\n", "max_new_tokens": 3, "batch_size": 4}
    report = run_experiment(model, TOKENIZER, "addition", data, tmp_path, lines=["default"], **given)
    questions = [pair.question for pair in data.fit]
    assert [(examples, options) for examples, options, _ in calls] == [(questions[:4], given), (questions, given)]
    made = [patch.provenance for *_, patch in calls]
    assert all(found["completions"] == tk.Recipe().completions == 3 and found["written_inputs"] for found in made)
    assert all(found["generated_completions"] == 3 * n + len(found["written_inputs"]) for found, n in
               zip(made, (4, 5), strict=True))  # fmt: skip
    journal = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert {json.loads(row)["name"] for row in journal[1:]} == {"levels", "default 4", "default 5"}
    trial = Trial(model, TOKENIZER, "Sum the numbers", *map(list, zip(*data.fresh, strict=True)), **given)
    with tk.transmute(model, TOKENIZER, "Sum the numbers", questions, **given).applied(model):
        texts = trial.answer(model)[1]
    assert [answer.patched for answer in report.answers if answer.steps == 5] == texts


def test_the_files_hold_the_report(ran: tuple[Any, Path]) -> None:
    report, output = ran
    written = json.loads((output / "results.json").read_text())
    assert [line["name"] for line in written["lines"]] == list(LINES)
    assert written["settings"]["transmute_defaults"]["pairing"] == "sequential"
    with (output / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(line.points) for line in report.lines)
    assert len(list(csv.DictReader((output / "samples.csv").open()))) == len(rows)
    with (output / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert {(row["line"], int(row["steps"])) for row in answers} == {
        (line.name, point.steps) for line in report.lines for point in (line.best, line.points[-1])
    }
    assert len(answers) == len(report.answers) and all(row["answer"] for row in answers)
    from matplotlib.image import imread

    assert imread(output / "figure.png").shape[1] >= 1000
    assert sorted(path.name for path in output.iterdir()) == [
        "answers.csv", "figure.png", "journal.jsonl", "points.csv", "results.json", "samples.csv",
    ]  # fmt: skip


def test_a_stopped_run_goes_on_where_it_was(
    model: Any, data: Split, ran: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, output = ran
    lines = (output / "journal.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"paper 3"' not in line and '"paper 5"' not in line]
    (tmp_path / "journal.jsonl").write_text("".join(kept) + lines[-1][:20])  # and a line that was cut
    fitted: list[list[int]] = []

    def paper_line(*arguments: Any, **options: Any) -> Any:
        fitted.append(list(arguments[4]))
        return original(*arguments, **options)

    original = measured.paper_line
    monkeypatch.setattr(measured, "paper_line", paper_line)
    monkeypatch.setattr(measured, "default_line", None)
    again = run_experiment(model, TOKENIZER, "addition", data, tmp_path, max_new_tokens=3)
    assert fitted == [[3, 5], []] and again == report
    with pytest.raises(ValueError, match="must hold results of the same settings, got max_new_tokens 3 there"):
        run_experiment(model, TOKENIZER, "addition", data, tmp_path, max_new_tokens=4)
    with pytest.raises(ValueError, match="got weights "):
        run_experiment(build(1), TOKENIZER, "addition", data, tmp_path, max_new_tokens=3)


def test_the_sweep_scales_one_patch(model: Any, data: Split) -> None:
    questions, answers = zip(*data.validation, strict=True)
    trial = Trial(model, TOKENIZER, "Sum the numbers", questions, answers, max_new_tokens=3)
    unit = tk.transmute(model, TOKENIZER, "Sum the numbers", list(questions), max_new_tokens=3, **tk.paper_recipe(
        c1=1.0, layers=[1])
    )  # fmt: skip
    tried = sweep_c1(model, unit, trial, 0.5, (0.0, 2.0))
    assert tried[0] == (0.0, trial.base, pytest.approx(0.0, abs=1e-5))
    with unit.applied(model):
        assert tried[1] == (1.0, *((score := trial.score(model)).accuracy, score.effect.recovered))


def test_a_compiled_model_goes_on_with_the_run_of_the_one_inside(
    model: Any, data: Split, ran: tuple[Any, Path]
) -> None:
    report, output = ran
    compiled = torch.compile(model, backend="eager")
    again = run_experiment(compiled, TOKENIZER, "addition", data, output, max_new_tokens=3)
    assert again == report


def test_translation_has_vectors_and_takes_any_pairs(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"en": f"a{i}", "fr": f"b{i}"}) + "\n" for i in range(9)))
    data = split_pairs(read_pairs(file), steps=4, inputs=2, seed=0)
    report = run_experiment(
        model, TOKENIZER, "translation", data, tmp_path / "out", lines=["paper"], max_new_tokens=2, layers=[0, 1]
    )
    (line,) = report.lines
    assert (line.c1, line.c2, line.layers, line.sweep) == (0.03, 0.2, [0, 1], [])


def test_demonstrations_in_a_format_are_an_instruction_and_points_may_be_added(model: Any, tmp_path: Path) -> None:
    told = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    data = Split([Pair("3", "4"), Pair("5", "6")] * 2, [Pair("7", "8")], [Pair("9", "0"), Pair("1", "2")])
    options: dict[str, Any] = {
        "instruction": told, "format": "{prompt}\n->\n{completion}\n\n", "lines": ["paper", "default"],
        "max_new_tokens": 2,
    }  # fmt: skip
    few = run_experiment(model, TOKENIZER, "translation", data, tmp_path, points=[4], default_points=[2], **options)
    assert [[point.steps for point in line.points] for line in few.lines] == [[0, 4], [0, 2]]
    assert few.told == "1 demonstration" and (few.settings["steps"], few.settings["distinct"]) == (4, 2)
    more = run_experiment(model, TOKENIZER, "translation", data, tmp_path, points=[1, 4], default_points=[2], **options)
    assert [point.steps for point in more.lines[0].points] == [0, 1, 4]
    assert more.lines[0].points[-1] == few.lines[0].points[-1] and more.lines[1] == few.lines[1]
    examples = [{"prompt": pair.question, "completion": pair.answer} for pair in data.fit]
    patch = paper_patch(model, TOKENIZER, told, examples, 0.03, 0.2, format=options["format"])
    trial = Trial(model, TOKENIZER, told, ["9", "1"], ["0", "2"], max_new_tokens=2, format=options["format"])
    with patch.applied(model):
        assert [answer.patched for answer in few.answers if (answer.line, answer.steps) == ("paper", 4)] == (
            trial.answer(model)[1]
        )
    for points in ([], [2, 1], [0], [5], [1, 1]):
        with pytest.raises(ValueError, match="points must be increasing numbers from 1 to 4, the pairs to fit on"):
            run_experiment(model, TOKENIZER, "translation", data, tmp_path, points=points, **options)


def test_the_other_reading_needs_an_mlp_behind_attention(data: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lines must be without residual where the MLP reads the block's own input"):
        run_experiment(tiny("pythia"), TOKENIZER, "addition", data, tmp_path, lines=["default", "residual"])
    kept = experiments._lines(describe(tiny("pythia")), [0, 1], None)
    assert kept == ["paper", "tuned", "default"]
    assert experiments._lines(describe(tiny("gemma3")), [0, 1], None) == list(LINES)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['{"prompt": "a", "completion": " b "}', "", '["c", "d"]'], [("a", "b"), ("c", "d")]),
        (['{"translation": {"en": "a", "fr": "b"}, "id": 3}'], [("a", "b")]),
        (['{"question": "a", "answer": "b", "note": 1}'], [("a", "b")]),
    ],
)
def test_pairs_come_in_many_forms(rows: list[str], expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    assert read_pairs(tmp_path / "pairs.jsonl") == expected
    assert read_pairs([json.loads(row) for row in rows if row]) == expected


def test_pairs_by_column() -> None:
    row = {"text": {"de": "a"}, "out": "b", "en": "c", "fr": "d"}
    assert read_pairs([row], source="text.de", target="out") == [("a", "b")]
    assert read_pairs([row, row], target="out", limit=1) == [("c", "b")]


def test_bad_data_is_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pairs.jsonl"
    for text, sentence in (
        ("", "data must hold at least one pair, got none"),
        ('{"a": "b"}', "line 1, must have a question and an answer, got the columns a; name them"),
        ('{"en": "a", "fr": "b"}\n{"en": "a"}', "line 2, must have the column 'fr', got en"),
        ('["a", ""]', "line 1, must hold two texts, got ''"),
        ("[1", "line 1, must be one JSON value, got '[1'"),
        ("3", "line 1, must be a dict or two texts, got int"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_pairs(file)
        assert sentence in str(caught.value)
    with pytest.raises(ValueError, match="a jsonl file or the id of a dataset, got '.*no.jsonl', where no file is"):
        read_pairs(tmp_path / "no.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_pairs("owner/name")
    with pytest.raises(ValueError, match="at least 3 different questions, got 1"):
        split_pairs([Pair("a", "b")] * 5, steps=4, inputs=2, seed=0)
    data = Split([Pair("a " * 30, "b")], [Pair("c", "d")], [Pair("e", "f")])
    with pytest.raises(
        ValueError, match=r"data must fit the model's context of 40 tokens, got \d+ with the instruction"
    ):
        run_experiment(build(max_position_embeddings=40), TOKENIZER, "addition", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for options, sentence in (({"name": "division"}, "name must be one of"), ({"lines": ["x"]}, "lines must be among")):
        with pytest.raises(ValueError, match=sentence):
            run_experiment(model, TOKENIZER, options.pop("name", "addition"), data, tmp_path / "out", **options)


def test_a_dataset_on_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the datasets package, which tests do without."""
    from types import SimpleNamespace

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, streaming) == ("owner/name", True)
        if split != "test":
            raise FileNotFoundError("no such split\nand more")
        return iter(
            [{"english": "a", "french": "b"}, {"english": "c", "french": None}, {"english": " ", "french": "d"}]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_pairs("owner/name", split="test") == [("a", "b")]
    with pytest.raises(ValueError, match="a dataset with split 'train', got 'owner/name'; no such split$"):
        read_pairs("owner/name")


def test_pairs_that_do_not_fit_are_left_out_with_a_warning() -> None:
    pairs = [Pair("a", "b"), Pair("a " * 30, "b"), Pair("c", "d")]
    with pytest.warns(UserWarning, match="1 pairs left out; experiment: data must fit the model's context of 40"):
        assert usable(build(max_position_embeddings=40), TOKENIZER, "Sum", pairs) == [pairs[0], pairs[2]]


def test_the_journal_computes_nothing_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "j.jsonl", {"a": 1})
    assert journal.once("x", lambda: [1, 2]) == journal.once("x", lambda: 1 / 0) == [1, 2]
    assert Journal(tmp_path / "new" / "j.jsonl", {"a": 1}).once("x", lambda: 3) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        journal.once("y", lambda: 1 / 0)
    assert "y" not in Journal(tmp_path / "new" / "j.jsonl", {"a": 1})
    (tmp_path / "j.jsonl").write_text("not json\n{}\n")
    with pytest.raises(ValueError, match="one JSON value a line, got 'not json' in line 1"):
        Journal(tmp_path / "j.jsonl", {})
    (tmp_path / "j.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="must hold results of the same settings"):
        Journal(tmp_path / "j.jsonl", {"a": 1})


def test_the_fingerprint_tells_weights_apart(model: Any) -> None:
    other = build()
    assert fingerprint(other) == fingerprint(model)
    with torch.no_grad():
        weight = other.model.layers[1].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert fingerprint(other) != fingerprint(model)


def test_the_command(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    common = ["-m", tmp_path / "model", "--steps", 2, "--inputs", 2, "--max-new-tokens", 2, "-o", tmp_path / "out"]

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["experiment", *map(str, arguments)])

    result = run("multiplication", *common, "--lines", "default,paper", "--match", "contains")
    assert result.exit_code == 0, result.output
    assert "TP Figure 1 (right) and Table 2" in result.stdout and "0-based" in result.stdout
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [line["name"] for line in report["lines"]] == ["paper", "default"] and report["settings"]["c1"] == 0.015
    refused = run("multiplication", *common, "--lines", "default,paper", "--c1", "0.1")
    assert refused.exit_code == 1 and "same settings, got c1 0.015 there" in refused.stderr
    for file, text in (("empty", ""), ("one", '["a", "b"]')):
        (tmp_path / file).write_text(text)
        refused = run("translation", "--data", tmp_path / file, *common)
        assert refused.exit_code == 1 and "data must hold at least" in " ".join(refused.stderr.split())
    refused = run("addition", *common, "--match", "fuzzy")
    assert refused.exit_code == 1 and "scorer must be one of" in refused.stderr


def test_a_judge_is_loaded_by_name(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    judge = scoring.read_scorer(f"judge:{tmp_path}", "Translate", "cpu", True)
    assert judge.name.startswith("judge:") and set(judge(["a", "b"], ["c", "d"], ["e", "f"])) <= {0.0, 1.0}
    assert scoring.read_scorer("regex:^a", "", "cpu", True)(["ab"], ["x"], ["y"]) == [1.0]


def test_a_tokenizer_without_a_chat_template_is_a_sentence(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(template=None).save_pretrained(tmp_path / "model")
    for arguments in (
        ["tokens", "-i", "add", "-e", "3 4"],
        ["transmute", "-i", "add", "-e", "3 4", "-o", tmp_path / "patch"],
        ["experiment", "addition", "-o", tmp_path / "out", "--steps", "2", "--inputs", "1"],
        ["experiment", "knowledge", "-o", tmp_path / "out"],
        ["experiment", "composition", "-o", tmp_path / "out", "--inputs", "1", "--examples", "2"],
    ):
        result = CliRunner().invoke(app, list(map(str, [*arguments, "-m", tmp_path / "model"])))
        shown = " ".join(result.stderr.split())
        assert result.exit_code == 1 and "tokenizer must have a chat template" in shown, (arguments, result.output)


def test_an_example_longer_than_the_context_is_a_sentence(tmp_path: Path) -> None:
    build(max_position_embeddings=40).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for arguments in (["tokens", "-i", "add"], ["transmute", "-i", "add", "-o", tmp_path / "patch"]):
        told = [*arguments, "-e", "3 " * 30, "-m", tmp_path / "model"]
        result = CliRunner().invoke(app, list(map(str, told)))
        shown = " ".join(result.stderr.split())
        assert result.exit_code == 1 and "must fit the model's context of 40 tokens, got" in shown, result.output
