"""A patch at work through hooks: the right change at each site, and no trace once it is removed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3
from patches import ALL, ATTENTION, HIDDEN, MATRICES, hooks, random_patch, same_bits, token_ids, weights
from tolerances import FORWARD, allowed_error, largest
from torch import Tensor, nn

from thought_kernels.models import describe
from thought_kernels.models.norm import hooked
from thought_kernels.ops.gathered_low_rank import gathered
from thought_kernels.patches import site_hook
from thought_kernels.patches.apply import is_patched
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

# Theory §2: what the adapter's float64 path resolves.
EXACT = 1e-9


def by_hand(model: nn.Module, patch: ThoughtPatch) -> nn.Module:
    """The patched model made of changed weights and of constants added to the outputs of its modules."""

    def add(module: nn.Module, constant: Tensor) -> None:
        module.register_forward_hook(lambda _module, _args, output: output + constant)

    for (layer, site), entry in patch.entries.items():
        block = describe(model).blocks[layer]
        if site == "residual":
            add(block.layer, entry.vector)
            continue
        if site == "down":
            add(block.down_proj, entry.vector)
            block.down_proj.weight += entry.dense()
            continue
        for linear in (block.o_proj,) if site == "attention" else block.mlp_inputs:
            weight = linear.weight.detach().clone()
            add(linear, weight @ entry.vector)
            with torch.no_grad():
                linear.weight.copy_(weight @ (torch.eye(entry.output_width, dtype=weight.dtype) + entry.dense()))
    return model


@pytest.mark.parametrize("tokens", [(2, 12), (8, 24)], ids=["few", "many"])  # factors meet few in one operator
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("sites", [("attention",), ("mlp",), ("down",), ("residual",), ALL])
def test_each_site_is_changed_as_defined(sites: tuple[str, ...], rank: int | None, tokens: tuple[int, int]) -> None:
    patch = random_patch(sites=sites, rank=rank, dtype=torch.float64)
    model, ids = tiny_gemma3(dtype=torch.float64), token_ids(*tokens)
    expected = describe(by_hand(tiny_gemma3(dtype=torch.float64), patch)).forward(ids)
    bare = describe(model).forward(ids)
    with patch.applied(model):
        patched = describe(model).forward(ids)
    assert largest(patched - expected) <= EXACT * largest(expected)
    assert largest(bare - expected) > 1e-2 * largest(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_errs_no_more_than_twice_as_much_as_merged(dtype: torch.dtype) -> None:
    # So many logits that the largest of their errors is no matter of luck.
    patch, ids = random_patch(sites=MATRICES, vectors=False), token_ids(8, 24)
    model = tiny_gemma3(dtype=dtype)
    truth_model = tiny_gemma3(dtype=dtype).double()
    with torch.no_grad(), patch.applied(truth_model):
        truth = describe(truth_model).forward(ids)
    with torch.no_grad(), patch.merge_(model):
        merged = model(ids).logits
    with torch.no_grad(), patch.applied(model):
        applied = model(ids).logits
    assert applied.dtype == dtype
    condition = FORWARD * largest(truth) if dtype == torch.float32 else 0.0
    assert largest(applied.double() - truth) <= allowed_error(truth, merged, condition=condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_patches_change_few_tokens_as_they_change_many(dtype: torch.dtype) -> None:
    patch, ids = random_patch(sites=MATRICES, rank=3), token_ids(8, 24)
    model, exact = tiny_gemma3(dtype=dtype), tiny_gemma3(dtype=dtype).double()
    with torch.no_grad(), patch.applied(model), patch.applied(exact):
        together, few, truth = model(ids).logits, torch.cat([model(row[None]).logits for row in ids]), exact(ids).logits
    condition = FORWARD * largest(truth) if dtype == torch.float32 else 0.0
    assert largest(few.double() - truth) <= allowed_error(truth, together, condition=condition)


def test_low_rank_patches_meet_few_tokens_in_one_operator_with_their_factors_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch, model, ids = random_patch(sites=("down",), rank=3, layers=(0,)), tiny_gemma3(), token_ids(8, 24)
    calls = []
    monkeypatch.setattr(site_hook, "gathered", lambda *args: calls.append(len(args[0])) or gathered(*args))

    def read(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    with patch.applied(model):
        read(ids)
        assert calls == []
        before = read(ids[:2])
        assert calls == [2]
        patch.entries[0, "down"].factors[0].mul_(3)  # as an optimiser changes them
        few, many = read(ids[:2]), read(ids)[:2]
        assert calls == [2, 2] and largest(few - before) > 1e-3
        assert largest(few - many) <= FORWARD * largest(many)
        model.requires_grad_(True)
        model(ids[:1])
        assert calls == [2, 2]  # which has no gradient


def test_model_and_description_run_the_same_patched_model() -> None:
    patch, model, ids = random_patch(), tiny_gemma3(), token_ids()
    with torch.no_grad(), patch.applied(model):
        assert largest(model(ids).logits - describe(model).forward(ids)) <= FORWARD * largest(model(ids).logits)


def test_multimodal_models_are_patched_in_their_text_blocks() -> None:
    patch, model, ids = random_patch(), tiny_multimodal_gemma3(), token_ids()
    with torch.no_grad():
        bare = model(ids).logits
        with patch.applied(model):
            assert largest(model(ids).logits - bare) > 1e-2 * largest(bare)
        assert torch.equal(model(ids).logits, bare)


def test_generation_through_the_cache_sees_the_patch() -> None:
    patch, model, ids = random_patch(), tiny_gemma3(), token_ids(batch=1)
    with patch.applied(model):
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            greedy = model(generated[:, :-1]).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(generated[:, ids.shape[1] :], greedy)


def test_hooks_take_tuples_and_keyword_arguments() -> None:
    patch, model = random_patch(dtype=torch.float64), tiny_gemma3(dtype=torch.float64)
    block, x = describe(model).blocks[0], torch.randn(2, 3, 36, dtype=torch.float64)
    with patch.applied(model):
        output, rest = hooked(block.layer, (x,), (x, "cache"))
        assert torch.equal(output, x + patch.vector(0, "residual"))
        assert rest == "cache"
        assert torch.equal(block.mlp(x=x), block.mlp(x))
        named = block.o_proj(input=torch.ones(1, ATTENTION, dtype=torch.float64))
        assert torch.equal(named, block.o_proj(torch.ones(1, ATTENTION, dtype=torch.float64)))


def test_gradients_flow_through_a_patch() -> None:
    patch, model = random_patch(rank=2), tiny_gemma3()
    embedded = torch.randn(1, 4, 36, requires_grad=True)
    with patch.applied(model):
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.isfinite().all()
    assert embedded.grad.any()


def test_autocast_does_not_narrow_the_patch() -> None:
    entry = SitePatch(torch.eye(ATTENTION) * 2**-10)  # 1 + 2^-10 is 1 in bfloat16
    patch, model = ThoughtPatch({(0, "attention"): entry}), tiny_gemma3()
    seen = []
    describe(model).blocks[0].o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.ones(1, ATTENTION)
    with patch.applied(model), torch.autocast("cpu", dtype=torch.bfloat16):
        describe(model).blocks[0].o_proj(x)
    assert torch.equal(seen[0], x * (1 + 2**-10))


def test_compiled_code_notices_a_patch_that_comes_and_goes() -> None:
    """torch.compile's graphs have no guard on hooks: the patch would do nothing if they were kept."""
    patch, model = random_patch(sites=("mlp",), layers=(0,)), tiny_gemma3()
    mlp, u = model.model.layers[0].mlp, torch.randn(2, 3, HIDDEN)
    compiled = torch.compile(lambda x: mlp(x), backend="eager")
    with torch.no_grad():
        bare = compiled(u)
        with patch.applied(model):
            found, expected = compiled(u), mlp(u)
        assert torch.equal(found, expected) and not torch.equal(found, bare)
        assert torch.equal(compiled(u), bare)
    torch.compiler.reset()


def test_a_failing_run_leaves_the_model_as_it_was() -> None:
    model, ids = tiny_gemma3(), token_ids()
    before, bare = weights(model), model(ids).logits
    with pytest.raises(RuntimeError, match="inside"), random_patch().applied(model):
        raise RuntimeError("inside")
    assert hooks(model) == 0
    assert same_bits(model, before)
    assert torch.equal(model(ids).logits, bare)


def test_a_failing_application_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gemma3()

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr(describe(model).blocks[2].layer, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="no hook here"):
        random_patch().applied(model)
    assert hooks(model) == 0


def test_a_handle_can_be_removed_twice_and_not_entered_again() -> None:
    model, ids = tiny_gemma3(), token_ids()
    bare = model(ids).logits
    handle = random_patch().applied(model)
    assert not torch.equal(model(ids).logits, bare)
    handle.remove()
    handle.remove()
    assert torch.equal(model(ids).logits, bare)
    with pytest.raises(ValueError, match="handle must be active, got a removed one"), handle:
        pass


def test_a_patch_that_acts_already_is_told() -> None:
    model, patch, other = tiny_gemma3(), random_patch(), random_patch(seed=1)
    with patch.applied(model), other.applied(model):  # two different ones are nobody's mistake
        assert is_patched(model) and not is_patched(copy.deepcopy(model))
        with pytest.warns(UserWarning, match="applied: patch should act once, got one that acts"):
            patch.applied(model).remove()
    assert not is_patched(model)
    patch.applied(model).remove()


def test_patches_leave_in_any_order() -> None:
    model, ids = tiny_gemma3(), token_ids()
    patches = [random_patch(seed) for seed in range(3)]

    def logits_with(active: Iterable[int]) -> Tensor:
        handles = [patches[index].applied(model) for index in active]
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
        return logits

    expected = {subset: logits_with(subset) for size in range(3) for subset in itertools.combinations(range(3), size)}
    for order in itertools.permutations(range(3)):
        handles = [patch.applied(model) for patch in patches]
        active = [0, 1, 2]
        for index in order:
            handles[index].remove()
            active.remove(index)
            assert torch.equal(model(ids).logits, expected[tuple(active)]), (order, active)
    assert hooks(model) == 0


def test_patches_compose_as_their_merges_do() -> None:
    model, ids = tiny_gemma3(dtype=torch.float64), token_ids()
    first, second = (random_patch(seed, sites=MATRICES, vectors=False, dtype=torch.float64) for seed in range(2))
    with first.applied(model), second.applied(model):
        applied = describe(model).forward(ids)
    with second.applied(model), first.applied(model):
        reverse = describe(model).forward(ids)
    with first.merge_(model), second.merge_(model):
        merged = describe(model).forward(ids)
    assert largest(applied - merged) <= EXACT * largest(merged)
    assert largest(reverse - merged) > 1e-3 * largest(merged)


def _nan_patch() -> ThoughtPatch:
    patch = random_patch()
    patch.entries[2, "mlp"].matrix[0, 0] = torch.nan
    return patch


MISFITS: list[tuple[Callable[[], ThoughtPatch], str]] = [
    (lambda: random_patch(hidden=24), "patch must have the model's hidden size 36, got 24"),
    (lambda: random_patch(hidden=24, provenance={"model": "other"}), "got 24; it was made for other"),
    (lambda: random_patch(sites=("attention",), provenance={"hidden_size": 24}), "hidden size 36, got 24"),
    (lambda: random_patch(layers=(0, 3, 7)), r"blocks 0 to 2 only, got \[3, 7\], which the model lacks"),
    (
        lambda: random_patch(attention=48),
        r"width 40 at block 0, site 'attention', got 48; the model's hidden",
    ),
    (_nan_patch, "matrix must be finite, got NaN or an infinity; block 2, site 'mlp'"),
]


@pytest.mark.parametrize(("make", "message"), MISFITS)
@pytest.mark.parametrize("method", ["applied", "merge_"])
def test_a_patch_that_does_not_fit_touches_nothing(method: str, make: Callable[[], ThoughtPatch], message: str) -> None:
    model = tiny_gemma3()
    before = weights(model)
    with pytest.raises(ValueError, match=f"^{method}: .*{message}"):
        getattr(make(), method)(model)
    assert hooks(model) == 0
    assert same_bits(model, before)
