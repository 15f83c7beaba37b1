"""Completions, divergences and recovered effect against straightforward computations, one prompt at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CASES, tiny
from models import tiny_gemma3, tiny_tokenizer
from tolerances import FORWARD, largest
from torch import Tensor

import thought_kernels as tk
from thought_kernels.evaluation.measures.answers import contains, exact, final_value, value_tokens
from thought_kernels.evaluation.measures.metrics import effect
from thought_kernels.evaluation.measures.trial import Trial, bare_texts, prompted_texts
from thought_kernels.evaluation.rivals.lora import losses
from thought_kernels.generation import logprobs as reading
from thought_kernels.generation.completions import Ending, complete
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.generation.prefix import sees_all

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<end_of_turn>")
PROMPTS = [[2, 7, 9], [2, 30, 31, 8, 40, 11, 12], [2, 9], [2, 25, 26, 27, 28]]
ANSWERS = [[11, 12, 13], [14], [15, 16], [17, 18, 19, 20]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Float32 log-probabilities, with sums taken in another order where rows are padded."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=FORWARD * largest(wanted))


def plain_logprobs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)


def plain_completion(model: Any, prompt: list[int], stops: list[int], limit: int) -> list[int]:
    written: list[int] = []
    while len(written) < limit and not (written and written[-1] in stops):
        written.append(int(model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_log_probabilities_do_not_depend_on_padding(model: Any, batch_size: int) -> None:
    found = list(completion_logprobs(model, PROMPTS, ANSWERS, batch_size=batch_size))
    for logprobs, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert logprobs.shape == (len(answer), len(TOKENIZER))
        assert_same(logprobs, plain_logprobs(model, prompt, answer))


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing_in_any_family(name: str) -> None:
    """Learned positions, for one, are a row's own, wherever padding moves it to."""
    model = tiny(name)
    found = list(completion_logprobs(model, PROMPTS, ANSWERS, batch_size=100))
    for logprobs, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert_same(logprobs, plain_logprobs(model, prompt, answer))


@pytest.mark.parametrize("name", CASES)
def test_a_long_beginning_that_rows_share_is_run_once(name: str) -> None:
    """Also behind a window that it does not fit in, where it is run with each row."""
    model, beginning = tiny(name), [2, *range(5, 28)]
    prompts = [[*beginning, *prompt[1:]] for prompt in PROMPTS]
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    found = list(completion_logprobs(model, prompts, ANSWERS, batch_size=100))
    handle.remove()
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, ANSWERS, strict=True))
    once = sees_all(model, longest)
    assert sum(lengths) == (longest if once else len(lengths) * longest)
    for logprobs, prompt, answer in zip(found, prompts, ANSWERS, strict=True):
        assert_same(logprobs, plain_logprobs(model, prompt, answer))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_lora_learns_from_padded_rows_what_it_would_from_each(name: str) -> None:
    model, teacher = tiny(name), tiny(name, seed=1)
    told = list(completion_logprobs(teacher, PROMPTS, ANSWERS, batch_size=1))
    rows: Any = SimpleNamespace(bare_prompts=PROMPTS, written=ANSWERS, prompted_logprobs=told)
    together = losses(model, rows, range(len(PROMPTS)))
    assert_same(together, torch.cat([losses(model, rows, [index]) for index in range(len(PROMPTS))]))
    assert together.min() > 0.01


def test_a_large_vocabulary_makes_batches_smaller(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    whole = list(completion_logprobs(model, PROMPTS, ANSWERS, batch_size=100))
    monkeypatch.setattr(reading, "MAX_LOGITS", 8 * len(TOKENIZER))
    split = list(completion_logprobs(model, PROMPTS, ANSWERS, batch_size=100))
    handle.remove()
    assert rows == [4, 2, 1, 1]  # 2 x (3 + 1) tokens; a third row would make 12, and the last two 2 x 5
    for one, other in zip(whole, split, strict=True):
        assert_same(one, other)


def test_padding_leaves_float64_models_alone() -> None:
    # Eager attention's softmax is taken in float32, where a float64 mask's minimum is an infinity.
    wide = tiny_gemma3(0, torch.float64, vocab_size=len(TOKENIZER))
    found = list(completion_logprobs(wide, PROMPTS, ANSWERS, batch_size=100))
    for logprobs, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert_same(logprobs, plain_logprobs(wide, prompt, answer))
    twice = [*PROMPTS, *PROMPTS]
    written = complete(wide, twice, ending=Ending((END,), "", TOKENIZER), max_new_tokens=3, batch_size=100)
    assert written == [plain_completion(wide, prompt, [END], 3) for prompt in twice]


def test_log_probabilities_need_one_answer_per_prompt(model: Any) -> None:
    with pytest.raises(ValueError, match="answers must be one per prompt, got 3 for 4"):
        next(completion_logprobs(model, PROMPTS, ANSWERS[:3], batch_size=2))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_completions_keep_the_order_and_stop_at_the_stop(model: Any, batch_size: int) -> None:
    free = [plain_completion(model, prompt, [], 6) for prompt in PROMPTS]
    stops = [free[0][2], END]  # a token that the first completion does write
    found = complete(
        model, PROMPTS, ending=Ending(tuple(stops), "", TOKENIZER), max_new_tokens=6, batch_size=batch_size
    )
    assert found == [plain_completion(model, prompt, stops, 6) for prompt in PROMPTS]
    assert len(found[0]) <= 3 and found[0][-1] == stops[0]


def test_divergence_is_the_sum_written_out() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]])
    (found,) = divergence([p.double().log()], [q.double().log()])
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.tolist() == pytest.approx([first, math.log(2)])


def test_effect_sums_tokens_not_examples() -> None:
    patched = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    bare = [torch.tensor([10.0, 20.0, 30.0]), torch.tensor([40.0])]
    whole = effect(patched, bare)
    assert (whole.patched, whole.bare, whole.tokens) == (10.0, 100.0, 4)
    assert whole.recovered == pytest.approx(0.9)
    part = effect(patched, bare, [slice(2, 3), slice(0, 0)])
    assert (part.patched, part.bare, part.tokens) == (3.0, 30.0, 1)
    assert math.isnan(effect([], []).recovered)
    with pytest.raises(ValueError, match="argument"):
        effect(patched, bare[:1])


@pytest.mark.parametrize(
    ("text", "answer", "question", "is_exact", "is_contained"),
    [
        (" 9 ", "9", "3 9 5", True, True),
        ("The largest of 3 9 5 is **9**.", "9", "3 9 5", False, True),
        ("3 9 5", "9", "3 9 5", False, False),
        ("It is 19.", "9", "3 9 5", False, False),
        ("It is 9.5", "9", "3 9 5", False, False),
        ("8 + 7 + 6 = 21", "8 + 7 + 6 = 21", "8 7 6", True, True),
        ("That makes 21!", "8 + 7 + 6 = 21", "8 7 6", False, True),
        ("8 + 7 + 6 = 121", "8 + 7 + 6 = 21", "8 7 6", False, False),
        ("1 2 3", "1 2 3", "1 2 3", True, True),
        ("", "9", "3 9 5", False, False),
    ],
)
def test_matches(text: str, answer: str, question: str, is_exact: bool, is_contained: bool) -> None:
    assert (exact(text, answer, question), contains(text, answer, question)) == (is_exact, is_contained)


def test_final_value() -> None:
    assert [final_value(text) for text in ("8 + 7 = 15", "a = b = c", " 3 4 ")] == ["15", "c", "3 4"]


@pytest.mark.parametrize(
    ("text", "value"), [("8 + 7 = 15", "15"), ("8+7=15", "15"), ("9", "9"), ("3 4 5", "3 4 5"), ("8 + 7 =", "=")]
)
def test_value_tokens_are_those_after_the_last_equals_sign(text: str, value: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    for answer in (ids, [*ids, END]):
        kept = answer[value_tokens(TOKENIZER, answer, [END])]
        assert TOKENIZER.decode(kept) == value
    assert value_tokens(TOKENIZER, [END], [END]) == slice(0, 1)


INSTRUCTION, QUESTIONS = "say it", ["a b", "c", "d e f"]


@pytest.fixture(scope="module")
def patch(model: Any) -> tk.ThoughtPatch:
    examples = [{"prompt": "q r", "completion": "s"}, {"prompt": "t", "completion": "u v"}]
    return tk.transmute(model, TOKENIZER, INSTRUCTION, examples)


def test_trial_is_the_computation_written_out(model: Any, patch: tk.ThoughtPatch) -> None:
    limit, stops = 5, [1, END]
    parts = [tk.align(TOKENIZER, INSTRUCTION, question) for question in QUESTIONS]
    told, bare = [h + i + e for h, i, e in parts], [h + e for h, _, e in parts]
    written = [plain_completion(model, prompt, stops, limit) for prompt in told]
    truth = [plain_logprobs(model, prompt, answer) for prompt, answer in zip(told, written, strict=True)]
    plain = [plain_logprobs(model, prompt, answer) for prompt, answer in zip(bare, written, strict=True)]
    with patch.applied(model):
        fitted = [plain_logprobs(model, prompt, answer) for prompt, answer in zip(bare, written, strict=True)]
        patched_answers = [plain_completion(model, prompt, stops, limit) for prompt in bare]
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in patched_answers]

    # The right answers are what the patched model says to two of the questions, so that there is something to count.
    trial = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, [*texts[:2], "no"], batch_size=2, max_new_tokens=limit)
    with patch.applied(model):
        score = trial.score(model)
        accuracy, answers = trial.answer(model)
    assert score.texts == answers == texts
    assert score.accuracy == accuracy == pytest.approx(2 / 3)
    assert trial.prompted_texts == [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in written]
    for found, other in ((score.effect.bare, plain), (score.effect.patched, fitted)):
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(truth, other, strict=True))
        assert found == pytest.approx(total, rel=1e-4)
    assert score.effect.tokens == sum(map(len, written))
    assert score.values.tokens <= score.effect.tokens


def test_an_unpatched_model_recovers_nothing_and_the_prompted_one_all(model: Any) -> None:
    trial = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, ["x"] * 3, max_new_tokens=4)
    score = trial.score(model)
    assert score.effect.recovered == pytest.approx(0.0, abs=1e-5)
    assert score.texts == trial.base_texts


def test_a_trial_says_which_answers_were_cut(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, None, max_new_tokens=4)
    assert cut.prompted_ended == cut.base_ended == cut.score(model).ended == [False] * 3
    monkeypatch.setattr(model.generation_config, "eos_token_id", cut.bare_written[0][3])  # the last one allowed
    trial = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, None, max_new_tokens=4)
    assert trial.base_ended[0] and len(trial.bare_written[0]) <= 4
    longer = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS[:1], None, max_new_tokens=1)
    assert longer.base_ended == [longer.bare_written[0][-1] == cut.bare_written[0][3]]
    assert trial.score(model).ended == trial.base_ended


def test_trials_share_what_the_bare_model_wrote(model: Any) -> None:
    known: dict[str, list[int]] = {}
    first = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS[:2], ["x"] * 2, max_new_tokens=4, known=known)
    assert list(known) == QUESTIONS[:2]
    known[QUESTIONS[0]] = TOKENIZER("zz", add_special_tokens=False).input_ids
    second = Trial(model, TOKENIZER, "another", QUESTIONS, ["x"] * 3, max_new_tokens=4, known=known)
    assert second.base_texts[:2] == ["zz", first.base_texts[1]]
    assert list(known) == QUESTIONS


def test_texts_are_those_of_a_trial(model: Any) -> None:
    trial = Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, ["x"] * 3, max_new_tokens=4, divergences=False)
    assert prompted_texts(model, TOKENIZER, INSTRUCTION, QUESTIONS, max_new_tokens=4) == trial.prompted_texts
    assert bare_texts(model, TOKENIZER, QUESTIONS, max_new_tokens=4) == trial.base_texts
    with pytest.raises(ValueError, match="divergences must have been asked for"):
        trial.score(model)


def test_a_trial_refuses_what_it_cannot_measure(model: Any) -> None:
    with pytest.raises(ValueError, match="questions must be at least one, with one answer each, got 3 and 2"):
        Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, ["x"] * 2)
    with pytest.raises(ValueError, match="got 0 and 0"):
        Trial(model, TOKENIZER, INSTRUCTION, [], [])
    with pytest.raises(ValueError, match="match must be one of exact, contains, got 'fuzzy'"):
        Trial(model, TOKENIZER, INSTRUCTION, QUESTIONS, ["x"] * 3, match="fuzzy")
