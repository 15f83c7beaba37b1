"""The rivals against their definitions, on tiny random models where the right answer is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny as family
from models import tiny_gemma3, tiny_tokenizer
from patches import same_bits, token_ids, weights
from tolerances import FORWARD, largest

from thought_kernels.evaluation.rivals import (
    function_vector,
    mean_difference,
    paper,
    principal_direction,
    probe_direction,
    rank_one,
    task_vector,
)
from thought_kernels.evaluation.rivals.choice import choose, spread
from thought_kernels.evaluation.rivals.lora import train_lora
from thought_kernels.evaluation.rivals.places import answer_places, prompt_end
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_means, answer_states
from thought_kernels.evaluation.rivals.steering import Steering
from thought_kernels.generation.completions import Ending, complete
from thought_kernels.generation.logprobs import completion_logprobs
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.prompts.prompt import Instruction, encode

TOKENIZER = tiny_tokenizer()
PAIRS = [("3 1 4", "8"), ("2 7 8", "17"), ("1 9", "10"), ("5 5 5 5", "20"), ("6 1", "7"), ("2 2 2", "6")]
SHOWN = [("1 2", "3"), ("4 4", "8"), ("7 2", "9")]
DEMONSTRATIONS = [
    {"role": role, "content": text} for pair in SHOWN for role, text in zip(("user", "assistant"), pair, strict=True)
]
FITS: dict[str, Callable[..., Any]] = {
    "mean difference": mean_difference.fit, "function vector": function_vector.fit, "task vector": task_vector.fit,
    "principal direction": principal_direction.fit, "probe direction": probe_direction.fit, "rank one": rank_one.fit,
    "paper": paper.fit,
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    return tiny_gemma3(vocab_size=len(TOKENIZER))


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_one, "TEXTS", 6)
    monkeypatch.setattr(rank_one, "TEXT_TOKENS", 10)


def rows_of(instruction: Instruction = "Sum them") -> Rows:
    examples = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    encoded = [encode(TOKENIZER, instruction, example) for example in examples]
    shuffled = function_vector.shuffled_prompts(
        encoded, instruction, lambda other: encode(TOKENIZER, other, examples[0])
    )
    return Rows.of(encoded, prompt_end(lambda text: encode(TOKENIZER, instruction, text)), shuffled)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=FORWARD * largest(wanted))


def states_of(model: Any, prompts: list[list[int]], answers: list[list[int]], block: int) -> list[torch.Tensor]:
    """The block's output at the positions that predict the answers, a row at a time."""
    return [
        model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True).hidden_states[block + 1][
            0, len(prompt) - 1 : -1
        ]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_rows_are_both_prompts_and_the_answer() -> None:
    rows = rows_of()
    for row, told, bare, answer in zip(rows.encoded, rows.prompts, rows.bare_prompts, rows.written, strict=True):
        assert [*told, *answer] == [*row.with_prefix, *row.tokens]
        assert [*bare, *answer] == [*row.without_prefix, *row.tokens]
        assert len(told) > len(bare) and answer
    assert len(rows.first(2)) == len(rows.first(2).encoded) == 2 and not rows.shuffled


def test_the_answer_starts_at_the_last_token_of_the_prompt(model: Any) -> None:
    rows = rows_of()
    assert TOKENIZER.decode(rows.suffix).endswith("<start_of_turn>model\n")
    assert all(tuple(prompt[-len(rows.suffix) :]) == rows.suffix for prompt in (*rows.prompts, *rows.bare_prompts))
    ids = torch.tensor([[3, 4, 9, 3, 4, 11, 12], [0, 6, 5, 3, 4, 3, 13]])
    with answer_places(model, [3, 4]) as places:
        cache = model(input_ids=ids).past_key_values
        assert places().answer.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]
        assert places().end.int().tolist() == [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
        model(ids[:, :1], past_key_values=cache)  # a step of cached generation
        assert places().answer.all() and not places().end.any()
        model(ids[:, 1:3], use_cache=True)  # what all prompts begin with
        assert not places().answer.any()
        model(ids[:, 1:3], use_cache=False)  # a text that is read
        assert places().answer.all() and not places().end.any()
    assert not model._forward_pre_hooks


def test_vectors_added_everywhere_are_a_patch_s(model: Any) -> None:
    ids, generator = token_ids(), torch.Generator().manual_seed(0)
    for site, width, heads in (("residual", 36, False), ("attention", 40, True)):
        vectors = {layer: torch.randn(width, generator=generator) for layer in (0, 2)}
        patch = ThoughtPatch({(layer, site): SitePatch(vector=2 * vector) for layer, vector in vectors.items()})
        with patch.applied(model):
            wanted = model(ids).logits
        with (2 * Steering(vectors, heads=heads)).applied(model):
            assert_close(model(ids).logits, wanted)
        plain, suffix = model(ids).logits, ids[0, 3:5].tolist()
        assert largest(wanted - plain) > 1e-3
        with Steering(vectors, suffix, heads=heads).applied(model):
            steered = model(ids[:1]).logits
        torch.testing.assert_close(steered[:, :4], plain[:1, :4])
        assert float((steered[:, 4] - plain[0, 4]).abs().max()) > 1e-3


def test_generation_is_steered_where_reading_is(model: Any) -> None:
    """Greedy answers behind a cached common prefix are what the steered model, read whole, finds likeliest."""
    rows = rows_of()
    steering = Steering({1: 3 * torch.randn(36, generator=torch.Generator().manual_seed(1))}, rows.suffix)
    with steering.applied(model):
        written = complete(
            model, rows.bare_prompts, ending=Ending((), "", TOKENIZER), max_new_tokens=4, batch_size=4
        )  # fmt: skip
        read = list(completion_logprobs(model, rows.bare_prompts, written, batch_size=4))
    assert [logprobs.argmax(-1).tolist() for logprobs in read] == written


def test_states_do_not_depend_on_padding(model: Any) -> None:
    rows = rows_of()
    found = answer_states(model, rows.prompts, rows.written, {1: describe(model).blocks[1].layer}, inside=False)
    for states, wanted in zip(found, states_of(model, rows.prompts, rows.written, 1), strict=True):
        assert_close(states[1], wanted)


def test_mean_differences_are_those_of_the_models_own_hidden_states(model: Any) -> None:
    rows = rows_of()
    found = mean_difference.mean_differences(model, rows)
    told, bare = (
        torch.cat(states_of(model, prompts, rows.written, 0)).mean(0) for prompts in (rows.prompts, rows.bare_prompts)
    )
    torch.testing.assert_close(found[0], told - bare, rtol=1e-4, atol=1e-5)


def test_principal_directions_are_the_first_singular_vectors(model: Any) -> None:
    rows = rows_of()
    direction, along = principal_direction.principal_directions(model, rows)[1]
    told, bare = (torch.cat(states_of(model, p, rows.written, 1)).double() for p in (rows.prompts, rows.bare_prompts))
    first = torch.linalg.svd(told - bare).Vh[0]
    assert abs(float(first @ direction.double())) == pytest.approx(1, abs=1e-6)
    assert along == pytest.approx(float((told - bare).mean(0) @ direction.double()), rel=1e-4) and along > 0


def test_a_task_vector_takes_the_state_s_place(model: Any) -> None:
    rows = rows_of().first(1)
    prompt, told = torch.tensor(rows.bare_prompts), torch.tensor(rows.prompts)
    plain, last = model(prompt).logits, len(describe(model).blocks) - 1
    modules = {last: describe(model).blocks[last].layer}
    own, other = (
        answer_means(model, prompts, rows.written, modules, inside=False, tokens=1)[last]
        for prompts in (rows.bare_prompts, rows.prompts)
    )
    with task_vector.Replaced(last, own, rows.suffix).applied(model):
        assert_close(model(prompt).logits, plain)
    with task_vector.Replaced(last, other, rows.suffix).applied(model):
        replaced = model(prompt).logits
    assert_close(replaced[:, :-1], plain[:, :-1])
    assert_close(replaced[:, -1], model(told).logits[:, -1])  # nothing but the head stands behind the last block
    with pytest.raises(ValueError, match="prompts must end alike"):
        task_vector.fit(model, rows, Rows.of(rows.encoded, ()))


def test_answers_change_places_and_nothing_else_does() -> None:
    assert function_vector.with_shuffled_answers("Sum them", random.Random(0)) is None
    assert function_vector.with_shuffled_answers(DEMONSTRATIONS[:2], random.Random(0)) is None
    rows = rows_of(DEMONSTRATIONS)
    assert len(rows.shuffled) == len(rows)
    assert any(shuffled != prompt for shuffled, prompt in zip(rows.shuffled, rows.prompts, strict=True))
    for shuffled, prompt, row in zip(rows.shuffled, rows.prompts, rows.encoded, strict=True):
        assert sorted(shuffled) == sorted(prompt)
        question = row.tokens[: row.answer_start]
        assert shuffled[-len(question) :] == question


@pytest.mark.parametrize("instruction", ["Sum them", DEMONSTRATIONS], ids=["told", "shown"])
def test_the_strongest_heads_are_those_of_brute_force(model: Any, instruction: Instruction) -> None:
    rows = rows_of(instruction)
    decoder = describe(model)
    modules = {block.index: block.o_proj for block in decoder.blocks}
    tokens = 1 if rows.shuffled else None
    means = answer_means(model, rows.prompts, rows.written, modules, inside=True, tokens=tokens)
    prompts, answers = rows.shuffled or rows.bare_prompts, [answer[:tokens] for answer in rows.written]

    def likely(changed: tuple[int, int] | None) -> float:
        """Whole prompts, one at a time, the head replaced from the last prompt token on."""
        total = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):

            def replace(module: Any, args: Any, start: int = len(prompt) - 1) -> Any:
                o = args[0].clone()
                part = slice(10 * changed[1], 10 * changed[1] + 10)
                o[:, start:, part] = means[changed[0]][part]
                return (o,)

            handle = modules[changed[0]].register_forward_pre_hook(replace) if changed else None
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.softmax(logits.double(), -1)[range(len(answer)), answer].sum())
            if handle:
                handle.remove()
        return total

    count, clean = sum(map(len, answers)), likely(None)
    wanted = {(block, head): (likely((block, head)) - clean) / count for block in range(3) for head in range(4)}
    found = function_vector.indirect_effects(model, rows, means)
    assert found.keys() == wanted.keys()
    assert all(found[head] == pytest.approx(wanted[head], abs=1e-6) for head in wanted)
    vector, chosen = function_vector.function_vector(model, rows)
    assert chosen == sorted(wanted, key=lambda head: -wanted[head])[:3]
    written = sum(function_vector._written_by(decoder, means, layer, head) for layer, head in chosen)
    assert_close(vector, written)


def test_heads_together_write_what_the_attention_writes(model: Any) -> None:
    decoder, rows = describe(model), rows_of()
    modules = {block.index: block.o_proj for block in decoder.blocks}
    means = answer_means(model, rows.prompts, rows.written, modules, inside=True)
    block = decoder.blocks[1]
    written = sum(function_vector._written_by(decoder, means, 1, head) for head in range(block.num_attention_heads))
    assert block.post_attention_norm is not None
    torch.testing.assert_close(written, block.post_attention_norm(block.o_proj(means[1])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "granite with biases", "pythia", "olmo2"])
def test_heads_together_write_what_the_attention_adds_to_the_stream(name: str) -> None:
    block = describe(family(name, dtype=torch.float64)).blocks[1]
    mean = torch.randn(block.attention_width, generator=torch.Generator().manual_seed(0))
    decoder = describe(family(name))
    written = sum(function_vector._written_by(decoder, {1: mean}, 1, head) for head in range(block.num_attention_heads))
    x = torch.zeros(1, 1, len(written), dtype=torch.float64)
    wanted = block.attention_residual(x, mean.double()[None, None])
    if block.post_attention_norm is None:
        wanted = wanted - block.attention_residual(x, torch.zeros_like(mean).double()[None, None])  # o_proj's bias
    torch.testing.assert_close(written.double(), wanted[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_probe_is_at_the_least_of_its_loss(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = size * (torch.randn(60, 5, generator=generator, dtype=torch.float64) + 1)
    labels = points[:, 0] + size * torch.randn(60, generator=generator, dtype=torch.float64) > size
    w, b = (tensor.requires_grad_() for tensor in probe_direction.logistic_weights(points, labels))
    signs = torch.where(labels, 1.0, -1.0)
    loss = 0.5 * w.square().sum() + torch.nn.functional.softplus(-signs * (points @ w + b)).sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert largest(gradient) < 1e-6 * size * len(points)


def test_probes_find_the_heads_that_tell_the_instruction(model: Any) -> None:
    rows = rows_of()
    found = probe_direction.probes(model, rows)
    assert len(found) == 12 and all(p.loss > 0 for p in found)
    assert found == sorted(found, key=lambda p: (-p.accuracy, p.loss))
    modules = {block.index: block.o_proj for block in describe(model).blocks}
    for probe in found[:2]:
        told, bare = (
            torch.cat([s[probe.layer] for s in answer_states(model, prompts, rows.written, modules, inside=True)])[
                :, 10 * probe.head : 10 * probe.head + 10
            ]
            for prompts in (rows.prompts, rows.bare_prompts)
        )
        for kind, direction in probe.directions.items():
            assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
            assert float((told.mean(0) - bare.mean(0)) @ direction) > 0
            assert probe.spreads[kind] == pytest.approx(float((torch.cat([told, bare]) @ direction).std()), rel=1e-3)
    kind = "probe weight"
    steering = probe_direction.intervention(model, found[:1], kind, 3.0, ())
    vector = torch.zeros(40)
    vector[10 * found[0].head : 10 * found[0].head + 10] = 3 * found[0].spreads[kind] * found[0].directions[kind]
    ids = token_ids()
    with ThoughtPatch({(found[0].layer, "attention"): SitePatch(vector=vector)}).applied(model):
        wanted = model(ids).logits
    with steering.applied(model):
        assert_close(model(ids).logits, wanted)


def test_an_edit_gives_the_key_its_value_and_leaves_others() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(200, 6, dtype=torch.float64, generator=generator)
    key, change = torch.randn(6, generator=generator), torch.randn(4, generator=generator)
    moment = keys.T @ keys / len(keys)
    matrix = rank_one.edit(moment, key, change).dense()
    assert matrix is not None and torch.linalg.matrix_rank(matrix) == 1
    torch.testing.assert_close(matrix @ key, change)
    # Of all matrices that do so it changes the text's outputs least: Σ ‖M k‖² grows along every other that keeps M k*.
    shifted = moment + rank_one.SHIFT * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    other = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    other -= torch.outer(other @ key.double(), key.double()) / key.double().square().sum()
    slope = torch.trace(matrix.double() @ shifted @ other.T)
    assert abs(float(slope)) < 1e-5 * float(matrix.norm() * shifted.norm() * other.norm())


def test_moments_are_those_of_what_the_projection_multiplies(model: Any) -> None:
    texts, block = rank_one.own_text(model, 2), describe(model).blocks[1]
    assert len(texts) == rank_one.TEXTS and len({tuple(text) for text in texts}) > 1
    assert all(text[0] == 2 and len(text) == 1 + rank_one.TEXT_TOKENS for text in texts)
    seen: list[torch.Tensor] = []
    handle = block.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, :-1].double()))
    for text in texts[:3]:
        model(torch.tensor([text]))
    handle.remove()
    keys = torch.cat(seen)
    found = rank_one.key_moments(model, texts[:3], [block])[1]
    assert_close(found, keys.T @ keys / len(keys))


def test_a_value_is_searched_for_and_nothing_else_learns(model: Any) -> None:
    rows, block = rows_of().read(model), describe(model).blocks[1]
    model.requires_grad_(True)
    change = rank_one.wanted_change(model, block, rows, rate=0.05)
    assert float(change.norm()) > 0 and all(p.requires_grad and p.grad is None for p in model.parameters())
    bare = rows.divergence(model)
    with rank_one._added(model, block, change, rows.suffix):
        assert rows.divergence(model) < bare


def test_the_least_divergence_is_chosen(model: Any) -> None:
    rows = rows_of().read(model)
    vectors = mean_difference.mean_differences(model, rows)
    candidates = [
        (f"{layer} {scale}", Steering({layer: scale * vectors[layer]}))
        for layer in range(3)
        for scale in (1.0, 0.5, 30.0)
    ]
    left = {}
    for name, candidate in candidates:
        with candidate.applied(model):
            left[name] = rows.divergence(model)
    broken = [("broken", Steering({0: torch.full((36,), torch.nan)}))]
    assert choose(model, rows, [*broken, *candidates[:5]]).settings == min(list(left)[:5], key=lambda name: left[name])
    found = choose(model, rows, [*broken, *candidates])  # more than finalists: first on a few rows
    assert left[found.settings] <= sorted(left.values())[2]
    with pytest.raises(ValueError, match="finite"):
        choose(model, rows, broken)
    assert spread(30) == [1, 5, 9, 13, 16, 20, 24, 28] and spread(3) == [0, 1, 2]


@pytest.mark.parametrize("name", list(FITS))
def test_a_rival_leaves_the_model_as_it_was(model: Any, name: str) -> None:
    before, rows = weights(model), rows_of(DEMONSTRATIONS).read(model)
    bare = rows.divergence(model)
    found = FITS[name](model, rows, rows)
    assert found.settings and found.choosing >= 0
    with found.change.applied(model):
        changed = rows.divergence(model)
    if name != "rank one":  # whose best may be no change
        assert changed != bare
    assert same_bits(model, before) and rows.divergence(model) == bare


@pytest.mark.parametrize("rival", ["mean difference", "probe", "LoRA"])
def test_a_rival_does_not_depend_on_the_mode_that_the_model_was_left_in(rival: str) -> None:
    def made(wild: bool) -> dict[Any, torch.Tensor]:
        model = tiny_gemma3(vocab_size=len(TOKENIZER), attention_dropout=0.5)
        rows = rows_of().read(model)
        model.train(wild)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wild):
            if rival == "mean difference":
                return dict(mean_difference.mean_differences(model, rows))
            if rival == "probe":
                return {p[:2]: p.directions["mass mean shift"] for p in probe_direction.probes(model, rows)}
            generator = torch.Generator().manual_seed(0)
            return train_lora(model, rows, steps=2, rate=1e-2, generator=generator).state

    calm, wild = made(False), made(True)
    assert calm.keys() == wild.keys() and all(torch.equal(calm[key], wild[key]) for key in calm)


def test_a_lora_learns_and_leaves_the_model_as_it_was(model: Any) -> None:
    before, flags, names = weights(model), [p.requires_grad for p in model.parameters()], set(vars(model))
    kinds = [type(module) for module in model.modules()]
    rows = rows_of().read(model)
    bare = rows.divergence(model)
    trained = train_lora(model, rows, steps=12, rate=1e-2, generator=torch.Generator().manual_seed(0))
    assert trained.divergence < 0.8 * bare
    with trained.applied(model):
        assert rows.divergence(model) == pytest.approx(trained.divergence, rel=1e-3)
    assert same_bits(model, before) and [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) == names and [type(module) for module in model.modules()] == kinds


def test_mixtures_of_experts_have_no_projection_to_edit() -> None:
    with pytest.raises(ValueError, match="mixtures of experts"):
        rank_one.fit(family("mixtral"), rows_of(), rows_of())
