"""What a report is expected to take: counts against what is done, and amounts against the minutes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_gemma3, tiny_tokenizer
from patches import random_patch

import thought_kernels as tk
from thought_kernels.evaluation import evaluate as evaluation
from thought_kernels.evaluation.arguments import Data, Limits, read_subject
from thought_kernels.evaluation.budget import plan as planning
from thought_kernels.evaluation.budget.plan import Plan, plan, reduced
from thought_kernels.evaluation.budget.rivals import rival_works
from thought_kernels.evaluation.budget.units import Work, rows_of
from thought_kernels.evaluation.budget.work import works
from thought_kernels.evaluation.figures.headings import HEADINGS
from thought_kernels.evaluation.measures import drift, trial
from thought_kernels.evaluation.rivals import function_vector, paper, rank_one, rows, states
from thought_kernels.evaluation.sections import bystanders, combination
from thought_kernels.evaluation.sections import subject as subjects
from thought_kernels.evaluation.sections.amounts import SCALES
from thought_kernels.evaluation.sections.baselines import BASELINES
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.prompts.ordinary import ORDINARY

TOKENIZER = tiny_tokenizer()
EXAMPLES = ["3 1 4", "2 7 8", "1 9", "5 5 5 5", "6 6", "0 8 1"]
HELD_OUT = [f"{i} {i + 2} 4" for i in range(24)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


def whole(model: Any, **changes: Any) -> Subject:
    data = {
        "examples": EXAMPLES, "held_out": HELD_OUT, "answers": None, "longer": ["1 2 3 4 5", "7 6 5 4 3"],
        "outside": {"examples": ["a b", "c d e"], "held_out": ["f g", "h"]}, "paraphrases": ["Add them", "Total"],
        "others": {"Turn": "Turn it", "Sort": "Sort", "Name": "Name one"}, "unrelated": ["hello", "who are you"],
        "pool": None, **changes,
    }  # fmt: skip
    limits = Limits(inputs=9, sweep_inputs=5, lora_steps=4, batch_size=8, max_new_tokens=3, seed=0)
    return read_subject(
        model, TOKENIZER, "Sum them", None, Data(**data), limits, scorer="exact", recipe={"written_inputs": 0},
        separator=None, without=None, format=None,
    )  # fmt: skip


def test_rows_are_all_that_a_patch_is_fitted_on(model: Any) -> None:
    subject = whole(model)
    assert rows_of(subject) == tk.Recipe.completions * len(EXAMPLES)
    told = [{"prompt": text, "completion": "1"} for text in EXAMPLES]
    assert rows_of(whole(model, examples=told)) == len(EXAMPLES)
    text = replace(subject, recipe=replace(subject.recipe, text_weight=0.1))
    assert rows_of(text, 2) == tk.Recipe.completions * 2 + len(ORDINARY)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of answers read and written, patches fitted and fitted again, and texts read, as they are made."""
    counts: Counter[str] = Counter()

    def watch(module: Any, name: str, what: str, number: Any) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            counts[what] += number(args)
            return function(*args, **options)

        monkeypatch.setattr(module, name, watched)

    for module in (trial, bystanders, combination, rows):
        watch(module, "completion_logprobs", "reads", lambda args: len(args[1]))
    for module in (trial, bystanders):
        watch(module, "complete", "writes", lambda args: len(args[1]))
    watch(drift, "completion_logprobs", "texts", lambda _: 1)
    watch(subjects, "completed", "writes", lambda args: tk.Recipe.completions * len(EXAMPLES))
    watch(subjects, "transmute", "fits", lambda _: 1)
    watch(subjects, "fit", "fits", lambda _: 1)
    for module in (subjects, paper):
        watch(module, "refit", "refits", lambda _: 1)
    for module in (states, rank_one):
        watch(module, "answer_states", "reads", lambda args: len(args[1]))
    watch(function_vector._Trial, "probability", "reads", lambda args: len(args[0]._ids))
    monkeypatch.setattr(rank_one, "TEXT_TOKENS", 4)
    watch(rank_one, "continue_prompts", "writes", lambda args: len(args[1]))
    return counts


@pytest.mark.filterwarnings("ignore")
def test_each_section_does_the_work_that_it_was_counted_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, counts = whole(model), counted(monkeypatch)
    expected = works(subject, HEADINGS)
    for name, work in expected.items():
        counts.clear()
        section = evaluation.run_section(subject, name)
        assert section.error is None, (name, section.error)
        assert (counts["fits"], counts["refits"], counts["texts"]) == (len(work.fits), work.refits, work.texts), name
        assert counts["writes"] <= work.writes, (name, counts, work)
        # A rival may be worth fewer candidates in this model than it has settings.
        assert (0.5 if name == "baselines" else 1) * work.reads <= counts["reads"] <= work.reads, (name, counts, work)


def test_work_of_a_given_patch_needs_no_examples(model: Any) -> None:
    subject = whole(model)
    subject.given_patch, subject.examples = random_patch(), []
    found = works(subject, HEADINGS)
    assert found["patch"] == found["baselines"] == Work()
    assert not any(work.fits for name, work in found.items() if name not in ("data", "generalisation"))


class Rates:
    """A second for every answer, ten for a patch."""

    answer_tokens = 3.0

    def __init__(self, subject: Subject) -> None: ...

    def seconds(self, work: Work) -> float:
        return work.reads + work.writes + 10 * (len(work.fits) + work.refits) + work.texts


@pytest.mark.parametrize("part", [None, 2.0, 0.9, 0.7, 0.001])
def test_a_plan_takes_the_largest_amounts_that_fit(
    model: Any, part: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "Rates", Rates)
    subject, names = whole(model), ["patch", "effect", "controls", "scale", "data"]

    def total(share: float) -> float:
        return sum(map(Rates(subject).seconds, works(reduced(subject, share), names).values()))

    limit = None if part is None else part * total(1)  # seconds
    found = plan(subject, names, None if limit is None else limit / 60)
    assert list(found.seconds) == names and found.total == total(found.share) and found.memory_mib > 1
    if limit is None or part == 2:
        assert found.share == 1 and found.fits
    elif found.fits:  # and a step more would not, but for the moment that planning takes
        assert found.total <= limit and total(found.share / 0.75) > limit - 1
    else:
        assert found.total > limit and found.share == pytest.approx(0.75**planning.STEPS)
    assert found.fits == (part != 0.001) or part == 0.7


def test_less_is_measured_and_nothing_else(model: Any) -> None:
    subject = whole(model)
    assert reduced(subject, 1) == subject
    totals = []
    for share in (1.0, 0.4, 0.1):
        less = reduced(subject, share)
        assert less.examples == subject.examples and less.recipe == subject.recipe
        assert less.held_out.questions == subject.held_out.questions[: len(less.held_out.questions)]
        assert 1.0 in less.amounts.scales and set(less.amounts.scales) <= set(SCALES)
        assert set(less.amounts.counts) <= set(subject.amounts.counts)
        totals.append(sum(map(Rates(subject).seconds, works(less, HEADINGS).values())))
    assert totals[0] > totals[1] > totals[2]


def test_every_baseline_has_its_work_counted(model: Any) -> None:
    subject = whole(model)
    told = rival_works(subject)
    assert list(told) == list(BASELINES)
    turns = [{"role": role, "content": text} for role, text in (("user", "1 2"), ("assistant", "3")) * 2]
    shown = rival_works(replace(subject, instruction=turns))  # of which it tries as many as were published
    assert shown["function vector"].reads > told["function vector"].reads


@pytest.mark.filterwarnings("ignore")
def test_a_baseline_that_takes_most_of_the_minutes_is_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Rates", Rates)
    subject = whole(model)
    made = {name: Rates(subject).seconds(work) for name, work in rival_works(subject).items()}
    slowest = max(made, key=made.__getitem__)
    whole_section = Rates(subject).seconds(works(subject, ["baselines"])["baselines"])
    found = plan(subject, ["baselines"], 0.9 * whole_section / 60)
    large = [name for name, seconds in made.items() if seconds > (0.9 * whole_section - 1) / 6]
    assert slowest in found.left_out and set(found.left_out) <= set(large) and found.share == 1
    less = found.reduce(subject)
    section = evaluation.run_section(less, "baselines")
    assert slowest not in section.subjects() and section.error is None
    assert any(note.lower().startswith(f"{slowest} was left out".lower()) for note in section.notes)


def test_a_report_keeps_its_plan_and_says_what_was_expected(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[Plan] = []
    given = {
        "held_out": HELD_OUT, "sections": ["patch", "effect"], "output": tmp_path, "max_new_tokens": 3,
        "recipe": {"written_inputs": 0},
    }  # fmt: skip

    def run(minutes: float | None) -> Any:
        return tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, minutes=minutes, announce=announced.append, **given)

    first = run(0.001)  # which nothing fits into: the least is measured
    assert first.settings["held_out"] == 8 < len(HELD_OUT) and first.settings["minutes"] == 0.001
    assert "The least that can be measured was expected to take" in first.warnings[-1]
    for name, section in first.sections.items():
        assert section.expected_seconds == announced[0].seconds[name] > 0
    monkeypatch.setattr(evaluation, "plan", lambda *_: pytest.fail("planned again"))
    monkeypatch.setattr(evaluation, "run_section", lambda *_: pytest.fail("measured again"))
    again = run(0.001)
    assert announced[1] == announced[0] and repr(again.sections) == repr(first.sections)
    monkeypatch.setattr(evaluation, "plan", lambda *_: announced[0])
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        given["held_out"] = HELD_OUT[::-1]
        run(0.001)
    assert json.loads((tmp_path / "plan.json").read_text())["minutes"] == 0.001
    with pytest.raises(ValueError, match="evaluate: minutes must be finite and positive, got 0"):
        run(0)


def test_a_plan_of_all_that_was_asked_for_changes_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"held_out": HELD_OUT, "sections": ["effect"], "output": tmp_path, "max_new_tokens": 3}
    found = tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, recipe={"written_inputs": 0}, **given)
    monkeypatch.setattr(evaluation, "run_section", lambda *_: pytest.fail("measured again"))
    announced: list[Plan] = []
    given["announce"] = announced.append
    again = tk.evaluate(model, TOKENIZER, "Sum them", EXAMPLES, recipe={"written_inputs": 0}, **given)
    assert announced and again.sections["effect"].seconds == found.sections["effect"].seconds
