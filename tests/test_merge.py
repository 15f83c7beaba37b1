"""A patch in the weights: the right weights, exact undoing, and refusals that leave the model alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_gemma3
from patches import ATTENTION, MATRICES, random_patch, same_bits, token_ids, weights
from tolerances import FLOORS, largest
from torch import nn

from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch

# Theory §2: what the adapter's float64 path resolves.
EXACT = 1e-9


def matrix_patch(seed: int = 0, **options: Any) -> ThoughtPatch:
    return random_patch(seed, **{"sites": MATRICES, "vectors": False, **options})


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once_and_come_back_bit_for_bit(dtype: torch.dtype, rank: int | None) -> None:
    model, patch = tiny_gemma3(dtype=dtype), matrix_patch(rank=rank)
    before = weights(model)
    handle = patch.merge_(model, backup_device="cpu" if rank else None)
    changed = set()
    for name, weight in weights(model).items():
        if torch.equal(weight, before[name]):
            continue
        changed.add(name)
        site = next((site for part, site in (("o_proj", "attention"), ("down_proj", "down")) if part in name), "mlp")
        old, delta = before[name].double(), patch.to(dtype=torch.float64).matrix(int(name.split(".")[2]), site)
        expected = old + (delta if site == "down" else old @ delta)
        assert largest(weight.double() - expected) <= FLOORS[dtype] * largest(expected)
        # Rounded once: where no number of this dtype is nearer, or nearly so, whatever the order of the sums was.
        assert (weight == expected.to(dtype)).double().mean() > 0.99
    parts = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{layer}.{part}.weight" for layer in (0, 2) for part in parts}
    handle.undo()
    assert same_bits(model, before)
    handle.undo()
    assert same_bits(model, before)


def test_a_failing_run_gives_the_weights_back() -> None:
    model = tiny_gemma3()
    before = weights(model)
    with pytest.raises(RuntimeError, match="inside"), matrix_patch().merge_(model):
        assert not same_bits(model, before)
        raise RuntimeError("inside")
    assert same_bits(model, before)


def test_a_merge_that_overflows_is_taken_back() -> None:
    model = tiny_gemma3(dtype=torch.float16)
    before = weights(model)
    with pytest.raises(ValueError, match=r"patch must fit into torch.float16, got an overflow"):
        (matrix_patch(layers=(0,)) + matrix_patch(layers=(2,)) * 1e6).merge_(model)
    assert same_bits(model, before)


def test_merges_are_undone_latest_first() -> None:
    model = tiny_gemma3(dtype=torch.bfloat16)
    before = weights(model)
    first = matrix_patch(1).merge_(model)
    between = weights(model)
    second = matrix_patch(2, layers=(2,)).merge_(model)
    both = weights(model)
    with pytest.raises(ValueError, match="weights must be as merge_ left them, got other values; undo later merges"):
        first.undo()
    assert same_bits(model, both)
    second.undo()
    assert same_bits(model, between)
    first.undo()
    assert same_bits(model, before)


def test_undo_refuses_weights_that_something_else_changed() -> None:
    model = tiny_gemma3()
    handle = matrix_patch().merge_(model)
    weight = describe(model).blocks[0].o_proj.weight
    kept = weight[0, 0].clone()
    weight[0, 0] += 1
    with pytest.raises(ValueError, match="got other values"):
        handle.undo()
    weight[0, 0] = kept
    handle.undo()
    other = matrix_patch().merge_(model)
    model.bfloat16()
    with pytest.raises(ValueError, match="got other values"):
        other.undo()


@pytest.mark.parametrize("how", ["assign", "weight", "module"])
def test_undo_refuses_parameters_that_were_replaced(how: str) -> None:
    model = tiny_gemma3()
    before = weights(model)
    handle = matrix_patch().merge_(model)
    attention = describe(model).blocks[2].layer.self_attn
    merged, module = attention.o_proj.weight, attention.o_proj
    if how == "assign":
        replaced = r"model\.layers\.0\.self_attn\.o_proj\.weight"
        parameters = dict(model.named_parameters())
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    elif how == "weight":
        replaced = r"model\.layers\.2\.self_attn\.o_proj\.weight"
        attention.o_proj.weight = nn.Parameter(merged.detach().clone())
    else:
        replaced = r"model\.layers\.2\.self_attn\.o_proj\.weight"
        attention.o_proj = nn.Linear(*reversed(merged.shape), bias=False)
    after = weights(model)
    with pytest.raises(ValueError, match=f"^undo: weights must be the parameters that merge_ wrote, .* at {replaced}"):
        handle.undo()
    assert same_bits(model, after)
    if how == "assign":
        for name, parameter in parameters.items():
            owner, _, part = name.rpartition(".")
            setattr(model.get_submodule(owner), part, parameter)
    attention.o_proj = module
    attention.o_proj.weight = merged
    handle.undo()  # the originals were kept
    assert same_bits(model, before)


def test_a_failing_undo_does_not_hide_why_the_body_failed() -> None:
    model = tiny_gemma3()
    with pytest.raises(RuntimeError, match="inside") as caught, matrix_patch().merge_(model):
        describe(model).blocks[0].o_proj.weight[0, 0] += 1
        raise RuntimeError("inside")
    assert any("undo: weights must be as merge_ left them" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="weights must be as merge_ left them"), matrix_patch().merge_(model):
        describe(model).blocks[0].o_proj.weight[0, 0] += 1


def test_a_model_that_was_not_finite_is_not_blamed_on_the_patch() -> None:
    model = tiny_gemma3()
    describe(model).blocks[2].o_proj.weight[0, 0] = float("inf")
    before = weights(model)
    finite = r"model\.layers\.2\.self_attn\.o_proj\.weight must be finite, got NaN or an infinity before the patch"
    with pytest.raises(ValueError, match=f"^merge_: {finite}"):
        matrix_patch().merge_(model)
    assert same_bits(model, before)


def test_vectors_become_biases_where_there_are_any() -> None:
    model, ids = tiny_gemma3(dtype=torch.float64, attention_bias=True), token_ids()
    patch = random_patch(sites=("attention",), dtype=torch.float64)
    before = weights(model)
    with patch.applied(model):
        applied = describe(model).forward(ids)
    with patch.merge_(model) as handle:
        merged = describe(model).forward(ids)
    assert handle.fold_residuals == {}
    assert largest(merged - applied) <= EXACT * largest(applied)
    assert same_bits(model, before)
    only_vector = ThoughtPatch({(1, "attention"): SitePatch(vector=torch.ones(ATTENTION))})
    with only_vector.merge_(model):
        assert torch.equal(describe(model).blocks[1].o_proj.weight, before["model.layers.1.self_attn.o_proj.weight"])
        assert not same_bits(model, before)
    assert same_bits(model, before)


def test_vectors_without_a_bias_are_folded_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    model, patch = tiny_gemma3(dtype=torch.float64), random_patch(sites=MATRICES, dtype=torch.float64)
    before = weights(model)
    with pytest.raises(ValueError, match="no vector where the modules have no bias, got a nonzero one; block 0"):
        patch.merge_(model)
    assert same_bits(model, before)
    with caplog.at_level(logging.WARNING):
        handle = patch.merge_(model, fold=True)
    assert handle.fold_residuals == dict.fromkeys(patch.entries, 0.1)
    assert "block 2, site 'mlp': vector folded into the matrix, relative squared error 0.1" in caplog.text
    entry, block = patch.entries[0, "attention"], describe(model).blocks[0]
    weight = before["model.layers.0.self_attn.o_proj.weight"]
    mean = entry.activation_mean  # where the activation is its mean, folding is exact
    expected = weight @ (mean + entry.matrix @ mean + entry.vector)
    assert largest(block.o_proj(mean) - expected) <= EXACT * largest(expected)
    handle.undo()
    assert same_bits(model, before)


def test_what_no_weight_can_hold_is_refused() -> None:
    model = tiny_gemma3()
    before = weights(model)
    with pytest.raises(ValueError, match="no residual vector, got a nonzero one; block 2.*use applied"):
        (matrix_patch() + random_patch(layers=(2,), sites=("residual",))).merge_(model, fold=True)
    unknown_mean = ThoughtPatch({(0, "mlp"): SitePatch(vector=torch.ones(36))})
    with pytest.raises(ValueError, match="must know its mean activation to fold a vector, got none; block 0"):
        unknown_mean.merge_(model, fold=True)
    assert same_bits(model, before)
    zero = matrix_patch() + 0 * random_patch(layers=(2,), sites=("residual",))
    with zero.merge_(model), matrix_patch().merge_(tiny_gemma3()):
        assert not same_bits(model, before)
    assert same_bits(model, before)


class _Wrapper(nn.Module):
    """As an adapter library leaves a linear module: callable like it, without being it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class _Subclass(torch.Tensor):
    """As torchao keeps quantised weights: a tensor that says it is floating point."""


def _parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: setattr(m.o_proj, "weight", _parameter(m.o_proj.weight.to(torch.int8))), "Tensor of torch.int8"),
        (lambda m: setattr(m.o_proj, "weight", _parameter(m.o_proj.weight.to(torch.float8_e4m3fn))), "float8_e4m3fn"),
        (lambda m: setattr(m.o_proj, "weight", _parameter(m.o_proj.weight.as_subclass(_Subclass))), "_Subclass of"),
        (lambda m: setattr(m.o_proj, "weight", _parameter(m.o_proj.weight.to("meta"))), "on meta"),
        (lambda m: setattr(m, "o_proj", _Wrapper(m.o_proj)), "o_proj must be a torch.nn.Linear, got .*_Wrapper"),
    ],
)
def test_only_plain_weights_are_written(spoil: Callable[[Any], None], message: str) -> None:
    model = tiny_gemma3()
    spoil(describe(model).blocks[2].layer.self_attn)
    block = describe(model).blocks[0]
    linears = (block.o_proj, *block.mlp_inputs)
    before = [linear.weight.clone() for linear in linears]
    with pytest.raises(ValueError, match=f"{message}.*block 2.*use applied"):
        matrix_patch().merge_(model)
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, before, strict=True))


def test_shared_weights_are_not_written() -> None:
    model = tiny_gemma3()
    blocks = describe(model).blocks
    blocks[1].layer.mlp.gate_proj.weight = blocks[0].mlp_inputs[0].weight  # one parameter in two blocks
    before = weights(model)
    with pytest.raises(ValueError, match=r"must not be shared, got .*layers.0.mlp.gate_proj.weight and .*layers.1.mlp"):
        matrix_patch().merge_(model)
    assert same_bits(model, before)
    with matrix_patch(layers=(2,)).merge_(model):  # sharing elsewhere, tied embeddings included, does not matter
        assert not same_bits(model, before)

    model = tiny_gemma3()
    mlp = describe(model).blocks[0].layer.mlp
    fused = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    mlp.gate_proj.weight, mlp.up_proj.weight = (_parameter(part) for part in fused.chunk(2))
    before = weights(model)
    with matrix_patch().merge_(model):  # two halves of one buffer do not overlap
        assert not same_bits(model, before)
    assert same_bits(model, before)
    mlp.up_proj.weight = _parameter(fused[1 : 1 + mlp.up_proj.weight.shape[0]])
    with pytest.raises(ValueError, match="must not be shared"):
        matrix_patch().merge_(model)


def test_a_second_merge_of_the_same_patch_is_told_and_others_are_not(recwarn: pytest.WarningsRecorder) -> None:
    model, patch = tiny_gemma3(), matrix_patch()
    patch.merge_(model).undo()
    patch.merge_(model)
    matrix_patch(1, layers=(1,)).merge_(model)  # another patch, elsewhere
    patch.merge_(tiny_gemma3(1))
    assert not recwarn.list
    again = matrix_patch()  # the same numbers, as when a folder is loaded anew
    with pytest.warns(UserWarning, match="merge_: patch should be merged once, got one that is in these") as told:
        second = again.merge_(model)
    assert told[0].filename == __file__
    second.undo()
    with pytest.warns(UserWarning, match="merge_: patch should be merged once"):
        again.merge_(model).undo()
    model.load_state_dict(tiny_gemma3().state_dict())
    recwarn.clear()
    patch.merge_(model)  # into weights as they were before the first
    assert not recwarn.list
