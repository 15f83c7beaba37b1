"""The benchmark of compiled system prompts without any real model: rules, situations, jobs, rows, tables."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tables"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

import compilation
import compilation_cases as cases
import compilation_jobs
import compilation_tables as tables
import compilation_times
import rules
import tasks

from thought_kernels.prompts.prompt import encode

TOKENIZER = tiny_tokenizer()
PROMPTS = tasks.names("system")
# For each prompt an input, an answer that keeps every rule that applies, and one that breaks every one of these.
ANSWERS = {
    "bike-shop": (
        "Do you sell electric bicycles?", "Hello from Two Wheels! We sell them from spring on. Ride safely!",
        "Yes. We do. All of them. Every day. Come in. See you!",
    ),
    "kitchen": (
        "I am allergic to nuts. Can I eat pesto?",
        "Careful! Pesto has pine nuts, my friend; take 20 grams of basil. Buon appetito!", "Sure, two cups of it.",
    ),
    "library": (
        "I am a student and need a quiet place to learn.",
        "Dear reader, take *Walden* to the silent room. The lamp is on.", "Go. Sit. Here. Or. There. Now. Bye.",
    ),
    "ferry": (
        "What does a return ticket cost?", "Welcome aboard! It is 14 francs. Fair winds!",
        "It. Costs. Money. A. Lot. Of. It.",
    ),
    "hotel": (
        "I lost my key.",
        "Good evening, dear guest. Please tell me your name, and bring a document. Yours, Albin.",
        "Oh no! Look. For. It. In. The. Park.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_seen_to_keep_rules_and_another_to_break_them(prompt: str) -> None:
    question, good, bad = ANSWERS[prompt]
    asked = [rule for rule in rules.rules(prompt) if rule.applies(question)]
    assert len(asked) >= 4 and any(rule.asked for rule in asked)
    assert [rule.name for rule in asked if not rule.kept(good)] == []
    assert [rule.name for rule in asked if rule.kept(bad)] == []


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_rule_applies_to_several_inputs_and_its_checker_is_no_formality(prompt: str) -> None:
    of = tasks.task(prompt, seed=0, inputs=99)
    inputs = [text for text, _ in [*of.inputs, *of.held_out]]
    for rule in rules.rules(prompt):
        count = sum(map(rule.applies, inputs))
        assert count >= 2 and (rule.asked is None or count <= len(inputs) / 4), rule.name
        assert not rule.kept("No! No! No! No! No! No! Take two cups of it."), rule.name


def test_survival_is_the_share_of_what_the_prompted_model_keeps() -> None:
    found = [
        rules.Rule("hi", rules.re.compile("^hi")),
        rules.Rule("why", rules.re.compile("so"), rules.re.compile("why")),
    ]
    said = [("why", "no", "hi so", "hi so"), ("when", "hi", "hi", "no"), ("where", "no", "no", "hi")]
    rows = [dict(zip(("question", "bare", "prompted", "patched"), line, strict=True)) for line in said]
    hi, why = rules.survival(found, rows)
    assert (hi["asked"], hi["kept"], hi["survival"]) == (3, 2, 0.5)
    assert (hi["bare"], hi["prompted"], hi["patched"]) == (0.3333, 0.6667, 0.6667)
    assert (why["asked"], why["kept"], why["survival"], why["low"] < 1) == (1, 1, 1.0, True)
    (never,) = rules.survival(found[:1], [{**rows[0], "prompted": "no"}])
    assert (never["kept"], never["survival"], never["gained_survival"]) == (0, "", "")
    assert (hi["gained"], hi["gained_survival"]) == (1, 1.0)  # the bare model says hi at when
    assert list(rules.survival(found[1:], rows[1:])) == []


def small(name: str = "shop", text: str = "You are Vera. Be brief. End with bye.") -> tasks.Task:
    inputs = [(f"Question {index}?", None) for index in range(6)]
    return tasks.Task(name, "system", 0, False, [{"role": "system", "content": text}], inputs[:2], inputs[2:])


def test_prompts_are_cut_where_a_sentence_ends() -> None:
    of = small(text='Say "Hi!" first. It costs 1.50 euros, no more. Bye.')
    cut = cases.shortened(TOKENIZER, of, 25)
    assert cut.instruction == [{"role": "system", "content": 'Say "Hi!" first.'}] and cut.held_out == of.held_out
    assert cases.sentence_ends("A. B") == ["A."]
    assert cases.length(TOKENIZER, cut) == len('Say "Hi!" first.')
    for name in PROMPTS:
        text = tasks.task(name, seed=0).instruction[0]["content"]
        assert cases.sentence_ends(text)[-1] == text, name


def test_a_later_turn_goes_on_from_what_the_prompted_model_said() -> None:
    first, second = [("Question 2?", "two"), ("Question 3?", "three")], [("Question 3?", "3"), ("Question 4?", "4")]
    asked = cases.case(cases.TURN_3, small(), 2, [first, second])
    assert [[turn["content"] for turn in chat] for chat in asked.questions] == [
        ["Question 2?", "two", "Question 3?", "3", "Question 4?"],
        ["Question 3?", "three", "Question 4?", "4", "Question 5?"],
    ]
    around = cases.chat(["a", "b"], [[("a", "1"), ("b", "2")]], 1)
    assert [turn["content"] for turn in around] == ["b", "2", "a"]


def test_what_is_told_in_each_situation() -> None:
    of = small()
    other = cases.case(cases.OTHER_SYSTEM, of, 1)
    both, alone = other.instruction[0]["content"], other.without[0]["content"]
    assert both.startswith("You are Vera.") and both.endswith(alone) and alone == cases.OTHER
    long = cases.case(cases.LONG, of, 2).questions
    assert [cases.question(text) for text in long] == ["Question 2?", "Question 3?"] and long[0][:40] != long[1][:40]
    assert min(len(text.split()) for text in long) > cases.LONG_WORDS
    unrelated = cases.case(cases.UNRELATED, of, 2)
    assert len(unrelated.questions) == 2 and unrelated.instruction == of.instruction
    polite = cases.contrast("polite")
    assert cases.case(cases.CONTRARY, polite, 2).without == "Answer rudely."
    assert cases.case(cases.HELD_OUT, polite, 2).without is None


def test_fits_come_first_and_turns_in_their_order() -> None:
    prompts = [small(), small("inn"), small("bar", text="Be. " * 40)]
    found = list(compilation_jobs.jobs(TOKENIZER, prompts, [20, 400]))
    kinds = [job.case for job in found]
    fits = kinds.count(compilation_jobs.FIT)
    assert kinds[:fits] == [compilation_jobs.FIT] * fits == ["fit"] * 7  # three prompts, their beginnings, the pair
    mine = [(job.case, job.cut, job.patches) for job in found[fits:] if job.of.name == "shop"]
    assert mine[:4] == [
        ("held-out", "full", ("own", "own + inn", "own + bar", "own + all others")), ("held-out", "20", ("own",)),
        ("turn 2", "full", ("own",)), ("turn 3", "full", ("own",)),
    ]  # fmt: skip
    assert {job.patches for job in found if job.of.name == "polite"} == {("own", "contrast")}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """A tiny model and prompts with a rule."""

    def load(path: str, device: str) -> Any:
        model = tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER), max_position_embeddings=4096)
        return model, TOKENIZER

    monkeypatch.setattr(compilation, "load", load)
    monkeypatch.setattr(compilation, "task", lambda name, **_: small(name))
    monkeypatch.setattr(compilation, "rules", lambda prompt: [rules.Rule("some text", rules.re.compile("."))])
    monkeypatch.setattr(compilation_times, "STEPS", 1)
    monkeypatch.setattr(cases, "LONG_WORDS", 1)
    return Namespace(
        prompts=["shop", "inn"], lengths=[20], inputs=2, held_out=2, answer_tokens=4, patches=tmp_path / "patches",
        device="cpu", output=tmp_path / "rows.csv",
    )  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_stopped_run_goes_on_and_measures_nothing_twice(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def do(self: Any, job: Any) -> None:
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(job.case)
        original(self, job)

    original = compilation.Compilation.do
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(compilation.Compilation, "do", do)
        compilation.run(options, "tiny", "somewhere")
    partial = options.output.read_text()
    compilation.run(options, "tiny", "somewhere")
    text, rows = options.output.read_text(), rows_of(options.output)
    assert text.startswith(partial)
    keys = [tuple(row[name] for name in compilation.KEY) for row in rows]
    wanted = [job for prompts in [[small("shop"), small("inn")]] for job in
              compilation_jobs.jobs(TOKENIZER, prompts, [20])]  # fmt: skip
    assert len(keys) == len(set(keys)) == sum(len(job.patches) for job in wanted)
    for row in rows:
        assert bool(row["recovered"]) == (row["case"] not in ("fit", "times", "ordinary text"))
    told = rows_of(compilation.beside(options.output, "rules"))
    assert {row["patch"] for row in told} == {"own", "own + shop", "own + inn", "contrast"}
    assert {row["cut"] for row in told} == {"full"} and {row["asked"] for row in told} == {"1", "2"}
    compilation.run(options, "tiny", "somewhere")
    assert options.output.read_text() == text


def test_the_sum_of_patches_is_not_the_patch(options: Namespace) -> None:
    options.lengths = []
    compilation.run(options, "tiny", "somewhere")
    found = {(row["prompt"], row["patch"]): row for row in rows_of(options.output) if row["case"] == "held-out"}
    assert found["shop", "own"]["recovered"] != found["shop", "own + inn"]["recovered"]
    assert found["shop", "own"]["kl_bare"] == found["shop", "own + inn"]["kl_bare"]
    assert float(found["shop", "own"]["recovered"]) > 0.5
    low, value, high = (float(found["shop", "own"][name]) for name in ("low", "recovered", "high"))
    assert low <= value <= high


def test_a_turn_whose_answers_are_lost_is_refused(options: Namespace) -> None:
    model, tokenizer = compilation.load("", "cpu")
    lost = compilation.Compilation("tiny", model, tokenizer, [small()], options)
    with pytest.raises(SystemExit, match="must hold the answers of shop, held-out, got none"):
        lost.do(compilation_jobs.Job(small(), "full", cases.TURN_2, ("own",)))


def test_times_are_of_whole_requests() -> None:
    model = tiny_gemma3(0, torch.float32, vocab_size=len(TOKENIZER))
    requests = [encode(TOKENIZER, small().instruction, text) for text, _ in small().held_out]
    found = compilation_times.request_times(model, requests, rounds=3)
    assert found["tokens_prompted"] - found["tokens_bare"] == len(requests[0].instruction)
    names = {"prefill_prompted_ms", "prefill_cached_ms", "prefill_bare_ms", "token_prompted_ms", "token_bare_ms"}
    assert names <= set(found) and min(found[name] for name in names) > 0


def test_tables_of_rows_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {make() for make in tables.COMPILATION.values()} == {tables.NOTHING}
    results = compilation.Results(tmp_path / "compilation.csv", compilation.KEY, compilation.COLUMNS)
    key = {"model": "smol", "prompt": "hotel", "cut": "full", "patch": "own", **tables.MEASURED}
    row = {**key, "reserved": True, "prompt_tokens": 780, "chats": 32, "kl_bare": 2, "kl_patched": 0.4}
    scored = {"recovered": 0.8, "low": 0.7, "high": 0.9, "same_bare": 0.5, "same_patched": 0.75}
    results.add({**row, **scored, "case": "held-out"})
    results.add({**row, **scored, "case": "held-out", "cut": "100", "prompt_tokens": 98, "recovered": 0.9})
    results.add({**row, **scored, "case": "held-out", "patch": "own + ferry", "recovered": 0.4})
    results.add({**row, **scored, "case": "turn 2", "recovered": 0.6, "kl_bare": 0.5})
    results.add({**row, "case": "fit", "seconds": 60.4, "generation": 30.2})
    results.add({**row, "case": "ordinary text", "drift": 0.25})
    times = {"tokens_prompted": 800, "tokens_bare": 20, "prefill_prompted_ms": 400, "prefill_cached_ms": 30}
    results.add({**row, "case": "times", **times, "prefill_bare_ms": 20, "token_prompted_ms": 50, "token_bare_ms": 40})
    assert tables.effect().splitlines()[-1] == (
        r"| SmolLM2 135M Instruct | hotel \* | 780 | 0.800 | 0.700 to 0.900 | 0.85 | no | 2.000 | 0.400 | 0.500 "
        "| 0.750 | 60 | 30 |"
    )
    assert [line.split(" | ")[2:4] for line in tables.lengths().splitlines()[2:]] == [["98", "0.900"], ["780", "0.800"]]
    assert tables.situations().splitlines()[-1].endswith("| 0.800 (2.00) | 0.600 (0.50) | – | – | – | – | 0.250 |")
    assert tables.times().splitlines()[-1].endswith("| 800 | 20 | 400 | 30 | 20 | 95% | 50.0 | 40.0 | 20% |")
    assert [line.split(" | ")[2:4] for line in tables.sums().splitlines()[2:]] == [
        ["own", "0.800"], ["own + ferry", "0.400"],
    ]  # fmt: skip


def test_tables_of_rules_and_of_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    output = tmp_path / "compilation.csv"
    results = compilation.Results(output, compilation.KEY, compilation.COLUMNS)
    answers = compilation.Results(compilation.beside(output, "answers"), compilation.KEY, compilation.ANSWERS)
    key = {"model": "qwen", "cut": "full", "case": "held-out", "patch": "own", **tables.MEASURED}
    row = {**key, "reserved": True, "prompt_tokens": 290, "recovered": 0.9, "low": 0.8, "high": 1, "kl_bare": 1}
    results.add({**row, "prompt": "ferry", "chats": 2})
    for question, patched in (("Who are you?", "Welcome aboard! I am Lina."), ("What is the price for a car?", "25.")):
        texts = {"question": question, "bare": "Well.", "prompted": "Welcome aboard! 25 francs.", "patched": patched}
        answers.add({**key, "prompt": "ferry", **texts})
    for patch in ("own", "contrast"):
        results.add({**row, "prompt": "polite", "patch": patch, "reserved": False})
        results.add({**row, "prompt": "polite", "patch": patch, "case": "against the contrary", "recovered": 0.5})
        texts = {"question": "Hm?", "bare": "a|b", "prompted": "Please,\ndo.", "patched": patch * 100}
        answers.add({**key, "prompt": "polite", "patch": patch, **texts})
    compilation.write_rules(output)
    always, some = (line.split(" | ")[2:] for line in tables.rules_in_all().splitlines()[2:])
    # Three rules of two answers each: the welcome survives once, the limit twice, nobody wrote the wish.
    assert always == ["for all inputs", "3", "6", "0.33", "0.67", "0.50", "0.75 of 4", "0.50 of 2 |"]
    assert some == ["for some inputs", "1", "1", "0.00", "1.00", "0.00", "0.00 of 1", "0.00 of 1 |"]
    assert tables.rules_by_situation().splitlines()[-1].endswith("| 0.33 of 3 | – | – | – | – | – |")
    assert (
        r"| ferry \* | begins with the welcome | 2 | 0.00 | 1.00 | 0.50 | 0.50 of 2 | 0.50 of 2 |"
        in tables.each_rule("qwen")
    )
    assert tables.each_rule("smol") == tables.NOTHING
    assert [line.split(" | ")[2:5] for line in tables.contrast().splitlines()[2:]] == [
        ["nothing", "contrast", "0.900"], ["nothing", "plain", "0.900"],
        ["the contrary", "contrast", "0.500"], ["the contrary", "plain", "0.500"],
    ]  # fmt: skip
    _, asked, bare, told, plain, _ = tables.answers().splitlines()[-1].strip("| ").split(" | ")
    assert (asked, bare, told, plain) == ("Hm?", r"a\|b", "Please, do.", ("own" * 100)[: tables.SHOWN] + " …")
    assert "polite" not in tables.effect() and "polite" not in tables.rules_in_all()


def test_rules_are_pooled_by_how_often_they_apply() -> None:
    shares = {"bare": "0", "prompted": "0.5", "patched": "0.25"}
    line = {"asked": "32", **shares, "kept": "16", "survival": "0.5", "gained": "6", "gained_survival": "0.5"}
    other = {"asked": "32", **shares, "kept": "4", "survival": "1", "gained": "2", "gained_survival": "1"}
    never = {"asked": "4", **shares, "prompted": "0", "kept": "0", "survival": "", "gained": "0", "gained_survival": ""}
    assert tables.pooled([line, never]) == ["36", "0.00", "0.44", "0.25", "0.50 of 16", "0.50 of 6"]
    assert tables.pooled([line, other])[-2:] == ["0.60 of 20", "0.62 of 8"]
    assert tables.pooled([never])[-1] == "–"
