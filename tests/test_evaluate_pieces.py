"""The pieces of the report against their definitions: intervals, scorers, refits."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from patches import random_patch

import thought_kernels as tk
from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.evaluation import resume
from thought_kernels.evaluation.measures.intervals import mean_interval, recovered_interval, share_interval
from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.measures.scorers import Each, Judge, ScorerError, as_scorer
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.pages.page import number
from thought_kernels.evaluation.records import digests
from thought_kernels.evaluation.rivals.refit import MeanDifferences, Shuffled, known_recipe, split
from thought_kernels.evaluation.sections.controls import randomised
from thought_kernels.evaluation.sections.subject import Inputs, Subject, Tolerant
from thought_kernels.evaluation.settings import warnings_of
from thought_kernels.prompts.prompt import load_examples

TOKENIZER = tiny_tokenizer()
INSTRUCTION, QUESTIONS = "Sum them", ["3 1 4", "2 7 8", "1 9", "5 5 5 5"]


@pytest.fixture
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


def subject(model: Any, **recipe: Any) -> Subject:
    examples = load_examples(QUESTIONS)
    return Subject(
        model=model, tokenizer=TOKENIZER, instruction=INSTRUCTION, given_patch=None, recipe=tk.Recipe(**recipe),
        examples=examples, pool=examples, held_out=Inputs(examples, None), paraphrases=[], others={}, outside=None,
        longer=None, unrelated=examples, scorer=Tolerant(as_scorer("exact")), separator="\n", without=None, format=None,
        seed=0, sweep_inputs=2, lora_steps=2, batch_size=8, max_new_tokens=4,
    )  # fmt: skip


def test_fingerprints_do_not_depend_on_the_number_of_threads(model: Any) -> None:
    # A sum over so many numbers is split among torch's threads, and rounds otherwise.
    layer, threads, found = torch.nn.Linear(1024, 1024, bias=False), torch.get_num_threads(), set()
    whole = replace(subject(model), model=layer, given_patch=random_patch(sites=["mlp"]))
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add((digests.fingerprint(layer), resume.fingerprint(whole, {})))
    finally:
        torch.set_num_threads(threads)
    (of_model, of_subject) = found.pop()
    assert not found
    patched = replace(whole, given_patch=random_patch(sites=["mlp"], seed=1))
    assert resume.fingerprint(patched, {}) != of_subject
    with torch.no_grad():
        layer.weight[5, 7] *= 1 + 2**-22
    assert digests.fingerprint(layer) != of_model and resume.fingerprint(whole, {}) != of_subject


def test_inputs_that_begin_with_the_instruction_are_told(model: Any) -> None:
    found = replace(subject(model), held_out=Inputs(load_examples(["3 1", "Sum them 2 7", "Sum them. 1 9"]), None))
    assert warnings_of(found)[-2].startswith("2 of 3 held-out inputs begin with the instruction: what is called bare")
    assert not any("begin with" in sentence for sentence in warnings_of(subject(model)))


@pytest.mark.filterwarnings("ignore:transmute. .* completions did not end")
def test_a_patch_is_fitted_again_from_the_completions_that_it_was_fitted_on(model: Any) -> None:
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, QUESTIONS, max_new_tokens=2)
    assert patch.provenance["max_new_tokens"] == 2
    whole = replace(subject(model), given_patch=patch)  # whose own answers are longer
    again = whole.refit(known_recipe(whole.patch))
    for layer in patch.layers:
        found, wanted = (one.matrix(layer, "attention") for one in (again, patch))
        assert torch.linalg.vector_norm(found - wanted) <= 1e-4 * torch.linalg.vector_norm(wanted)
    other = whole.fit("Turn them", whole.examples)
    assert other.provenance["max_new_tokens"] == 2


def test_an_interval_has_the_width_of_the_normal_approximation() -> None:
    n, p = 900, 0.3
    grades = [float(i < n * p) for i in range(n)]
    found = mean_interval(grades, seed=1)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert found.value == pytest.approx(p)
    assert found.high - p == pytest.approx(half, rel=0.1) and p - found.low == pytest.approx(half, rel=0.1)
    assert found == mean_interval(grades, seed=1) != mean_interval(grades, seed=2)


def test_an_interval_does_not_collapse_where_all_inputs_agree() -> None:
    n = 60
    assert mean_interval([1.0] * n, seed=0) == (1.0, pytest.approx(0.025 ** (1 / n)), 1.0)
    assert mean_interval([0.0] * n, seed=0) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / n)))
    assert mean_interval([0.5] * n, seed=0) == (0.5, 0.5, 0.5)


def test_a_shares_interval_holds_the_shares_that_it_is_no_surprise_under() -> None:
    for p, n in ((0.0, 16), (0.25, 16), (0.5, 32), (1.0, 24)):
        value, low, high = share_interval(p, n)
        assert value == p and 0 <= low <= p <= high <= 1
        for end in {low, high} - {0.0, 1.0}:  # a share that lies 1.96 of its own deviations from what was found
            assert abs(p - end) == pytest.approx(1.95996 * math.sqrt(end * (1 - end) / n), rel=1e-4)
    assert share_interval(0.75, 16, level=0.5).low > share_interval(0.75, 16).low
    for share, count in ((1.01, 4), (-0.1, 4), (0.5, 0)):
        with pytest.raises(ValueError, match="share must be from 0 to 1 of at least one input"):
            share_interval(share, count)


def test_the_recovered_effect_resamples_both_sums_together() -> None:
    rng = np.random.default_rng(0)
    bare = rng.exponential(size=50)
    found = recovered_interval(0.1 * bare, bare, seed=0)  # the ratio is the same for every input, so for every draw
    assert found == pytest.approx((0.9, 0.9, 0.9))
    noisy = recovered_interval(rng.exponential(size=50), bare, seed=0)
    assert noisy.low < noisy.value < noisy.high
    assert all(math.isnan(number) for number in recovered_interval([0.0], [0.0], seed=0))
    with pytest.raises(ValueError, match="must be of the same inputs, got 1 and 2"):
        recovered_interval([0.0], [0.0, 1.0], seed=0)


def longer_is_better(text: str, answer: str, question: str) -> float:
    return min(len(text) / len(answer), 1.0)


@pytest.mark.parametrize(
    ("spec", "text", "grade"),
    [
        ("exact", " 12 ", 1.0),
        ("contains", "it is 12.", 1.0),
        ("regex:^{answer}$", "12", 1.0),
        ("regex:^{answer}$", "112", 0.0),
        ("regex:x{2}", "xx", 1.0),  # braces of the pattern are its own
        (f"{__name__}:longer_is_better", "1", 0.5),
        (longer_is_better, "123", 1.0),
    ],
)
def test_scorers(spec: Any, text: str, grade: float) -> None:
    assert as_scorer(spec)([text], ["12"], ["5 7"]) == [grade]


def test_a_regex_takes_the_answer_literally() -> None:
    assert as_scorer("regex:^{answer}$")(["1+1", "111"], ["1+1", "1+1"], ["", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("fuzzy", "must be one of exact, contains, regex:PATTERN or module:function, got 'fuzzy'"),
        ("regex:(", "must be a regular expression"),
        ("nowhere:f", "must name a module and its function, got 'nowhere:f'"),
        ("math:pi", "must name a function, got 'math:pi'"),
        ("judge:x", "Judge"),
    ],
)
def test_bad_scorers_are_refused(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        as_scorer(spec)
    with pytest.raises(TypeError, match="scorer must be a name, a function or a scorer, got int"):
        as_scorer(3)


@pytest.mark.parametrize("function", [lambda *_: 1 / 0, lambda *_: float("nan"), lambda *_: 2, lambda *_: None])
def test_a_scorer_that_fails_says_on_which_answer(function: Any) -> None:
    with pytest.raises(ScorerError, match="must return a number from 0 to 1 for every answer, got .*text 'four'"):
        Each("mine", function)(["four"], ["4"], ["2 2"])


def test_a_judge_compares_yes_with_no(model: Any) -> None:
    judge = Judge(model, TOKENIZER, "Sum {question}", prompt="{instruction}|{question}|{answer}|{text}")
    grades = judge(["{answer}", "7", "long text"], ["4", "7", "9"], ["2 2", "3 4", "4 5"])
    turns = [{"role": "user", "content": "Sum {question}|2 2|4|{answer}"}]  # values are never filled in themselves
    ids = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    likely = []
    for reply in ("Yes", "No"):
        answer = TOKENIZER(reply, add_special_tokens=False)["input_ids"]
        logprobs = torch.log_softmax(model(torch.tensor([[*ids, *answer]])).logits[0].double(), -1)
        likely.append(sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(answer)))
    assert grades[0] == float(likely[0] > likely[1])
    assert set(grades) <= {0.0, 1.0} and grades == judge(
        ["{answer}", "7", "long text"], ["4", "7", "9"], ["2 2", "3 4", "4 5"]
    )
    with pytest.raises(ValueError, match="must have a place for the answer"):
        Judge(model, TOKENIZER, prompt="no place")


def test_a_trial_without_answers_is_graded_by_agreement(model: Any) -> None:
    trial = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, None, max_new_tokens=4)
    assert trial.prompted == 1.0 and trial.answers == trial.prompted_texts
    assert trial.answer_prompted(model) == trial.prompted_texts
    part = trial.first(2)
    assert len(part) == 2 and part.base == sum(trial.base_grades[:2]) / 2
    with random_patch(sites=("mlp",)).applied(model):
        whole, few = trial.score(model), part.score(model)
    assert few.texts == whole.texts[:2] and few.effect.tokens == sum(map(len, trial.written[:2]))
    for ours, theirs in zip(few.divergences, whole.divergences[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "recipe", [{}, *({"pairing": name, "header_weight": 0.2} for name in ("two_pass", "layerwise"))]
)
def test_a_refit_with_nothing_changed_is_the_patch_itself(model: Any, recipe: dict[str, Any]) -> None:
    found = subject(model, ridge=0.3, **recipe)
    again = found.refit(known_recipe(found.patch))
    assert again.entries.keys() == found.patch.entries.keys()
    for key, entry in found.patch.entries.items():
        torch.testing.assert_close(again.entries[key].dense(), entry.dense(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
def test_a_refit_in_sequence_holds_one_block_s_sums(model: Any, pairing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = subject(model, ridge=0.3, pairing=pairing)
    accumulator, most = ThoughtAccumulator(), set()
    update = accumulator.update

    def watched(*args: Any) -> None:
        update(*args)
        most.add(len(accumulator._sums))

    monkeypatch.setattr(accumulator, "update", watched)
    patch = found.refit(known_recipe(found.patch), accumulator=accumulator)
    assert max(most) == (1 if pairing == "sequential" else len(patch.entries))
    assert accumulator.layers == (() if pairing == "sequential" else patch.layers)


def test_mean_differences_of_rows_need_no_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    delta, activation = (torch.randn(40, d, dtype=torch.float64, generator=generator) + 1 for d in (6, 90))
    weights = torch.rand(40, dtype=torch.float64, generator=generator)
    accumulator = MeanDifferences(dtype=torch.float64)
    for rows in (slice(0, 7), slice(7, 40)):
        accumulator.update(0, "down", delta[rows], activation[rows], weights[rows])
    sums = accumulator.sums(0, "down")
    assert sums is not None and set(sums.tensors()) == {"delta_sum", "moments"}
    entry = accumulator.solve("exact").entries[0, "down"]
    assert entry.dense() is None
    torch.testing.assert_close(entry.vector, weights @ delta / weights.sum())


def test_shuffling_keeps_what_the_rows_are_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, activation = (torch.randn(3, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    kept = torch.ones(3, 5, dtype=torch.float64)
    kept[1, 3:] = 0
    delta[1, 3:] = float("nan")  # padding must not get into the permutation
    plain, shuffled = ThoughtAccumulator(dtype=torch.float64), Shuffled(generator, dtype=torch.float64)
    for sums in (plain, shuffled):
        sums.update(0, "mlp", delta, activation, kept)
    ours, theirs = shuffled.sums(0, "mlp"), plain.sums(0, "mlp")
    assert ours is not None and theirs is not None
    for name in ("gram", "delta_sum", "activation_sum", "moments"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert ours.cross is not None and theirs.cross is not None
    assert float((ours.cross - theirs.cross).norm()) > 0.1 * float(theirs.cross.norm())


def test_a_patch_is_taken_apart() -> None:
    patch = random_patch()
    matrices, vectors = split(patch, part="matrix"), split(patch, part="vector")
    assert matrices is not None and vectors is not None
    assert not any(entry.vector is not None for entry in matrices.entries.values())
    assert not any(entry.dense() is not None for entry in vectors.entries.values())
    both = matrices + vectors
    for layer, site in patch.entries:
        for part in ("matrix", "vector"):
            ours, theirs = getattr(both, part)(layer, site), getattr(patch, part)(layer, site)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    only = split(patch, part="both", sites=["mlp"])
    assert only is not None and only.sites == ("mlp",)
    assert split(random_patch(vectors=False, sites=("mlp",)), part="vector") is None


def test_a_random_control_has_the_patch_s_spectrum_and_other_directions() -> None:
    patch = random_patch(rank=3)
    control = randomised(patch, torch.Generator().manual_seed(0))
    for key, entry in patch.entries.items():
        other = control.entries[key]
        if entry.dense() is not None:
            ours, theirs = other.dense(), entry.dense()
            assert ours is not None and theirs is not None
            torch.testing.assert_close(torch.linalg.svdvals(ours), torch.linalg.svdvals(theirs), rtol=1e-4, atol=1e-5)
            assert abs(float((ours * theirs).sum())) < 0.5 * float(theirs.norm()) ** 2
        if entry.vector is not None:
            assert other.vector is not None
            torch.testing.assert_close(other.vector.norm(), entry.vector.norm())


def test_a_span_knows_the_peaks_of_spans_within_it() -> None:
    device = torch.device("cpu")
    with MemoryPeak(device) as whole:
        with MemoryPeak(device) as large:
            torch.ones(64 << 18)  # 64 MiB, freed at once
        with MemoryPeak(device) as small:
            torch.ones(1)
    with MemoryPeak(device) as own:
        torch.ones(64 << 18)  # before the span within it, which starts the mark anew
        with MemoryPeak(device) as later:
            torch.ones(1)
    assert whole.host_mib >= large.host_mib
    if os.access("/proc/self/clear_refs", os.W_OK):  # else peaks are those since the process started
        assert small.host_mib < large.host_mib - 32
        assert later.host_mib < own.host_mib - 32


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (2136.4, "2,136"), (12_345_678.0, "1.2e+07"), (999.4, "999"), (45.67, "45.7"), (0.98765, "0.9877"),
        (-1500.0, "-1,500"), (0.00012, "1.2e-04"),
    ],
)  # fmt: skip
def test_numbers_are_shown_as_people_write_them(value: float, shown: str) -> None:
    assert number(value) == shown
