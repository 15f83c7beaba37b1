"""The verdict that follows from a report's figures, and the page's first lines."""

from __future__ import annotations

from typing import Any

import pytest

from thought_kernels.evaluation.figures.report import Line, Report
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.figures.verdict import summary, verdict
from thought_kernels.evaluation.pages.page import render


def section(name: str, *figures: tuple[str, str, float]) -> Section:
    made = Section(name, name)
    for subject, quantity, value in figures:
        made.add(subject, quantity, value, inputs=100)
    return made


def good() -> dict[str, Section]:
    return {
        "effect": section(
            "effect", ("bare", "accuracy", 0.0), ("prompted", "accuracy", 1.0), ("patched", "accuracy", 0.99),
            ("patched", "recovered", 0.99),
        ),
        "controls": section(
            "controls", ("patched", "recovered", 0.99), ("shuffled δ", "recovered", -2.0),
        ),
        "baselines": section("baselines", ("patched", "recovered", 0.99), ("LoRA", "recovered", 0.9)),
        "side_effects": section(
            "side_effects", ("patched", "unrelated KL", 0.001), ("bare", "text perplexity", 20.0),
            ("patched", "text KL", 0.002), ("told x", "accuracy, patch off", 1.0),
            ("told x", "accuracy, patch on", 0.98),
        ),
        "generalisation": section(
            "generalisation", ("outside", "prompted", 1.0), ("outside", "accuracy", 0.97),
            ("longer inputs", "prompted", 0.1), ("longer inputs", "accuracy", 0.0),
        ),
    }  # fmt: skip


def test_the_verdict_says_yes_where_every_figure_is_good() -> None:
    lines = verdict(good())
    assert [line.status for line in lines] == ["yes"] * 5
    assert "1 case left out, where the prompted model fails too" in lines[4].answer
    assert summary(lines) == "Yes, in every respect measured here."


@pytest.mark.parametrize(
    ("name", "figure", "index", "status"),
    [
        ("effect", ("patched", "accuracy", 0.8), 0, "partly"),
        ("effect", ("patched", "recovered", 0.2), 0, "no"),
        ("controls", ("shuffled δ", "recovered", 0.9), 1, "no"),
        ("controls", ("shuffled δ", "recovered", 0.3), 1, "partly"),
        ("baselines", ("LoRA", "recovered", 0.999), 2, "no"),
        ("side_effects", ("patched", "unrelated KL", 3.0), 3, "no"),
        ("side_effects", ("patched", "text KL", 0.05), 3, "partly"),
        ("side_effects", ("told x", "accuracy, patch on", 0.9), 3, "partly"),
        ("generalisation", ("outside", "accuracy", 0.1), 4, "no"),
    ],
)
def test_each_line_turns_with_its_figures(name: str, figure: tuple[str, str, float], index: int, status: str) -> None:
    sections = good()
    kept = [f for f in sections[name].figures if (f.subject, f.quantity) != figure[:2]]
    sections[name].figures[:] = kept
    sections[name].add(*figure, inputs=100)
    statuses = [line.status for line in verdict(sections)]
    assert statuses[index] == status and statuses.count("yes") == 4


def test_drift_on_text_that_a_model_does_not_know_is_no_harm() -> None:
    sections = good()
    sections["side_effects"].figures[:] = [f for f in sections["side_effects"].figures if "text" not in f.quantity]
    sections["side_effects"].add("bare", "text perplexity", 1e5)
    sections["side_effects"].add("patched", "text KL", 3.0)
    assert verdict(sections)[3].status == "yes"


def test_the_headline_names_what_to_look_at() -> None:
    lines = [Line("", status, "") for status in ("yes", "yes", "no", "unknown", "partly")]
    assert summary(lines) == "Yes for inputs like its examples; look at: better, carries over. Not measured: gentle."
    assert summary([Line("", "no", "")] * 5).startswith("No: the patched model does not follow")


@pytest.mark.parametrize(
    ("instruction", "title"),
    [
        ("Sum\n the numbers", "“Sum the numbers”"),
        ("word " * 40, "“" + ("word " * 18)[:89].rstrip() + "…”"),
        ([{"role": "system", "content": "Be brief"}], "“Be brief”"),
        (
            [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)],
            "2 demonstrations: a → b, …",
        ),
    ],
)  # fmt: skip
def test_a_page_is_named_in_a_line(instruction: Any, title: str) -> None:
    report = Report({"instruction": instruction}, {"effect": good()["effect"]}, verdict(good()), [], 0.0)
    assert f"<h1>Can {title} be trusted as a patch?</h1>" in render(report)


def test_long_tables_are_folded() -> None:
    few, many = (section("data", *((f"row {i}", "accuracy", 0.5) for i in range(count))) for count in (3, 40))
    pages = [render(Report({}, {"data": one}, [Line("", "yes", "")] * 5, [], 0.0)) for one in (few, many)]
    assert ["40 rows</summary>" in page for page in pages] == [False, True]
