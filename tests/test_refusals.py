"""What transmute refuses or warns of before it spends anything: tokens, told examples, models without a head."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.estimation.scales import ScaleWarning

TOKENIZER = tiny_tokenizer()
EXAMPLE = {"prompt": "8 76", "completion": "x=2 ok"}


def model_of(seed: int = 0, **changes: Any) -> Any:
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER), **changes)


@pytest.mark.parametrize(
    ("part", "instruction", "example", "options"),
    [
        ("the instruction", "Sum <new>", EXAMPLE, {}),
        ("the example", "Sum", {"prompt": "8 <new>", "completion": "3"}, {}),
        ("the example", "Sum", "8 <new>", {}),
        ("the completion", "Sum", {"prompt": "8", "completion": "3 <new>"}, {}),
        ("what stands in the instruction's place", "Sum", EXAMPLE, {"without": "Say <new>"}),
    ],
)
def test_a_token_without_an_embedding_is_refused(
    part: str, instruction: str, example: Any, options: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("<new>")
    number = 1 if part in ("the example", "the completion") else 0
    sentence = rf"examples\[{number}\] must be of tokens that the model has .* below {len(TOKENIZER)}, got '<new>' "
    with pytest.raises(ValueError, match=f"^transmute: {sentence}.* in {part}; take the model's own tokenizer"):
        tk.transmute(model_of(), tokenizer, instruction, [{"prompt": "1", "completion": "2"}, example], **options)


def test_evaluate_refuses_what_the_model_cannot_read_or_write() -> None:
    tokenizer, examples = tiny_tokenizer(), [EXAMPLE, EXAMPLE | {"prompt": "9"}]
    tokenizer.add_tokens("<new>")
    with pytest.raises(
        ValueError, match=r"^evaluate: held_out\[1\] must be of tokens .* got '<new>' .* in the example"
    ):
        tk.evaluate(model_of(), tokenizer, "Sum now", examples, held_out=["1", "2 <new>"])
    with pytest.raises(ValueError, match="^evaluate: model must have a language-model head, got Gemma3TextModel; load"):
        tk.evaluate(model_of().model, TOKENIZER, "Sum now", examples, held_out=["1", "2"])


@pytest.mark.parametrize(
    ("given", "subject"),
    [
        ({"paraphrases": ["Sum up", "Add {}"]}, r"paraphrases\[1\] with held_out\[0\]"),
        ({"others": ["Say {}"]}, r"others\['Say .*'\] with held_out\[0\]"),
        ({"others": {"a": "Say {}"}}, r"others\['a'\] with held_out\[0\]"),
        ({"others": {"a": {"instruction": "Say {}"}}}, r"others\['a'\] with held_out\[0\]"),
        ({"others": {"a": {"instruction": "Say {}", "held_out": ["1", "2"]}}}, r"others\['a'\]\[0\]"),
    ],
)
@pytest.mark.parametrize(
    ("text", "refused"), [("<new>", "'<new>' .* in the instruction"), ("\ud800", "lone surrogate")]
)
def test_evaluate_refuses_other_instructions_that_the_model_cannot_read(
    given: dict[str, Any], subject: str, text: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(text)
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return [filled(inner) for inner in value]

    tokenizer, model = tiny_tokenizer(), model_of()
    tokenizer.add_tokens("<new>")
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("nothing may be computed"))
    with pytest.raises(ValueError, match=f"^evaluate: {subject} must be .*{refused}"):
        tk.evaluate(
            model, tokenizer, "Sum now", [EXAMPLE, EXAMPLE | {"prompt": "9"}], held_out=["1", "2"], **filled(given)
        )


ANSWER = {"role": "assistant", "content": "x=2 ok"}
TOLD = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]


@pytest.mark.parametrize(
    ("instruction", "told", "options"),
    [
        ("Sum now", "Sum now\n8 76", {}),
        ("Sum now", " Sum now", {}),
        ("Sum now", "Sum now: 8 76", {"separator": ": "}),
        ("Sum now", "Sum now 8 76", {}),
        ("Sum now", "Sum now. 8 76", {}),
        ("Sum now:", "Sum now:8 76", {}),
        ("Sum now", "Sum nowx8 76", {"separator": "x"}),
        ("Sum now", [{"role": "user", "content": "8"}, ANSWER, {"role": "user", "content": "Sum now 8 76"}], {}),
        ("Sum now", [{"role": "system", "content": "Sum now. Be brief"}, {"role": "user", "content": "8 76"}], {}),
        ([{"role": "system", "content": "Sum now"}], "Sum now: 8 76", {}),
        (TOLD, [{"role": "system", "content": "Be brief"}, *TOLD, {"role": "user", "content": "8 76"}], {}),
        (TOLD, [*TOLD, {"role": "user", "content": "8 76"}], {}),
    ],
)
def test_examples_that_begin_with_the_instruction(instruction: Any, told: Any, options: dict[str, Any]) -> None:
    options |= {"max_new_tokens": 2, "completions": 1}
    with pytest.raises(ValueError, match="^transmute: examples must be without the instruction, got 1 of 1 that begin"):
        tk.transmute(model_of(), TOKENIZER, instruction, [told], **options)
    with pytest.warns(
        UserWarning, match=r"^transmute: examples should be without .* got 1 of 2 .*, the first at examples\[1\]; "
    ):
        tk.transmute(model_of(), TOKENIZER, instruction, [EXAMPLE, told], **options)


def test_words_that_the_instruction_merely_begins_are_no_instruction() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = [EXAMPLE | {"prompt": "Summer 8"}, EXAMPLE | {"prompt": "Sum_ 8"}]
        for told in ("Sum", [{"role": "system", "content": "Sum"}]):
            tk.transmute(model_of(), TOKENIZER, told, examples)


def test_a_patch_with_a_ridge_for_each_input_is_evaluated_with_a_recipe_for_the_other_fits() -> None:
    tokenizer, accumulator, width = tiny_tokenizer(), tk.ThoughtAccumulator(), 40
    tokenizer.add_tokens("<new>")
    accumulator.update(1, "attention", *torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)))
    patch = accumulator.solve("ridge", ridge=torch.full((width,), 0.25), provenance={"instruction": "Sum now"})
    given: dict[str, Any] = {"examples": [EXAMPLE, EXAMPLE | {"prompt": "9"}], "held_out": ["1", "2 <new>"]}
    with pytest.raises(ValueError, match="^evaluate: patch must have one ridge .* no recipe .*, got 40; ") as told:
        tk.evaluate(model_of(), tokenizer, patch, **given)
    assert "0.25" not in str(told.value)
    with pytest.raises(ValueError, match=r"^evaluate: held_out\[1\] must be of tokens"):  # what is checked later
        tk.evaluate(model_of(), tokenizer, patch, **given, recipe=tk.Recipe())


@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
def test_a_model_without_a_head_takes_examples_with_completions_only(pairing: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match="^transmute: model must have a language-model head .*, got Gemma3TextModel; "):
        tk.transmute(model.model, TOKENIZER, "Sum now", ["8 76"])
    patch, whole = (tk.transmute(of, TOKENIZER, "Sum now", [EXAMPLE], pairing=pairing) for of in (model.model, model))
    assert torch.equal(patch.matrix(1, "attention"), whole.matrix(1, "attention"))


def residuals(patch: Any) -> list[float]:
    return [entry.fit.residual for entry in patch.entries.values()]


@pytest.mark.parametrize("normalization", ["none", "norm"])
@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
@pytest.mark.parametrize("estimator", ["mean", "second_order"])
def test_a_patch_that_is_worse_than_none_is_warned_of_with_its_cure(
    estimator: str, pairing: str, normalization: str
) -> None:
    options: dict[str, Any] = {"estimator": estimator, "pairing": pairing, "normalization": normalization}
    examples = [EXAMPLE, EXAMPLE | {"prompt": "76 8 8"}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch = tk.transmute(model_of(), TOKENIZER, "Sum now", examples, scale=100, **options)
    assert max(residuals(patch)) > 1 and len(caught) == 1
    sentence = "^transmute: patch should .* scale 100; give scale=(.*), which leaves less of these rows, or estimator="
    told = re.match(sentence, str(caught[0].message))
    assert told and caught[0].category is ScaleWarning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cured = tk.transmute(model_of(), TOKENIZER, "Sum now", examples, scale=ast.literal_eval(told[1]), **options)
    assert max(residuals(cured)) < 1


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("estimator", ["mean", "second_order"])
def test_an_accumulator_warns_too(estimator: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    accumulator = tk.ThoughtAccumulator()
    for layer in range(3):
        accumulator.update(layer, "mlp", *torch.randn(2, rows, 8, generator=generator) * 10**layer)
    with pytest.warns(ScaleWarning, match="^solve: patch should leave .* got .* scale 1; give scale=") as caught:
        patch = accumulator.solve(estimator)
    assert max(residuals(patch)) > 1 and [warning.filename for warning in caught] == [__file__]
    told = re.search("give scale=([^,]*), which", str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told and max(residuals(accumulator.solve(estimator, scale=float(told[1])))) < 1
    with pytest.warns(ScaleWarning, match="give scale=1, which leaves less of these rows$"):
        accumulator.solve("exact", scale={"mlp": 3.0})


def test_warnings_name_the_caller_s_line_so_that_each_is_told_once() -> None:
    def fit() -> None:
        tk.transmute(model_of(), TOKENIZER, "Sum now", ["8 76"], max_new_tokens=1, completions=1)
        tk.transmute(model_of(), TOKENIZER, "Sum now", ["8 76"], max_new_tokens=1, completions=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit()
        fit()
    first = fit.__code__.co_firstlineno + 1
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, first), (__file__, first + 1)]


def test_the_tokenizer_of_another_model_is_told() -> None:
    given = [{"prompt": "8 7", "completion": "1"}]
    other = tiny_gemma3(0, torch.float32, vocab_size=2 * len(TOKENIZER) + 1)
    with pytest.warns(
        UserWarning, match=f"tokenizer should be the model's own, got one of {len(TOKENIZER)} tokens for"
    ):
        tk.transmute(other, TOKENIZER, "Sum", given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.transmute(tiny_gemma3(0, torch.float32, vocab_size=2 * len(TOKENIZER)), TOKENIZER, "Sum", given)


def test_what_was_meant_is_said(tmp_path: Path) -> None:
    model = tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER))
    with pytest.raises(TypeError, match="model must be a transformers model, got .*Tokenizer.*; give the model first"):
        tk.transmute(TOKENIZER, model, "Sum", ["8"])
    with pytest.raises(ValueError, match="put a single text in a list"):
        tk.transmute(model, TOKENIZER, "Sum", "8 7")
    tk.transmute(model, TOKENIZER, "Sum", [{"prompt": "8", "completion": "1"}]).save_pretrained(tmp_path / "patch")
    with pytest.raises(ValueError, match=r"which holds a patch; load the patch with ThoughtPatch\.from_pretrained"):
        tk.load(tmp_path / "patch")
    (tmp_path / "inputs.jsonl").write_text('"8"\n')
    arguments = ["transmute", "-i", "x", "-o", tmp_path / "y", "-e", tmp_path / "inputs.jsonl"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    said = " ".join(result.stderr.replace("│", " ").split())  # in a box, whose lines break where the path lets them
    assert result.exit_code == 2 and "give a file by" in said
    for text in ("ж" * 200, "8 " * 3000):  # too long for a file's name: texts like any other
        result = CliRunner().invoke(app, [*map(str, arguments[:-1]), text, "-m", str(tmp_path / "nowhere")])
        assert result.exit_code == 1 and "where nothing is" in " ".join(result.stderr.split())
