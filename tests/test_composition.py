"""Patches added and negated, what overlap predicts of them, and facts as the instruction; on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import random_patch, token_ids
from typer.testing import CliRunner

import thought_kernels as tk
from thought_kernels.cli import app
from thought_kernels.cli.composition import PAIRS, read_pair
from thought_kernels.cli.knowledge import read_facts
from thought_kernels.evaluation.experiments.composition import Behaviour, Composition
from thought_kernels.evaluation.experiments.knowledge import FACTS, QUESTIONS, run_knowledge
from thought_kernels.evaluation.experiments.pairs import Pair
from thought_kernels.evaluation.measures.overlap import (
    PREDICTORS,
    activation_moments,
    augmented,
    predictions,
    rank_correlation,
)
from thought_kernels.evaluation.measures.trial import Trial

TOKENIZER = tiny_tokenizer()
FRESH, EXAMPLES = ["1 2 3", "4 5 6", "7 8 9"], ["2 4 6", "9 1 5"]
BEHAVIOURS = {
    "reverse": Behaviour("reverse", "Reverse", lambda text: " ".join(text.split()[::-1])),
    "commas": Behaviour("commas", "Put commas", lambda text: ", ".join(str(int(word)) for word in text.split())),
}


def build(**changes: Any) -> Any:
    model = tiny_gemma3(
        vocab_size=len(TOKENIZER), layer_types=["full_attention"] * 2, tie_word_embeddings=False, sliding_window=64,
        **changes,
    )  # fmt: skip
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def run(model: Any) -> Composition:
    return Composition(model, TOKENIZER, BEHAVIOURS, EXAMPLES, FRESH, max_new_tokens=4)


def trial_of(model: Any, name: str) -> Trial:
    behaviour = BEHAVIOURS[name]
    answers = [behaviour.answer(text) for text in FRESH]
    return Trial(model, TOKENIZER, behaviour.instruction, FRESH, answers, max_new_tokens=4)


def test_a_sum_is_measured_on_both_instructions(model: Any, run: Composition) -> None:
    ours, theirs = run.patch("reverse"), run.patch("commas")
    row = run.together("reverse", "commas")
    trial = trial_of(model, "reverse")
    with (ours + theirs).applied(model):
        score = trial.score(model)
    with ours.applied(model):
        alone = trial.score(model)
    assert (row.added, row.patched) == (score.accuracy, alone.accuracy)
    assert row.added_recovered == pytest.approx(score.effect.recovered, rel=1e-4)
    assert row.kl_lost == pytest.approx((score.effect.patched - alone.effect.patched) / score.effect.tokens, rel=1e-4)
    assert set(row.predicted) == set(PREDICTORS)


def test_a_negated_patch(model: Any, run: Composition) -> None:
    row = run.alone("reverse")
    trial, patch = trial_of(model, "reverse"), run.patch("reverse")
    with (-patch).applied(model):
        texts = trial.answer(model)[1]
    assert row.negated_repeats == sum(a == b for a, b in zip(texts, trial.base_texts, strict=True)) / 3

    def logprobs(told: bool) -> list[torch.Tensor]:
        rows = []
        for question, written in zip(FRESH, trial.bare_written, strict=True):
            header, chunk, e = tk.align(TOKENIZER, "Reverse", question)
            prefix = header + chunk + e if told else header + e
            logits = model(torch.tensor([prefix + written])).logits[0, len(prefix) - 1 : -1]
            rows.append(torch.log_softmax(logits.double(), -1))
        return rows

    def divergence(other: list[torch.Tensor]) -> float:
        return sum(float((p.exp() * (p - q)).sum()) for p, q in zip(logprobs(False), other, strict=True))

    without = divergence(logprobs(True))
    with (-patch).applied(model):
        told = logprobs(True)
    assert row.cancelled == pytest.approx(1 - divergence(told) / without, abs=1e-3)


def test_both_counts_the_second_of_the_first_s_answer(model: Any, run: Composition) -> None:
    both = run.both("reverse", "commas")
    assert both is not None and both.sample[:2] == ("1 2 3", "3, 2, 1")
    assert run.both("commas", "reverse") is not None
    unfit = Composition(
        model, None, BEHAVIOURS | {"words": Behaviour("words", "Say", lambda text: "one two")}, EXAMPLES, FRESH
    )
    assert unfit.both("words", "commas") is None  # commas needs numbers


def test_predictions_are_the_sums_written_out(model: Any) -> None:
    tiny = tiny_gemma3(1)
    ours, theirs = random_patch(1, layers=(0, 2)), random_patch(2, layers=(0, 1))
    kept: dict[tuple[int, str], list[torch.Tensor]] = {}
    for layer in (0, 2):
        block = tiny.model.layers[layer]
        modules = {"attention": block.self_attn.o_proj, "mlp": block.mlp, "down": block.mlp.down_proj}
        for site, module in modules.items():
            module.register_forward_pre_hook(
                lambda _, args, key=(layer, site): kept.setdefault(key, []).append(args[0].clone())
            )
    # A hook registered without prepend sees what a patch, whose hooks come first, has made of the activation.
    with ours.applied(tiny), activation_moments(tiny, ours) as moments:
        tiny(token_ids())
    for key, seen in kept.items():
        assert moments[key].shape == (ours.entries[key].input_width + 1,) * 2
        before = rows = seen[0].flatten(0, 1).double()
        if key[1] != "down":  # where the patch acts on what comes out
            before = torch.linalg.solve(  # undo x + Δ x + v
                torch.eye(rows.shape[1], dtype=torch.float64) + ours.matrix(*key).double(),
                (rows - ours.vector(*key).double()).T,
            ).T
        ones = torch.cat([before, torch.ones(len(before), 1, dtype=torch.float64)], 1)
        torch.testing.assert_close(moments[key], ones.T @ ones, rtol=1e-3, atol=1e-2)
    assert moments[0, "residual"].item() == token_ids().numel()

    found = predictions(ours, theirs, moments)
    shared = [key for key in ours.entries if key in theirs.entries]
    dot = sum(float((augmented(ours, k) * augmented(theirs, k)).sum()) for k in shared)
    sizes = [sum(float(augmented(p, k).square().sum()) for k in p.entries) for p in (ours, theirs)]
    assert found["cosine"] == pytest.approx(dot / math.sqrt(sizes[0] * sizes[1]))

    def energy(patch: tk.ThoughtPatch) -> float:
        return sum(float((augmented(patch, k) @ moments[k] * augmented(patch, k)).sum())
                   for k in patch.entries if k in moments)  # fmt: skip

    assert found["disturbance"] == pytest.approx(energy(theirs) / energy(ours))
    same = predictions(ours, ours, moments)
    assert all(same[name] == pytest.approx(1.0) for name in PREDICTORS)
    flipped = predictions(ours, -ours, moments)
    assert flipped["cosine"] == flipped["direction"] == pytest.approx(-1.0) and flipped["outputs"] == pytest.approx(1.0)
    apart = predictions(random_patch(1, layers=(2,)), random_patch(2, layers=(1,)), moments)
    assert all(value == 0.0 for value in apart.values())


def test_hooks_are_gone_after_an_error() -> None:
    tiny = tiny_gemma3(1)
    with pytest.raises(RuntimeError, match="stop"), activation_moments(tiny, random_patch()):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 10], [0.1, 0.2, 5, 7]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # By hand: ranks (1.5, 1.5, 3, 4) and (1, 2, 4, 3): covariance 3.5 of sums of squares 4.5 and 5.
    assert rank_correlation([1, 1, 2, 3], [1, 2, 4, 3]) == pytest.approx(3.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None and rank_correlation([1, 2], [1, 2]) is None


def test_pairs_of_tasks_are_read() -> None:
    assert all(len(read_pair(pair)) == 2 for pair in PAIRS)
    for text in ("reverse", "reverse+reverse", "reverse+translate", "a+b+c"):
        result = CliRunner().invoke(app, ["experiment", "composition", "--pair", text])
        assert result.exit_code == 2 and "--pair must be two of" in " ".join(result.stderr.replace("│", " ").split())


def test_the_composition_command(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    arguments = ["experiment", "composition", "-m", tmp_path / "model", "--pair", "reverse+commas", "--examples", 2,
                 "--inputs", 3, "--max-new-tokens", 3, "-o", tmp_path / "out"]  # fmt: skip
    first = CliRunner().invoke(app, list(map(str, arguments)))
    assert first.exit_code == 0, first.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in content["alone"]] == ["reverse", "commas"]
    assert [(row["name"], row["other"]) for row in content["together"]] == [
        ("reverse", "commas"),
        ("commas", "reverse"),
    ]
    assert (tmp_path / "out" / "interference.csv").is_file() and "Spearman" in first.stdout
    from matplotlib.image import imread

    assert imread(tmp_path / "out" / "figure.png").shape[1] >= 1000
    again = CliRunner().invoke(app, list(map(str, arguments)))
    assert again.stdout == first.stdout


def test_knowledge_is_asked_with_other_questions_than_it_was_fitted_on(model: Any) -> None:
    fit, ask = [Pair("who", "Ann"), Pair("when", "now")], [Pair("where", "here"), Pair("what", "x")]
    options = {"max_new_tokens": 3}
    report = run_knowledge(model, TOKENIZER, "Ann is here", fit, ask, match=lambda *_: True, **options)
    assert (report.fitted, report.asked, report.answerable, report.patched_answerable) == (2, 2, 2, 1.0)
    assert "nothing about knowledge can be shown" in report.verdict  # right without the facts too
    trial = Trial(model, TOKENIZER, "Ann is here", ["where", "what"], ["here", "x"], max_new_tokens=3)
    examples = ["who", "when"]
    patch = tk.transmute(model, TOKENIZER, "Ann is here", examples, max_new_tokens=3)
    with patch.applied(model):
        assert [row["patched"] for row in report.rows] == trial.score(model).texts
    assert [row["prompted"] for row in report.rows] == trial.prompted_texts

    told = {row["prompted"] for row in report.rows} - {row["bare"] for row in report.rows}
    assert told
    able = run_knowledge(model, TOKENIZER, "Ann is here", fit, ask, match=lambda text, *_: text in told, **options)
    assert able.prompted > able.base and "with the patch instead of being told" in able.verdict
    never = run_knowledge(model, TOKENIZER, "Ann is here", fit, ask, match=lambda *_: False, **options)
    assert (never.answerable, never.patched_answerable) == (0, None) and "nothing about" in never.verdict
    with pytest.raises(ValueError, match="fit and ask must each hold a question at least, got 0 and 2"):
        run_knowledge(model, TOKENIZER, "x", [], ask)
    with pytest.raises(ValueError, match="ask must hold other questions than fit, got 'who' in both"):
        run_knowledge(model, TOKENIZER, "x", fit, fit[:1])


def test_of_a_compiled_model_the_one_inside_is_measured(model: Any, run: Composition) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("compiled, which every patch would have done anew")

    compiled = torch.compile(model, backend=refused)
    options = {"max_new_tokens": 4}
    found = Composition(compiled, TOKENIZER, BEHAVIOURS, EXAMPLES, FRESH, **options)
    assert found.together("reverse", "commas") == run.together("reverse", "commas")
    pairs = [Pair("who", "Ann")], [Pair("where", "here")]
    reports = [run_knowledge(one, TOKENIZER, "Ann is here", *pairs, **options) for one in (compiled, model)]
    assert reports[0] == reports[1]


def test_predictions_do_not_depend_on_the_mode_that_the_model_was_left_in(run: Composition) -> None:
    wild = build(attention_dropout=0.5)
    wild.train()
    found = Composition(wild, TOKENIZER, BEHAVIOURS, EXAMPLES, FRESH, max_new_tokens=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = found.together("reverse", "commas")
    assert again == run.together("reverse", "commas") and all(module.training for module in wild.modules())


def test_the_made_up_facts_hold_every_answer() -> None:
    assert len({pair.question for pair in QUESTIONS}) == len(QUESTIONS) == 27
    assert all(pair.answer in FACTS and pair.answer not in pair.question for pair in QUESTIONS)


def test_the_lexicon_asks_for_words_that_no_example_held() -> None:
    from thought_kernels.cli.knowledge import lexicon
    from thought_kernels.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    model = tiny_gemma3(vocab_size=len(tokenizer), layer_types=["full_attention"], tie_word_embeddings=False)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    report = lexicon(model, tokenizer, 0, 32)
    assert (report.fitted, report.asked) == (16, 16) and report.facts == "Translate to French"


def test_the_knowledge_command(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(4)))
    facts = tmp_path / "facts.txt"
    facts.write_text("All is well.\n")
    assert read_facts(str(facts)) == read_facts("All is well.") == "All is well."
    common = ["experiment", "knowledge", "-m", tmp_path / "model", "--max-new-tokens", 2, "-o", tmp_path / "out"]

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(app, list(map(str, [*common, *arguments])))

    result = invoke("--facts", facts, "--questions", questions)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())["facts"]
    assert content["facts"] == "All is well." and (content["fitted"], content["asked"]) == (2, 2)
    assert content["verdict"] in " ".join(result.stdout.split("\n"))
    assert invoke("--facts", facts).exit_code == 2  # its own questions are needed
    turns = tmp_path / "turns.jsonl"
    turns.write_text('{"prompt": "q0", "completion": "a0"}\n')
    assert invoke("--demonstrations", turns, "--questions", questions).exit_code == 0
