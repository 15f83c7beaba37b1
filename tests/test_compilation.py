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
        ("held-out", "full", ("own", "chats", "own + inn", "own + bar", "own + bar + inn")),
        ("held-out", "20", ("own",)),
        ("turn 2", "full", ("own", "chats")), ("turn 3", "full", ("own", "chats")),
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
    assert {row["patch"] for row in told} == {"own", "chats", "own + shop", "own + inn", "contrast"}
    assert {row["cut"] for row in told} == {"full"} and {row["asked"] for row in told} == {"1", "2"}
    said = rows_of(compilation.beside(options.output, "answers"))
    assert {row[f"{side}_cut"] for row in said for side in rules.MODELS} <= {"True", "False"}
    compilation.run(options, "tiny", "somewhere")
    assert options.output.read_text() == text


def test_other_weights_or_another_device_make_other_rows_and_patches(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    options.lengths, job = [], compilation_jobs.Job(small(), "full", cases.HELD_OUT, ("own",))
    model, tokenizer = compilation.load("", "cpu")

    def measure() -> tuple[int, int]:
        one = compilation.Compilation("tiny", model, tokenizer, [small()], options)
        one.do(job)
        return sum(row["case"] == "held-out" for row in rows_of(options.output)), len(list(options.patches.iterdir()))

    assert measure() == measure() == (1, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert measure() == (2, 2)
    monkeypatch.setattr(compilation, "device_name", lambda device: "another")
    assert measure() == (3, 3)


def test_a_sum_of_patches_names_them_all() -> None:
    assert compilation_jobs.plus("inn", "bar") == compilation_jobs.plus("bar", "inn") == "own + bar + inn"
    assert compilation_jobs.added("own + bar + inn") == ["bar", "inn"] and compilation_jobs.added("own") == []


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
    names = {
        "prefill_prompted_ms", "prefill_prompted_cached_ms", "prefill_bare_ms", "prefill_bare_cached_ms",
        "token_prompted_ms", "token_bare_ms",
    }  # fmt: skip
    assert set(found) == {*names, "tokens_prompted", "tokens_bare"} and min(found[name] for name in names) > 0


def test_tables_of_rows_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {make() for make in tables.COMPILATION.values()} == {tables.NOTHING}
    results = compilation.Results(tmp_path / "compilation.csv", compilation.KEY, compilation.COLUMNS)
    key = {
        "model": "smol",
        "weights": "w",
        "device": "d",
        "prompt": "hotel",
        "cut": "full",
        "patch": "own",
        **tables.MEASURED,
    }
    row = {**key, "reserved": True, "prompt_tokens": 780, "chats": 32, "kl_bare": 2, "kl_patched": 0.4}
    scored = {"recovered": 0.8, "low": 0.7, "high": 0.9, "same_bare": 0.5, "same_patched": 0.75}
    results.add({**row, **scored, "case": "held-out"})
    results.add({**row, **scored, "case": "held-out", "cut": "100", "prompt_tokens": 98, "recovered": 0.9})
    results.add({**row, **scored, "case": "held-out", "patch": "own + ferry", "recovered": 0.4})
    results.add({**row, **scored, "case": "turn 2", "recovered": 0.6, "kl_bare": 0.5})
    results.add({**row, "case": "fit", "seconds": 60.4, "generation": 30.2})
    results.add({**row, "case": "ordinary text", "drift": 0.25})
    times = {"tokens_prompted": 800, "tokens_bare": 20, "prefill_prompted_ms": 400, "prefill_prompted_cached_ms": 30}
    times |= {"prefill_bare_ms": 20, "prefill_bare_cached_ms": 15}
    results.add({**row, "case": "times", **times, "token_prompted_ms": 50, "token_bare_ms": 40})
    assert tables.effect().splitlines()[-1] == (
        r"| SmolLM2 135M Instruct | hotel \* | 780 | 0.800 | 0.700 to 0.900 | 0.85 | no | 2.000 | 0.400 | 0.500 "
        "| 0.750 | 60 | 30 |"
    )
    assert [line.split(" | ")[2:4] for line in tables.lengths().splitlines()[2:]] == [["98", "0.900"], ["780", "0.800"]]
    assert tables.situations().splitlines()[-1].endswith("| 0.800 (2.00) | 0.600 (0.50) | – | – | – | – | 0.250 |")
    assert tables.times().splitlines()[-1].endswith("| 800 | 20 | 400 | 20 | 95% | 30 | 15 | 50% | 50.0 | 40.0 | 20% |")
    assert [line.split(" | ")[2:4] for line in tables.sums().splitlines()[2:]] == [
        ["own", "0.800"], ["own + ferry", "0.400"],
    ]  # fmt: skip


def test_tables_of_rules_and_of_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    output = tmp_path / "compilation.csv"
    results = compilation.Results(output, compilation.KEY, compilation.COLUMNS)
    answers = compilation.Results(compilation.beside(output, "answers"), compilation.KEY, compilation.ANSWERS)
    key = {"model": "qwen", "weights": "w", "device": "d", "cut": "full", "case": "held-out", "patch": "own"}
    key |= tables.MEASURED
    row = {**key, "reserved": True, "prompt_tokens": 290, "recovered": 0.9, "low": 0.8, "high": 1, "kl_bare": 1}
    results.add({**row, "prompt": "ferry", "chats": 2})
    for question, patched in (("Who are you?", "Welcome aboard! I am Lina."), ("What is the price for a car?", "25.")):
        texts = {"question": question, "bare": "Well.", "prompted": "Welcome aboard! 25 francs.", "patched": patched}
        answers.add({**key, "prompt": "ferry", **texts, "bare_cut": question.startswith("Who")})
    for patch in ("own", "contrast"):
        results.add({**row, "prompt": "polite", "patch": patch, "reserved": False})
        results.add({**row, "prompt": "polite", "patch": patch, "case": "against the contrary", "recovered": 0.5})
        texts = {"question": "Hm?", "bare": "a|b", "prompted": "Please,\ndo.", "patched": patch * 100}
        answers.add({**key, "prompt": "polite", "patch": patch, **texts})
    compilation.write_rules(output)
    always, some = (line.split(" | ")[2:] for line in tables.rules_in_all().splitlines()[2:])
    # Three rules of two answers each: the welcome survives once, the limit twice, nobody wrote the wish. Of a bare
    # answer that was cut the limit and the wish say nothing.
    assert always[:7] == ["rules for all inputs", "3", "0", "6", "2, 0, 0", "0.25", "0.67"]
    assert [cell.partition(" (")[0] for cell in always[7:]] == ["0.50", "0.75 of 4", "0.50 of 2"]
    assert some[:7] == ["rules for some inputs", "1", "7", "1", "–", "0.00", "1.00"]
    assert some[7:] == ["0.00", "0.00 of 1 (0.00 to 0.97)", "0.00 of 1 (0.00 to 0.97) |"]
    assert "| 0.33 of 3 (0.00 to 1.00) | – | – | – | – | – |" in tables.rules_by_situation()
    each = tables.each_rule("qwen")
    assert r"| ferry \* | begins with the welcome | 2 | – | 0.00 | 1.00 | 0.50 | 0.50 of 2 (0.00 to 1.00) |" in each
    assert each.count("| not asked | – | – | – | – | – | – |") == 7 and "(all rules)" not in each
    assert tables.each_rule("smol") == tables.NOTHING
    assert [line.split(" | ")[2:5] for line in tables.contrast().splitlines()[2:]] == [
        ["nothing", "contrast", "0.900"], ["nothing", "plain", "0.900"],
        ["the contrary", "contrast", "0.500"], ["the contrary", "plain", "0.500"],
    ]  # fmt: skip
    _, asked, bare, told, plain, _ = tables.answers().splitlines()[-1].strip("| ").split(" | ")
    assert (asked, bare, told, plain) == ("Hm?", r"a\|b", "Please, do.", ("own" * 100)[: tables.SHOWN] + " …")
    assert "polite" not in tables.effect() and "polite" not in tables.rules_in_all()


def test_tables_show_one_device_and_one_set_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    results = compilation.Results(tmp_path / "compilation.csv", compilation.KEY, compilation.COLUMNS)
    key = {"model": "smol", "prompt": "ferry", "cut": "full", "patch": "own", "device": "d", **tables.MEASURED}
    for weights, case in (("old", "held-out"), ("old", "turn 2"), ("new", "held-out")):
        results.add({**key, "weights": weights, "case": case, "prompt_tokens": 9, "recovered": 0.5, "kl_bare": 1})
    results.add({**key, "weights": "old", "case": "held-out", "cut": "20", "prompt_tokens": 9})  # another patch
    assert [(row["weights"], row["cut"]) for row in tables.read()] == [("new", "full"), ("old", "20")]


def results_of(path: Path) -> compilation.Results:
    return compilation.Results(path, ("name",), ("name", "text"))


@pytest.mark.parametrize("torn", ["b", "b,", 'b,"x\ny\n', 'b,"a ""word""\n'])
def test_a_row_that_was_written_in_part_is_written_anew(tmp_path: Path, torn: str) -> None:
    path, rows = tmp_path / "rows.csv", [{"name": "a", "text": 'é, "1"\r\n2\n'}, {"name": "b", "text": "x"}]
    results_of(path).add(rows[0])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    results = results_of(path)
    assert {"name": "a"} in results and {"name": "b"} not in results and results.rows() == rows[:1]
    results.add(rows[1])
    assert path.read_bytes() == whole + b"b,x\n" and results_of(path).rows() == rows


def test_a_torn_header_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("name,te")
    results_of(path).add({"name": "a", "text": "x"})
    assert path.read_text() == "name,text\na,x\n"


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("name,old\na,x\n")
    with pytest.raises(ValueError, match="must be name, text, got name, old; move the file away"):
        results_of(path)
    assert path.read_text() == "name,old\na,x\n"
