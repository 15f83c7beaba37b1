"""The rules of compiled system prompts: what their checkers take for right, which inputs they apply to, survival."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import compilation_cases as cases
import rules
import tasks

PROMPTS = tasks.names("system")
RULES = {(prompt, rule.name): rule for prompt in PROMPTS for rule in rules.rules(prompt)}
# Answers that the checkers of an earlier day took for the opposite of what they say.
OPPOSITES = [
    ("library", "opening hours", "Someone will attend."), ("library", "opening hours", "Open on Sunday at one."),
    ("library", "medicine and law", "No professional is needed."), ("library", "a title", "It is **very** quiet here."),
    ("bike-shop", "opening hours", "Open every Sunday from 9 to 6."), ("bike-shop", "a service", "It is 500 euros."),
    ("bike-shop", "a rental", "It is 500 euros."), ("bike-shop", "electric", "We repair all batteries."),
    ("ferry", "a missed boat", "Your ticket is now invalid."), ("ferry", "prices", "Feel free to ask."),
    ("ferry", "a refund", "Our office will refund you at once."), ("ferry", "times", "The crossing takes 4 hours."),
    ("hotel", "the garage", "The garage costs 90 dollars."), ("hotel", "an allergy", "Gluten is harmless."),
    ("hotel", "a dog", "It may sleep in the winter garden."), ("hotel", "the sauna", "Listen, I often go there."),
    ("hotel", "breakfast", "10 in the evening."), ("kitchen", "no pork", "Chicken in bacon and pork."),
    ("kitchen", "no cups", "Bake it at 350 °F."),
]  # fmt: skip


@pytest.mark.parametrize("prompt, name", RULES)
def test_a_rule_tells_right_answers_from_wrong_ones(prompt: str, name: str) -> None:
    rule, entry = RULES[prompt, name], rules.entries(prompt)[name]
    assert entry["right"] and entry["wrong"]
    assert [answer for answer in entry["right"] if not rule.kept(answer)] == []
    assert [answer for answer in entry["wrong"] if rule.kept(answer)] == []


@pytest.mark.parametrize("prompt, name, answer", OPPOSITES)
def test_the_opposite_of_a_rule_does_not_keep_it(prompt: str, name: str, answer: str) -> None:
    (rule,) = (rule for (of, full), rule in RULES.items() if of == prompt and full.startswith(name))
    assert not rule.kept(answer)


@pytest.mark.parametrize("prompt, name", RULES)
def test_a_rule_applies_to_inputs_none_of_which_keeps_it(prompt: str, name: str) -> None:
    of, rule = tasks.task(prompt, seed=0, inputs=99), RULES[prompt, name]
    inputs = [text for text, _ in [*of.inputs, *of.held_out]]
    applies = list(filter(rule.applies, inputs))
    assert len(applies) >= 2 and (rule.asked is None or len(applies) <= len(inputs) / 4)
    assert rule.asked is None or [text for text in applies if rule.kept(text)] == []  # an echo is no answer


@pytest.mark.parametrize("prompt, name, question", [
    ("hotel", "another complaint", "The shower has no hot water."),
    ("hotel", "another complaint", "My bed is far too soft."), ("library", "other things", "Tell me a joke."),
    ("library", "other things", "What is the tallest mountain in Europe?"),
])  # fmt: skip
def test_a_rule_applies_to_what_it_is_about(prompt: str, name: str, question: str) -> None:
    assert any(rule.applies(question) for (of, full), rule in RULES.items() if of == prompt and full.startswith(name))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", ["ferry", "hotel"])
def test_each_rule_is_asked_of_held_out_inputs_and_of_those_to_fit_on(prompt: str, seed: int) -> None:
    of = tasks.task(prompt, seed=seed)
    assert len(of.held_out) == len(of.inputs) == 32 and not {*of.held_out} & {*of.inputs}
    for rule in rules.rules(prompt):
        assert all(any(rule.applies(text) for text, _ in rows) for rows in (of.held_out, of.inputs)), rule.name


def test_everyday_requests_are_asked_only_what_other_things_get() -> None:
    swim = "How can I teach my child to swim?"
    for prompt in PROMPTS:
        found = rules.rules(prompt)
        asked = [rule.name for rule in found if rule.asked and rule.applies(swim, everyday=True)]
        assert [name.partition(":")[0] for name in asked] == ["other things"]
        requests = cases.case(cases.UNRELATED, tasks.task(prompt, seed=0), 16).questions
        (other,) = (rule for rule in found if rule.everyday)
        assert sum(other.applies(text, everyday=True) for text in requests) >= 12
        assert all(rule.applies(swim, everyday=True) for rule in found if rule.asked is None)
    assert not RULES["hotel", "a swim: the harbour bath"].applies(swim, everyday=True)


def test_the_end_of_an_answer_decides_only_where_there_is_one() -> None:
    limit = RULES["hotel", "at most four sentences, the fixed one aside"]
    assert limit.kept("One. Two.", cut=True) is None and limit.kept("One. Two.") is True
    assert RULES["hotel", "dear guest"].kept("Dear guest", cut=True) is True
    assert {rule.name for rule in RULES.values() if rule.whole} == {
        name for _, name in RULES if name.startswith(("ends with", "at most"))
    }
    assert [name for (_, name), rule in RULES.items() if rule.kept(" \n")] == []


def test_an_abbreviation_is_no_sentence_end() -> None:
    limit = RULES["ferry", "at most three sentences, the two fixed ones aside"]
    assert limit.kept("At 7 a.m. and at 9 p.m. on all days, Mr. Berg, e.g. today. Two. Three.")
    assert not limit.kept("At 7 a.m. Then at 8 p.m. Three. Four.")


def rule_of(name: str, answer: str, asked: str | None = None, whole: bool = False) -> rules.Rule:
    return rules.Rule(name, rules.re.compile(answer), asked=asked and rules.re.compile(asked), whole=whole)


def answers_of(*lines: tuple[str, ...]) -> list[dict[str, str]]:
    return [dict(zip(("question", "bare", "prompted", "patched"), line, strict=True)) for line in lines]


def test_survival_is_the_share_of_what_the_prompted_model_keeps() -> None:
    found = [rule_of("hi", "^hi"), rule_of("why", "so", "why"), rule_of("who", "me", "who")]
    rows = answers_of(("why", "no", "hi so", "hi so"), ("when", "hi", "hi", "no"), ("where", "no", "no", "hi"))
    hi, why, who, always, some, together = rules.survival(found, rows)
    assert (hi["asked"], hi["kept"], hi["survival"]) == (3, 2, 0.5)
    assert (hi["bare"], hi["prompted"], hi["patched"]) == (0.3333, 0.6667, 0.6667)
    assert (why["asked"], why["kept"], why["survival"], why["low"] < 0.1) == (1, 1, 1.0, True)
    assert (hi["gained"], hi["gained_survival"]) == (1, 1.0)  # the bare model says hi at when
    assert (who["asked"], who["bare"], who["kept"], who["survival"]) == (0, "", 0, "")
    assert {**always, "rule": "hi"} == hi and always["rule"] == rules.ALWAYS
    assert (some["rules"], some["not_asked"], some["asked"]) == (1, 1, 1)
    assert (together["rules"], together["asked"], together["kept"], together["survival"]) == (2, 4, 3, 0.6667)
    assert together["low"] < 0.6667 < together["high"]
    (never, *_) = rules.survival(found[:1], [{**rows[0], "prompted": "no"}])
    assert (never["kept"], never["survival"], never["gained_survival"]) == (0, "", "")


def test_cut_answers_are_left_out_where_their_end_decides() -> None:
    rows = answers_of(*[("?", "hm", "bye", "bye")] * 2, ("?", "hm", "bye", "and"), ("?", "hm", "and", "bye"))
    rows[2]["patched_cut"] = rows[3]["prompted_cut"] = rows[1]["bare_cut"] = "True"
    end, *_ = rules.survival([rule_of("end", "bye$", whole=True)], rows)
    assert [end[f"{of}_cut"] for of in rules.MODELS] == [1, 1, 1]
    assert (end["asked"], end["prompted"], end["patched"], end["kept"], end["survival"]) == (4, 1.0, 1.0, 2, 1.0)
    assert (end["gained"], end["gained_survival"]) == (1, 1.0)
    word, *_ = rules.survival([rule_of("word", "bye")], rows)
    assert (word["prompted"], word["kept"], word["survival"]) == (0.75, 3, 0.6667)
