"""The arithmetic of blocks and what is described, on tiny random Gemma 3 models of many shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LINEAR_ROPE, YARN_ROPE, tiny_gemma3, tiny_multimodal_gemma3, tiny_text_config
from patches import random_patch
from tolerances import DIFFERENCE, FORWARD, allowed_error, largest
from torch import Tensor, nn
from transformers import BloomConfig, Gemma3ForCausalLM, Gemma3Model, Gemma3TextConfig

import thought_kernels as tk
from thought_kernels.models import describe
from thought_kernels.ops.rms_norm_pair import rms_norm_pair

SLIDING, FULL = "sliding_attention", "full_attention"


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(6, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hf_logits(model: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if lengths is None else (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return model(input_ids=ids, attention_mask=mask).logits


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return largest(actual.double() - expected.double()) / largest(expected.double())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    groups=st.sampled_from([(1, 1), (4, 1), (6, 2), (6, 3), (4, 4)]),
    head_dim=st.sampled_from([2, 6, 10, 16]),
    window=st.integers(1, 12),
    layers=st.lists(st.sampled_from([SLIDING, FULL]), min_size=1, max_size=4),
    full_rope=st.sampled_from([{"rope_type": "default", "rope_theta": 1e6}, LINEAR_ROPE, YARN_ROPE]),
    bias=st.booleans(),
    cap=st.sampled_from([None, 2.5]),
    batch=st.integers(1, 3),
    length=st.integers(1, 17),
    seed=st.integers(0, 1000),
)
def test_forward_equals_transformers(
    groups: tuple[int, int], head_dim: int, window: int, layers: list[str], full_rope: dict[str, Any], bias: bool,
    cap: float | None, batch: int, length: int, seed: int,
) -> None:  # fmt: skip
    heads, key_heads = groups
    rope = {FULL: dict(full_rope), SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    model = tiny_gemma3(
        seed, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim, sliding_window=window,
        layer_types=layers, rope_parameters=rope, attention_bias=bias, final_logit_softcapping=cap,
    )  # fmt: skip
    ids = token_ids(batch, length, seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    ours, theirs = describe(model).forward(ids, lengths), hf_logits(model, ids, lengths)
    for row, count in enumerate(lengths.tolist()):
        assert relative_error(ours[row, :count], theirs[row, :count]) <= FORWARD


def test_an_attention_cap_is_left_out_as_transformers_leaves_it_out() -> None:
    model, ids = tiny_gemma3(attn_logit_softcapping=0.5), token_ids(2, 11)
    assert relative_error(describe(model).forward(ids), hf_logits(model, ids)) <= FORWARD
    assert all(block.softcap is None for block in describe(model).blocks)


@pytest.mark.parametrize("cap", [None, 2.5])
def test_multimodal_text_blocks_equal_transformers(cap: float | None) -> None:
    model, ids = tiny_multimodal_gemma3(3, final_logit_softcapping=cap), token_ids(2, 13)
    assert relative_error(describe(model).forward(ids), hf_logits(model, ids)) <= FORWARD


def test_models_without_a_head_give_hidden_states_and_refuse_logits() -> None:
    causal, multimodal = tiny_gemma3(1), tiny_multimodal_gemma3(1)
    assert isinstance(multimodal.model, Gemma3Model)
    ids = token_ids(2, 9)
    for whole, bare in ((causal, causal.model), (multimodal, multimodal.model)):
        decoder = describe(bare)
        assert len(decoder.blocks) == len(describe(whole).blocks)
        assert torch.equal(decoder.embed(ids), describe(whole).embed(ids))
        with pytest.raises(ValueError, match="logits: model must have a language-model head"):
            decoder.forward(ids)


def hf_without_float32_casts(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """transformers' eager forward with every cast down to float32 made a cast to float64."""
    softmax = nn.functional.softmax
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "float", Tensor.double)
        patched.setattr(torch, "float", torch.float64)  # rotary angles, as .to(dtype=torch.float) or .float()
        patched.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        return hf_logits(model, ids)


@pytest.mark.parametrize("full_rope", [LINEAR_ROPE, YARN_ROPE], ids=["linear", "yarn"])
def test_float64_is_float64_throughout(full_rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {FULL: dict(full_rope), SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    model, ids = tiny_gemma3(5, torch.float64, rope_parameters=rope), token_ids(2, 19)
    truth = hf_without_float32_casts(model, ids, monkeypatch)
    assert relative_error(describe(model).forward(ids), truth) <= 1e-13
    # The reason for a path of our own: transformers' float64 model is a float32 one in these places.
    assert relative_error(hf_logits(model, ids), truth) >= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_transformers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # So many logits that the largest of their errors is no matter of luck.
    model, ids = tiny_gemma3(7, dtype), token_ids(8, 24)
    ours, theirs = describe(model).forward(ids), hf_logits(model, ids)
    assert ours.dtype == dtype
    truth = hf_without_float32_casts(model.double(), ids, monkeypatch)
    assert largest(ours.double() - truth) <= allowed_error(truth, theirs)


def test_rotary_scores_depend_on_relative_position_only() -> None:
    decoder = describe(tiny_gemma3(2, torch.float64))
    q, k, _ = decoder.blocks[1].qkv(decoder.embed(token_ids(1, 6)))
    k = k.repeat_interleave(2, dim=1)

    def scores(shift: int) -> Tensor:
        cos, sin = decoder.rotary(1, torch.arange(shift, shift + 6)[None])
        return decoder.blocks[1].rotate(q, cos, sin) @ decoder.blocks[1].rotate(k, cos, sin).mT

    assert relative_error(scores(7), scores(0)) <= 1e-14


def test_rotary_differs_by_layer_type_and_row() -> None:
    decoder = describe(tiny_gemma3(2))
    positions = torch.tensor([[0, 1, 2], [4, 5, 6]])
    cos, sin = decoder.rotary(0, positions)
    assert cos.shape == sin.shape == (2, 3, decoder.blocks[0].head_dim)
    assert torch.equal(cos[:1], decoder.rotary(0, positions[:1])[0])
    assert not torch.equal(cos, decoder.rotary(1, positions)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_attention_delta_is_the_difference_of_two_residuals(bias: bool) -> None:
    block = describe(tiny_gemma3(4, torch.float64, attention_bias=bias)).blocks[0]
    width = block.num_attention_heads * block.head_dim
    generator = torch.Generator().manual_seed(0)
    x, o, delta = (torch.randn(2, 5, size, generator=generator, dtype=torch.float64) for size in (36, width, width))
    h, change = block.attention_delta(x, o, delta)
    assert relative_error(h, block.attention_residual(x, o)) <= 1e-14
    assert relative_error(change, block.attention_residual(x, o + delta) - h) <= 1e-13
    u, change_u = block.mlp_input_delta(h, change, x)
    assert relative_error(u, block.mlp_input(h, x)) <= 1e-14
    assert relative_error(change_u, block.mlp_input(h + change, x) - u) <= 1e-13


def test_attention_delta_keeps_its_accuracy_where_a_subtraction_would_lose_it() -> None:
    model = tiny_gemma3(4)
    block = describe(model).blocks[0]
    x, o, delta = torch.randn(2, 5, 36), torch.randn(2, 5, 40), 1e-6 * torch.randn(2, 5, 40)
    _, change = block.attention_delta(x, o, delta)
    subtracted = block.attention_residual(x, o + delta) - block.attention_residual(x, o)
    wide = describe(model.double()).blocks[0]
    _, truth = wide.attention_delta(x.double(), o.double(), delta.double())
    assert change.dtype == torch.float32
    assert relative_error(change, truth) <= DIFFERENCE
    assert relative_error(subtracted, truth) > DIFFERENCE


def test_attention_delta_is_wide_in_a_bfloat16_model() -> None:
    block = describe(tiny_gemma3(4, torch.bfloat16)).blocks[0]
    h, change = block.attention_delta(
        torch.randn(1, 3, 36).bfloat16(), torch.randn(1, 3, 40).bfloat16(), torch.randn(1, 3, 40)
    )
    assert (h.dtype, change.dtype) == (torch.bfloat16, torch.float32)


def add(amount: float) -> Callable[..., Tensor]:
    return lambda module, args, out: out + amount


def test_hooks_act_as_they_do_in_the_models_forward() -> None:
    model, ids = tiny_gemma3(6), token_ids(2, 8)
    plain = hf_logits(model, ids)
    layer = model.model.layers[1]
    handles = [
        layer.register_forward_hook(add(0.5)),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.3 + 0.1,)),
        layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] - 0.2,)),
        layer.mlp.gate_proj.register_forward_hook(add(0.1)),
        layer.post_feedforward_layernorm.register_forward_hook(
            lambda module, args, kwargs, out: out * 0.9, with_kwargs=True
        ),
    ]
    decoder = describe(model)
    hooked = hf_logits(model, ids)
    assert relative_error(hooked, plain) > 1e-2
    assert relative_error(decoder.forward(ids), hooked) <= FORWARD
    for handle in handles:
        handle.remove()
    assert relative_error(decoder.forward(ids), plain) <= FORWARD


def test_hooks_of_a_layer_are_given_what_enters_it() -> None:
    model, ids = tiny_gemma3(6), token_ids(2, 8)
    decoder = describe(model)
    entering = []
    model.model.layers[1].register_forward_hook(lambda module, args, out: entering.append(args[0].clone()))
    hf_logits(model, ids)
    decoder.forward(ids)
    assert relative_error(entering[1], entering[0]) <= FORWARD


def test_a_vector_hooked_on_o_proj_counts_once_in_the_difference() -> None:
    model = tiny_gemma3(6, torch.float64)
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5 + 2.0,))
    block = describe(model).blocks[0]
    x, o, delta = (torch.randn(1, 4, size, dtype=torch.float64) for size in (36, 40, 40))
    h, change = block.attention_delta(x, o, delta)
    assert relative_error(change, block.attention_residual(x, o + delta) - h) <= 1e-13


def test_the_residual_is_added_inside_the_norm_unless_hooks_are_to_see_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = describe(tiny_gemma3(6, torch.bfloat16)).blocks[0]
    x, z = (torch.randn(2, 3, 36).bfloat16() for _ in range(2))
    delta, fused = torch.randn(2, 3, 36), []

    def spy(*args: Tensor, residual: Tensor | None = None, **options: float) -> tuple[Tensor, Tensor]:
        fused.append(residual is not None)
        return rms_norm_pair(*args, residual=residual, **options)

    monkeypatch.setattr("thought_kernels.models.norm.rms_norm_pair", spy)
    norm = block.post_attention_norm
    plain, change = norm.pair(z, delta)
    h, same_change = norm.pair(z, delta, x)
    assert torch.equal(h, x + plain) and torch.equal(same_change, change)
    seen: list[tuple[Tensor, ...]] = []
    handle = norm.module.register_forward_hook(lambda module, args, out: seen.append((*args, out)) or 2 * out)
    doubled, same_change = norm.pair(z, delta, x)
    assert torch.equal(doubled, x + 2 * plain) and torch.equal(same_change, change)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], (z, plain), strict=True))
    handle.remove()
    wide, _ = norm.pair(z, delta, x.float())  # a stream of another dtype keeps it
    assert torch.equal(wide, x.float() + plain)
    block.attention_delta(x, torch.randn(2, 3, 40).bfloat16(), torch.randn(2, 3, 40))
    assert fused == [False, True, False, False, True]


def test_description_reads_the_model_as_it_is_now() -> None:
    model, ids = tiny_gemma3(8), token_ids(1, 7)
    decoder = describe(model)
    assert describe(decoder) is decoder
    model.double()
    assert decoder.dtype == torch.float64 and decoder.forward(ids).dtype == torch.float64
    model.model.layers[0].self_attn.o_proj = nn.Identity()
    assert isinstance(decoder.blocks[0].o_proj, nn.Identity)


def test_forward_builds_no_graph_and_wants_two_dimensions() -> None:
    model = tiny_gemma3(8).requires_grad_(True)
    assert not describe(model).forward(token_ids(1, 4)).requires_grad
    with pytest.raises(ValueError, match=r"forward: input_ids must have shape \[B, T\], got \[4\]"):
        describe(model).forward(token_ids(1, 4)[0])


SIZES = {  # the published configurations: hidden, mlp, layers, heads, key-value heads, head_dim, window, score scalar
    "270m": (640, 2048, 18, 4, 1, 256, 512, 256),
    "1b": (1152, 6912, 26, 4, 1, 256, 512, 256),
    "4b": (2560, 10240, 34, 8, 4, 256, 1024, 256),
    "12b": (3840, 15360, 48, 16, 8, 256, 1024, 256),
    "27b": (5376, 21504, 62, 32, 16, 128, 1024, 168),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_is_described(size: str) -> None:
    hidden, mlp, layers, heads, key_heads, head_dim, window, scalar = SIZES[size]
    config = Gemma3TextConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=head_dim, sliding_window=window, query_pre_attn_scalar=scalar,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = describe(Gemma3ForCausalLM(config))
    assert (decoder.hidden_size, len(decoder.blocks)) == (hidden, layers)
    for index, block in enumerate(decoder.blocks):
        assert block.index == index
        assert block.window == (None if (index + 1) % 6 == 0 else window)
        assert block.scale == pytest.approx(scalar**-0.5)
        assert block.o_proj.weight.shape == (hidden, heads * head_dim)
        assert [module.weight.shape for module in block.mlp_inputs] == [(mlp, hidden)] * 2
        assert (block.attention_width, block.mlp_width) == (heads * head_dim, mlp)
        assert block.down_proj.weight.shape == (hidden, mlp)
    q, k, v = decoder.blocks[0].qkv(torch.empty(2, 3, hidden, device="meta", dtype=decoder.dtype))
    assert q.shape == (2, heads, 3, head_dim) and k.shape == v.shape == (2, key_heads, 3, head_dim)


def test_unsupported_models_are_refused_with_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"of one of the families Gemma, .*, got SimpleNamespace of type 'bloom'; a fu"):
        describe(SimpleNamespace(config=BloomConfig()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^describe: model must be a loaded model, got the name 'a/b'; .*tk.load\("):
        describe("a/b")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Linear of type None"):
        describe(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must hold Gemma 3's text blocks itself or at model, "):
        describe(SimpleNamespace(config=tiny_text_config()))  # type: ignore[arg-type]


def test_the_model_inside_a_wrapper_is_described() -> None:
    model, ids = tiny_gemma3(), token_ids(1, 6)
    assert describe(torch.compile(model)).model is model
    peft = pytest.importorskip("peft", reason="wraps models; pip install 'thought_kernels[peft]'")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    expected = hf_logits(wrapped, ids)
    assert relative_error(describe(torch.compile(wrapped)).forward(ids), expected) <= FORWARD
    assert relative_error(hf_logits(tiny_gemma3(), ids), expected) > 1e-2  # the adapter takes part
    assert describe(wrapped.base_model).model is model  # the tuner
    mixed = peft.get_peft_model(tiny_gemma3(), lora, mixed=True)
    assert describe(mixed).model is mixed.base_model.model

    class Own(peft.PeftModelForCausalLM):
        pass

    assert describe(Own(inside := tiny_gemma3(), lora)).model is inside
    learned = peft.get_peft_model(tiny_gemma3(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="describe: model must read its prompt only, got PeftModelForCausalLM"):
        describe(learned)


def test_weights_that_are_not_in_memory_are_refused_where_they_are_read() -> None:
    model = tiny_gemma3()
    model.model.layers[1].mlp.to("meta")
    assert describe(model).blocks[1].mlp is model.model.layers[1].mlp  # a patch can be applied to it all the same
    for function, call in (
        ("transmute", lambda: tk.transmute(model, None, "sum", ["1"])),
        ("replay", lambda: tk.replay(model, torch.arange(6), (1, 2))),
        ("export_peft", lambda: random_patch().export_peft("nowhere", model)),
    ):
        with pytest.raises(ValueError, match=f"^{function}: model must have its weights in memory, got model.layers.1"):
            call()


def test_bidirectional_attention_and_length_dependent_rotary_are_refused() -> None:
    with pytest.raises(ValueError, match="must use causal attention, got use_bidirectional_attention=True"):
        describe(tiny_gemma3(use_bidirectional_attention=True))
    rope = {FULL: {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}, SLIDING: {"rope_type": "default"}}
    rope[SLIDING]["rope_theta"] = 1e4
    with pytest.raises(ValueError, match="got rope_type='dynamic' for full_attention layers"):
        describe(tiny_gemma3(rope_parameters=rope))
