"""The whole report on a tiny random model: every section, its files, its resumption, and refused input."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import hooks, random_patch, same_bits, weights

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.evaluation import evaluate as package_module  # noqa: F401  the function's own module
from thought_kernels.evaluation.figures.headings import HEADINGS
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.pages.plots import PLOTS
from thought_kernels.evaluation.report import Evaluation
from thought_kernels.evaluation.sections import sections as registry
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode
from thought_kernels.spectral import diagnose

TOKENIZER = tiny_tokenizer()
EXAMPLES = ["3 1 4", "2 7 8", "1 9", "5 5 5 5"]
HELD_OUT = ["4 4", "8 1 2", "9 9 9", "6 0", "7 3 1"]
SETTINGS: dict[str, Any] = {"sweep_inputs": 3, "lora_steps": 2, "max_new_tokens": 3, "batch_size": 8}
EVERYTHING: dict[str, Any] = {
    "outside": {"examples": ["a b", "c d e"], "held_out": ["f g", "h"]},
    "longer": ["1 2 3 4 5 6 7", "7 6 5 4 3 2 1"],
    "paraphrases": ["Add <them> & more"],
    "others": {
        "Turn": {"instruction": "Turn it", "held_out": [{"prompt": "1 2", "completion": "2 1"}] * 2},
        "Sort": "Sort",
    },
    "unrelated": ["hello", {"prompt": "who", "completion": "me"}],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("report")
    before, attached = weights(model), hooks(model)
    found = tk.evaluate(
        model, TOKENIZER, "Sum <them> & say", EXAMPLES, held_out=HELD_OUT, output=folder, **EVERYTHING, **SETTINGS
    )
    assert same_bits(model, before) and hooks(model) == attached
    return found, folder


def test_every_section_has_figures_and_none_fails(whole: tuple[Evaluation, Path]) -> None:
    found, _ = whole
    assert list(found.sections) == list(registry.SECTIONS) == list(HEADINGS)
    assert {name: section.error for name, section in found.sections.items() if section.error} == {}
    for section in found.sections.values():
        assert section.figures and section.seconds > 0 and section.peak_memory_mib > 1, section.name
        for figure in section.figures:
            assert math.isnan(figure.low) or figure.low <= figure.value <= figure.high, figure
    assert len(found.verdict) == 5


def test_the_sections_hold_what_they_promise(whole: tuple[Evaluation, Path]) -> None:
    found, _ = whole
    controls = found.sections["controls"].subjects("recovered")
    wanted = ("patched", "random, equal norm and spectrum", "shuffled δ", "patch of “Turn”", "patch of “Sort”")
    assert set(wanted) == set(controls)
    parts = found.sections["parts"].subjects("recovered")
    assert parts == ["patched", "attention site only", "down site only", "mean differences instead"]
    rivals = found.sections["baselines"].subjects("recovered")
    assert found.sections["baselines"].subjects("seconds to make") == rivals
    assert found.sections["baselines"].subjects("peak memory while made") == rivals
    assert rivals[1:] == ["mean-difference vector", "function vector", "rank-one edit", "paper's recipe", "LoRA"]
    assert [figure.x for figure in found.sections["data"].series("patched", "recovered")] == [4]
    cases = found.sections["generalisation"].subjects("prompted")
    for part in ("outside the examples", "against “Add", "patch of “Add", "longer inputs", "after a chat turn"):
        assert any(case.startswith(part) for case in cases), part
    beside = found.sections["side_effects"]
    assert beside.get("told “Turn”", "accuracy, patch on") and beside.get("told “Sort”", "accuracy, patch off")
    bare, told = beside.get("bare", "perplexity"), beside.get("prompted", "unrelated KL")
    assert bare is not None and bare.value > 1 and told is not None and told.value > 0
    at_zero = found.sections["scale"].get("patched", "recovered", 0.0)
    assert at_zero is not None and at_zero.value == pytest.approx(0.0, abs=1e-6)
    at_one = found.sections["scale"].get("patched", "recovered", 1.0)
    same = found.sections["controls"].get("patched", "recovered")
    assert at_one is not None and same is not None and at_one.value == pytest.approx(same.value, abs=1e-6)
    replayed, control = (found.sections["replay"].get(who, "logit error") for who in ("replayed", "unpatched control"))
    assert replayed is not None and control is not None and replayed.value < 1e-9 < control.value


def test_the_diagnosis_stands_beside_what_was_measured(model: Any, whole: tuple[Evaluation, Path]) -> None:
    found, folder = whole
    section, patch = found.sections["diagnosis"], ThoughtPatch.from_pretrained(folder / "patch")
    report = diagnose(patch, model)
    for (layer, site), truth in report.sites.items():
        shown = {
            figure.quantity: figure.value for figure in section.figures if (figure.subject, figure.x) == (site, layer)
        }
        assert shown["stable rank"] == pytest.approx(truth.stable_rank, rel=1e-5)  # the patch was stored in float32
        assert shown["transport"] == pytest.approx(float(truth.features.transport.mean()), rel=1e-5)
        fit = patch.entries[layer, site].fit
        assert (shown["anisotropy"], shown["spherical λ"]) == (fit.anisotropy, fit.spherical_scale)
        width, name = len(truth.singular_values), f"{site}, block {layer}"
        spectrum = section.series(name, "singular value")
        assert [figure.x for figure in spectrum] == [1, 2, 4, 8, 16, 32, width]
        assert spectrum[0].value == pytest.approx(float(truth.singular_values[0]), rel=1e-5)
        for quantity, rest in (("written", truth.write_kernel), ("read", truth.read_kernel)):
            shares = [figure.value for figure in section.series(name, quantity)]
            assert shares == sorted(shares) and shares[-1] == pytest.approx(1 - rest, abs=1e-5)
    for name in ("told “Turn”", "told “Sort”"):
        caused = section.get(name, "caused")
        assert caused is not None and caused.value > 0
        for quantity in ("accuracy, patch off", "accuracy, patch on"):
            assert section.get(name, quantity) == found.sections["side_effects"].get(name, quantity)


def test_what_has_no_spectrum_is_said_to_have_none(model: Any) -> None:
    vectors = random_patch(sites=["residual"], hidden=36)
    given = {"held_out": HELD_OUT, "instruction": "Sum", "sections": "diagnosis", **SETTINGS}
    section = tk.evaluate(model, TOKENIZER, vectors, **given).sections["diagnosis"]
    assert section.error is None and not section.figures and "vectors have no spectrum" in section.notes[0]
    matrices = tk.evaluate(model, TOKENIZER, random_patch(layers=[1], sites=["mlp"]), **given).sections["diagnosis"]
    assert matrices.subjects("transport") == ["mlp"] and not matrices.subjects("caused")
    assert any("Predicting interference needs" in note for note in matrices.notes)


def test_a_compiled_model_is_evaluated_by_the_model_inside(model: Any) -> None:
    """Compiled code does not notice the hooks by which vectors steer, and would call every such rival useless."""
    patch, compiled = random_patch(layers=[1], sites=["mlp"]), torch.compile(model, backend="eager")
    given = {"held_out": HELD_OUT, "instruction": "Sum", "sections": "effect", **SETTINGS}
    found = tk.evaluate(compiled, TOKENIZER, patch, **given)
    assert found.settings["model"] == type(model).__name__ != type(compiled).__name__


class Page(HTMLParser):
    """Collects what a page refers to and what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_the_page_stands_alone_and_holds_every_section(whole: tuple[Evaluation, Path]) -> None:
    found, folder = whole
    text = (folder / "evaluation.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert set(found.sections) <= set(page.ids)
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), addresses  # XML name spaces
    assert len(page.ids) == len(set(page.ids))  # plots do not share ids
    assert "Sum &lt;them&gt; &amp; say" in text and "<them>" not in text
    assert page.tags.count("svg") == len(PLOTS)
    for line in found.verdict:
        assert line.question in html.unescape(text)


def test_json_and_csv_hold_every_figure(whole: tuple[Evaluation, Path]) -> None:
    found, folder = whole
    content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert content["sections"].keys() == found.sections.keys()
    read = {name: Section.from_dict(section) for name, section in content["sections"].items()}
    assert repr(read) == repr(found.sections)  # repr, since NaN is unequal to itself
    rows = list(csv.DictReader((folder / "evaluation.csv").open(encoding="utf-8")))
    figures = sum(len(section.figures) for section in found.sections.values())
    assert len(rows) == figures + 2 * len(found.sections)  # and each section's seconds and memory
    first = found.sections["effect"].figures[0]
    row = next(row for row in rows if row["section"] == "effect")
    assert (row["subject"], row["quantity"], float(row["value"])) == (first.subject, first.quantity, first.value)


def test_finished_sections_are_not_measured_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"held_out": HELD_OUT, "output": tmp_path, "sections": ["patch", "scale", "replay"], **SETTINGS}
    found = tk.evaluate(model, TOKENIZER, "Sum <them> & say", EXAMPLES, **arguments)

    def broken(subject: Any, section: Section) -> None:
        section.add("patched", "accuracy", 0.5)
        raise RuntimeError("no luck")

    kind = registry.SECTIONS["scale"]
    for name in registry.SECTIONS:
        monkeypatch.setitem(registry.SECTIONS, name, broken)
    again = tk.evaluate(model, TOKENIZER, "Sum <them> & say", EXAMPLES, **arguments)
    assert repr(again.sections) == repr(found.sections)

    (tmp_path / "sections" / "scale.json").write_text("{")  # a damaged one is measured again, and here fails
    failed = tk.evaluate(model, TOKENIZER, "Sum <them> & say", EXAMPLES, **arguments)
    assert (failed.sections["scale"].error, failed.sections["scale"].status) == ("RuntimeError: no luck", "failed")
    assert failed.sections["scale"].get("patched", "accuracy") is not None  # what it had measured is kept
    assert "This section did not finish: RuntimeError: no luck" in (tmp_path / "evaluation.html").read_text()
    assert repr(failed.sections["replay"]) == repr(found.sections["replay"])

    monkeypatch.setitem(registry.SECTIONS, "scale", kind)  # a section that failed is tried again
    mended = tk.evaluate(model, TOKENIZER, "Sum <them> & say", EXAMPLES, **arguments)
    assert mended.sections["scale"].error is None
    assert mended.sections["scale"].get("patched", "recovered", 0.5) is not None
    changed = tk.evaluate(model, TOKENIZER, "Sum it", EXAMPLES, **arguments)  # other data: nothing is taken over
    assert changed.sections["scale"].error is None and changed.sections["replay"].error == "RuntimeError: no luck"


def test_a_patch_alone_is_measured_as_far_as_it_goes(model: Any) -> None:
    patch = random_patch(size=0.05, provenance={"instruction": "Sum them"})
    found = tk.evaluate(model, TOKENIZER, patch, held_out=HELD_OUT, **SETTINGS)
    failed = {name for name, section in found.sections.items() if section.error}
    assert failed == {"baselines", "data"} == {n for n, section in found.sections.items() if section.status != "done"}
    assert found.to_dict()["sections"]["data"]["status"] == found.sections["baselines"].status == "left out"
    assert "examples must be at least 2 for the baselines, got 0" in (found.sections["baselines"].error or "")
    parts = found.sections["parts"].subjects("recovered")
    assert {"matrix only", "vector only", "mlp site only"} <= set(parts)
    assert found.sections["controls"].subjects("recovered") == ["patched", "random, equal norm and spectrum"]


def test_a_scorer_that_raises_costs_accuracies_only(model: Any) -> None:
    def fussy(text: str, answer: str, question: str) -> bool:
        raise KeyError("who")

    found = tk.evaluate(
        model, TOKENIZER, "Sum them", EXAMPLES, held_out=HELD_OUT, scorer=fussy, sections=["effect", "data"], **SETTINGS
    )
    effect = found.sections["effect"]
    accuracy, recovered = effect.get("patched", "accuracy"), effect.get("patched", "recovered")
    assert effect.error is None and accuracy is not None and math.isnan(accuracy.value)
    assert recovered is not None and not math.isnan(recovered.value)
    assert any("got KeyError: 'who'" in note for note in effect.notes)
    assert json.dumps(found.to_dict(), allow_nan=False) and "got KeyError" in found.to_html()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"held_out": []}, "held_out must be examples, got something else; load_examples: .* got none"),
        ({"held_out": ["1 2"]}, "held_out must hold at least 2 inputs, got 1; no interval"),
        ({"examples": ["1 2"]}, "examples must hold at least 2, got 1"),
        ({"examples": None}, "examples must be given to transmute an instruction on, got none"),
        ({"held_out": ["1 2", "3 " * 400]}, r"held_out\[1\] must fit the model's context of 512 tokens, got \d+"),
        ({"longer": ["1 2", "3 " * 400]}, r"longer\[1\] must fit the model's context of 512 tokens, got \d+"),
        ({"outside": ["1 2", "3 " * 400]}, r"outside\[1\] must fit the model's context of 512 tokens"),
        ({"outside": {"held_out": ["1", "2"], "examples": ["3 " * 400]}}, r"outside's examples\[0\] must fit"),
        ({"pool": ["3 " * 400]}, r"pool\[0\] must fit the model's context of 512 tokens"),
        ({"unrelated": ["3 " * 400]}, r"unrelated\[0\] must fit the model's context of 512 tokens"),
        ({"others": {"x": {"instruction": "Add", "held_out": ["1", "3 " * 400]}}}, r"others\['x'\]\[1\] must fit"),
        ({"held_out": ["1", {"prompt": "2", "completion": "2"}]}, "completion or none, got 1 of 2 with one"),
        ({"answers": ["1"]}, "answers must be one per input of held_out, got 1 for 5"),
        ({"sections": ["efect"]}, "sections must be 'all' or among patch, effect.*got .'efect'"),
        ({"recipe": {"rigde": 1}}, "recipe must have options .*; Recipe: options must be among layers, .*, got rigde"),
        ({"recipe": {"estimator": "rigde"}}, "recipe must have options that transmute takes, got .*; .* one of mean"),
        (
            {"recipe": {"ridge": -1}},
            "recipe must have options .*; transmute: ridge must be .* positive, got -1",
        ),
        (
            {"recipe": {"layers": [99]}},
            "recipe must have .*; .*layers must be .* got .99.; name blocks that this model has$",
        ),
        ({"sweep_inputs": 1}, "sweep_inputs must be at least 2, got 1"),
        ({"outside": {"held_out": ["1"]}}, "outside must have the keys examples and held_out"),
        ({"others": {"x": {"held_out": ["1", "2"]}}}, "must have the keys instruction and held_out"),
        ({"scorer": "nope"}, "scorer must be one of"),
        ({"instruction": "Other"}, "instruction must be given once"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    model: Any, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    arguments = {"held_out": HELD_OUT, "output": tmp_path / "new", **changes}
    examples = arguments.pop("examples", EXAMPLES)
    with pytest.raises(ValueError, match=sentence):
        tk.evaluate(model, TOKENIZER, "Sum them", examples, **arguments)
    assert not (tmp_path / "new").exists()


def test_an_output_that_cannot_be_made_and_a_recipe_that_is_none_are_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="evaluate: output must be a folder that can be made, got '.*file/new'; "):
        tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, held_out=HELD_OUT, output=tmp_path / "file" / "new")
    with pytest.raises(TypeError, match="evaluate: recipe must be a Recipe or a dict of its options, got int"):
        tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, held_out=HELD_OUT, recipe=3)
    with pytest.raises(TypeError, match="evaluate: recipe must have options .*; .*ridge must be a number, got 'x'"):
        tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, held_out=HELD_OUT, recipe={"ridge": "x"})
    with pytest.raises(ValueError, match="evaluate: recipe must have options"):  # one with a patch is checked too
        tk.evaluate(model, TOKENIZER, random_patch(), held_out=HELD_OUT, instruction="Sum", recipe={"tokens": "some"})


def test_an_example_without_a_completion_needs_room_for_one(model: Any) -> None:
    longest = "3" * (514 - encode(TOKENIZER, "Sum them", "3").length)  # a token each
    with pytest.raises(ValueError, match=r"examples\[1\] must fit the model's context of 512 tokens, got 513"):
        tk.evaluate(model, TOKENIZER, "Sum them", ["3", longest], held_out=HELD_OUT, **SETTINGS)


def test_a_tokenizer_without_a_chat_template_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer must have a chat template"):
        tk.evaluate(model, tiny_tokenizer(template=None), "Sum them", EXAMPLES, held_out=HELD_OUT)


def test_a_patch_that_does_not_say_its_instruction_needs_one(model: Any) -> None:
    with pytest.raises(ValueError, match="instruction must be given where the patch does not say"):
        tk.evaluate(model, TOKENIZER, random_patch(), held_out=HELD_OUT)


def test_a_patch_of_another_model_is_refused_before_anything_is_measured(model: Any) -> None:
    with pytest.raises(ValueError, match="evaluate: patch must have the model's hidden size"):
        tk.evaluate(model, TOKENIZER, random_patch(hidden=48), instruction="Sum", held_out=HELD_OUT)


def test_shared_inputs_are_pointed_out(model: Any) -> None:
    found = tk.evaluate(model, TOKENIZER, "Sum", EXAMPLES, held_out=EXAMPLES, sections="patch", **SETTINGS)
    assert found.warnings[0].startswith("4 of 4 held-out inputs are also examples")
    assert [line.status for line in found.verdict] == ["unknown"] * 5


def test_figures_are_the_same_with_the_same_seed(model: Any) -> None:
    runs = [
        tk.evaluate(model, TOKENIZER, "Sum", EXAMPLES, held_out=HELD_OUT, sections=["controls"], seed=seed, **SETTINGS)
        for seed in (3, 3, 4)
    ]
    first, second, third = (repr(run.sections["controls"].figures) for run in runs)
    assert first == second != third


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_width_is_evaluated_too(dtype: torch.dtype) -> None:
    other = tiny_gemma3(dtype=dtype, vocab_size=len(TOKENIZER))
    found = tk.evaluate(
        other, TOKENIZER, "Sum", EXAMPLES, held_out=HELD_OUT, sections=["effect", "baselines", "replay"], **SETTINGS
    )
    assert {name: section.error for name, section in found.sections.items() if section.error} == {}


def test_the_command_writes_a_report_and_refuses_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from thought_kernels.cli import app

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", *arguments])

    output = tmp_path / "report"
    done = run("--task", "reverse", "--sections", "effect", "--inputs", "6", "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "Works: does it do what the instruction does?" in done.output
    content = json.loads((output / "evaluation.json").read_text())
    assert content["settings"]["instruction"] == "Reverse the list" and content["settings"]["held_out"] == 6
    assert (output / "evaluation.html").is_file() and (output / "sections" / "effect.json").is_file()

    two = tmp_path / "two.jsonl"
    two.write_text('"1 2 3"\n"4 5"\n')
    told = ["--instruction", "Turn round", "--examples", str(two)]  # the task gives what is not given here
    done = run("--task", "reverse", *told, "--sections", "effect", "--inputs", "2", "--output", str(tmp_path / "two"))
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "two" / "evaluation.json").read_text())["settings"]
    assert (settings["instruction"], settings["examples"], settings["held_out"]) == ("Turn round", 2, 2)

    recipe = ["--recipe", '{"ridge": -1}']
    done = run("--task", "reverse", "--sections", "effect", "--inputs", "2", *recipe, "--output", str(tmp_path / "bad"))
    shown = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and "ridge must be finite and positive, got -1" in shown
    assert not (tmp_path / "bad").exists()

    def broken(subject: Any, section: Section) -> None:
        raise ValueError("evaluate: examples must be at least this good")

    with monkeypatch.context() as patched:
        patched.setitem(registry.SECTIONS, "effect", broken)
        done = run("--task", "reverse", "--sections", "effect", "--inputs", "2", "--output", str(tmp_path / "failed"))
    assert done.exit_code == 1 and "section effect did not finish: " in " ".join(done.stderr.split())
    assert (tmp_path / "failed" / "evaluation.html").is_file()

    saved, asked = tmp_path / "patch", ["--held-out", str(two), "--instruction", "Turn", "--sections", "baselines"]
    width = json.loads((CHECKPOINT / "config.json").read_text())["hidden_size"]
    random_patch(layers=[1], sites=["residual"], hidden=width).save_pretrained(saved)
    done = run("--patch", str(saved), *asked, "--output", str(tmp_path / "bare"))
    assert done.exit_code == 0 and "examples must be at least 2" in " ".join(done.stderr.split()), done.output

    one, empty = tmp_path / "one.jsonl", tmp_path / "empty.jsonl"
    one.write_text('"1 2 3"\n')
    empty.write_text("\n")
    for arguments, code, sentence in (
        (["--instruction", "Sum", "--examples", str(one), "--held-out", str(one)], 1, "at least 2 inputs, got 1"),
        (
            ["--instruction", "Sum", "--examples", str(one), "--held-out", str(empty)],
            1,
            "at least one example, got none",
        ),
        (["--instruction", "Sum", "--examples", str(one)], 2, "--held-out"),
        (["--task", "fly"], 1, "task must be one of sum"),
        (["--sections", "fun"], 1, "sections must be 'all' or among"),
        (["--scorer", "fuzzy"], 1, "scorer must be one of exact"),
        (["--patch", str(tmp_path)], 1, "must"),
    ):
        refused = run(*arguments, "--output", str(tmp_path / "none"))
        shown = " ".join(refused.output.split())
        assert (refused.exit_code, sentence in shown) == (code, True), (arguments, refused.output)
    assert not (tmp_path / "none").exists()
