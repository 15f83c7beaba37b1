"""The demonstration on a tiny random model: whole, repeatable, and honest about what it measured."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.cli.demo import show
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.curves import curve_points
from thought_kernels.demo.demo import DemoReport, Row, run_demo
from thought_kernels.demo.picture import draw
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, held_out, inputs, split_by_symbols
from thought_kernels.demo.tokenizer import build_tokenizer
from thought_kernels.evaluation.experiments import curves
from thought_kernels.evaluation.experiments.curves import default_steps, paper_steps
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.records.files import write_json
from thought_kernels.evaluation.rivals.paper import paper_layers, paper_patch

TOKENIZER = build_tokenizer()
SMALL = {"examples": 3, "inputs": 5, "steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    layers = ["sliding_attention", "full_attention"]
    model = tiny_gemma3(vocab_size=len(TOKENIZER), layer_types=layers, sliding_window=64, tie_word_embeddings=False)
    # Any token ends a completion, or a random model would go on for as long as it may.
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    return model


@pytest.fixture(scope="module")
def report(model: Any) -> DemoReport:
    return run_demo(model, TOKENIZER, instructions=["sum", "translate"], **SMALL)


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "name": "sum", "instruction": "Sum the numbers", "reserved": False, "inputs": 256, "examples": 32, "base": 0.0,
        "prompted": 1.0, "patched": 0.97, "recovered": 0.98, "recovered_values": 0.9, "outside_inputs": 125,
        "prompted_outside": 1.0, "patched_outside": 0.85, "replay_error": 1e-15, "replay_control": 1.0,
        "replay_dtype": "float64", "seconds": 1.0,
    }  # fmt: skip
    return Row(**(values | changes))


def test_a_row_is_what_trials_measure(model: Any, report: DemoReport) -> None:
    found = report.rows[0]
    assert (found.name, found.inputs, found.examples, found.outside_inputs) == ("sum", 5, 3, 5)
    torch.manual_seed(0)
    again = run_demo(model, TOKENIZER, instructions=["sum"], curves=False, **SMALL).rows[0]
    assert vars(again) | {"seconds": 0} == vars(found) | {"seconds": 0}
    assert again.replay_error < 1e-9 < again.replay_control and again.replay_dtype == "float64"


def test_patches_are_fitted_on_inputs_that_are_not_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[str]] = []
    measured: list[list[str]] = []

    def transmute(model: Any, tokenizer: Any, instruction: str, examples: list[str], **options: Any) -> Any:
        assert options == {"written_inputs": 0}, "the table must use transmute's default settings, on given inputs"
        fitted.append(examples)
        return tk.transmute(model, tokenizer, instruction, examples, layers=[0], **options)

    class Watched(Trial):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            measured.append(arguments[3])
            super().__init__(*arguments, **options)

    monkeypatch.setattr("thought_kernels.demo.demo.transmute", transmute)
    monkeypatch.setattr("thought_kernels.demo.demo.Trial", Watched)
    run_demo(model, TOKENIZER, instructions=["first"], curves=False, examples=32, inputs=40)
    (fit, near), (fresh, far) = fitted, measured
    assert len(set(fit)) == len(set(near)) == 32 and len(set(fresh)) == len(set(far)) == 40
    assert all(map(held_out, fresh)) and not any(map(held_out, fit))
    assert not {*" ".join(near).split()} & {*" ".join(far).split()}


def test_the_curves_call_transmute_on_inputs_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def transmute(model: Any, tokenizer: Any, told: Any, examples: Any, **options: Any) -> Any:
        given.append((examples, sorted(options)))
        return tk.transmute(model, tokenizer, told, examples, **options)

    monkeypatch.setattr(curves, "transmute", transmute)
    run_demo(model, TOKENIZER, instructions=["sum"], **SMALL)
    assert [(len(examples), names) for examples, names in given] == [
        (count, ["batch_size", "max_new_tokens"]) for count in default_steps(6)
    ]
    assert all(isinstance(text, str) for examples, _ in given for text in examples)


def test_curves_hold_every_point(report: DemoReport) -> None:
    (curve,) = report.curves
    assert report.sweep is not None
    assert [point.steps for point in curve.paper] == [0, *paper_steps(6)] == [0, 1, 2, 3, 4, 5, 6]
    assert [point.steps for point in curve.default] == [0, 4, 6]
    assert curve.paper[0].accuracy == curve.default[0].accuracy == curve.base
    assert curve.c1 == report.sweep.c1 in [c1 for c1, _, _ in report.sweep.tried]
    assert curve.paper[-1].effective_c1 == pytest.approx(curve.c1 * 6 / 300)
    assert [sample.steps for sample in curve.samples] == [0, 3, 6]
    assert curve.layers == paper_layers(2)
    best = max(report.sweep.tried, key=lambda tried: tried[1:])
    assert report.sweep.c1 == best[0]


def test_pieces_of_the_paper_s_recipe_add_up(model: Any) -> None:
    examples = [{"prompt": text, "completion": TASKS["sum"].answer(text)} for text in ("1 2 3", "4 5 6", "7 8 9")]
    parts = [paper_patch(model, TOKENIZER, "Sum the numbers", piece, 0.3) for piece in (examples[:1], examples[1:])]
    whole = paper_patch(model, TOKENIZER, "Sum the numbers", examples, 0.3)
    (layer,) = whole.layers
    torch.testing.assert_close((parts[0] + parts[1]).matrix(layer, "mlp"), whole.matrix(layer, "mlp"))
    tripled = paper_patch(model, TOKENIZER, "Sum the numbers", examples, 0.9)
    torch.testing.assert_close((3 * whole).matrix(layer, "mlp"), tripled.matrix(layer, "mlp"))


def test_an_option_of_the_paper_s_recipe_is_not_silently_dropped(model: Any) -> None:
    with pytest.raises(ValueError, match="^paper_patch: options must be none of the recipe's own, got pairing, ridge;"):
        paper_patch(model, TOKENIZER, "Sum the numbers", ["1 2"], 0.3, ridge=0.5, pairing="layerwise", seed=1)


def test_steps_and_layers() -> None:
    assert paper_steps(600) == list(range(40, 601, 40))
    assert default_steps(600) == [4, 8, 16, 32, 64] and default_steps(8) == [4, 8] and default_steps(5) == [4, 5]
    assert paper_layers(26) == list(range(10, 20))
    assert paper_layers(6) == [2, 3, 4] and paper_layers(1) == [0]
    assert len(curve_points(600)) == 20


def test_shortfalls_are_counted_against_the_prompted_model() -> None:
    assert row().shortfalls() == []
    assert row(patched=0.969).shortfalls() == ["patched"]
    assert row(prompted=0.9, patched=0.88, prompted_outside=0.5, patched_outside=0.43).shortfalls() == []
    assert row(recovered=math.nan, patched_outside=0.84).shortfalls() == ["recovered", "outside"]


def test_json_is_a_list_of_fractions(report: DemoReport, tmp_path: Path) -> None:
    undefined = DemoReport([*report.rows, row(recovered=math.nan)], report.curves, report.sweep, report.settings)
    write_json(undefined.to_json(), tmp_path / "figures.json")
    loaded = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["instruction"] for entry in loaded] == ["Sum the numbers", "Translate to French", "Sum the numbers"]
    for entry, found in zip(loaded, report.rows, strict=False):
        assert {name: entry[name] for name in ("base", "prompted", "patched")} == {
            "base": found.base, "prompted": found.prompted, "patched": found.patched,
        }  # fmt: skip
        assert 0 <= entry["patched"] <= 1
    assert loaded[2]["recovered"] is None
    assert len(loaded[0]["curve"]["paper"]) == 7 and "curve" not in loaded[1]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_failing_to_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json([math.inf], path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("with_curves", [True, False])
def test_the_picture_is_drawn(report: DemoReport, tmp_path: Path, with_curves: bool) -> None:
    shown = DemoReport(report.rows, report.curves if with_curves else [], None, report.settings)
    draw(shown, tmp_path / "demo.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "demo.png")[..., :3]
    assert pixels.shape[0] > (1000 if with_curves else 500) and pixels.shape[1] > 1200
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, 3).round(2).tolist()}) > 4
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_the_table_fits_a_terminal_and_names_what_falls_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, report: DemoReport
) -> None:
    from thought_kernels.cli import options

    monkeypatch.setattr(options.out, "_width", 80)
    rows = [row(), row(name="sort_down"), row(name="multiply", reserved=True, patched=0.5)]
    show(DemoReport(rows, report.curves, report.sweep, report.settings))
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert "2 of 3    short: multiply *" in shown or "2 of 3  short: multiply *" in shown
    assert "0.500" in shown and "recovered" in shown


def test_progress_counts_up_to_the_end(model: Any) -> None:
    told: list[tuple[int, int, str]] = []
    run_demo(model, TOKENIZER, instructions=["multiply"], progress=lambda *now: told.append(now), **SMALL)
    done, totals, what = zip(*told, strict=True)
    assert list(done) == list(range(len(done))) and done[-1] == totals[0] and len(set(totals)) == 1
    assert what[0] == "Multiply the numbers" and what[-1] == ""


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match=r"instructions must be among sum, .*, got \['add'\]"):
        run_demo(model, TOKENIZER, instructions=["add"])
    with pytest.raises(ValueError, match="inputs must be at least 1, got 0"):
        run_demo(model, TOKENIZER, inputs=0)


def test_the_command(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    arguments = ["demo", "-m", tmp_path / "model", "--instructions", "first,last", "--examples", 3, "--inputs", 5]
    arguments += ["--no-curves", "-o", picture, "--json", figures]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "contains match" in result.stdout and picture.stat().st_size > 0
    assert result.stderr.splitlines()[-1] == "demo: 2 of 2."  # no terminal, so a line for each step and no bar
    assert [entry["name"] for entry in json.loads(figures.read_text())] == ["first", "last"]
    refused = CliRunner().invoke(app, ["demo", "-m", str(tmp_path / "model"), "--instructions", "frist"])
    assert refused.exit_code == 1 and "instructions must be among" in refused.stderr


def test_tasks() -> None:
    assert len(TASKS) >= 12 and all(len(task.wordings) >= 3 for task in TASKS.values())
    assert set(RESERVED_FOR_FINAL_STUDY) <= set(TASKS) and len(RESERVED_FOR_FINAL_STUDY) == 4
    answers = {name: task.answer("8 10 6") for name, task in TASKS.items() if not task.on_words}
    assert answers["sum"] == "8 + 10 + 6 = 24" and answers["multiply"] == "8 * 10 * 6 = 480"
    assert (answers["sort"], answers["sort_down"], answers["rotate"]) == ("6 8 10", "10 8 6", "10 6 8")
    assert (answers["parity"], answers["spell"]) == ("even even even", "eight ten six")
    assert TASKS["translate"].answer("cat eats bread") == "chat mange pain"
    share = statistics.mean(map(held_out, inputs(TASKS["sum"])))
    assert 0.15 < share < 0.25
    for task in TASKS.values():
        low, high = split_by_symbols(task)
        assert low and high and not set(" ".join(low).split()) & set(" ".join(high).split())


@pytest.mark.slow
def test_the_shipped_model_reaches_its_figures() -> None:
    """The figures of docs/demo.md inside the examples' range, on four instructions that choices were made on."""
    from thought_kernels.models.load import load

    model, tokenizer = load(CHECKPOINT)
    report = run_demo(model, tokenizer, instructions=["largest", "last", "add_one", "double"], curves=False)
    for found in report.rows:
        assert found.inputs >= 256 and found.prompted >= 0.98
        assert found.patched_reaches and found.recovered_reaches, found
        assert found.replay_error <= 1e-9
