"""Every family: its description against transformers' forward, and what the theory promises of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import BIASED_CASES, CASES, DENSE_CASES, EXPERT_CASES, tiny
from models import tiny_tokenizer
from patches import MATRICES, random_patch, same_bits, token_ids, weights
from tolerances import DIFFERENCE, largest
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma4TextConfig

import thought_kernels as tk
from thought_kernels.models import FAMILIES, describe
from thought_kernels.pairing.replay import REPLAYED, run_patched

TOKENIZER = tiny_tokenizer()
EXAMPLE = {"prompt": "8 7", "completion": "x=2"}
FORWARD = 1e-5  # equality with transformers in float32, relative to the largest logit: what the project claims


@torch.no_grad()
def hf_logits(model: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if lengths is None else (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return model(input_ids=ids, attention_mask=mask).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return largest(actual.double() - expected.double()) / largest(expected.double())


def patch_for(model: Any, sites: tuple[str, ...] = MATRICES, **options: Any) -> tk.ThoughtPatch:
    decoder = describe(model)
    options = {"layers": range(len(decoder.blocks)), "vectors": False, **options}
    widths = {"attention": decoder.blocks[0].attention_width, "intermediate": decoder.blocks[0].mlp_width or 7}
    return random_patch(1, sites=sites, hidden=decoder.hidden_size, **widths, **options)


def test_every_described_type_has_a_case() -> None:
    kinds = {getattr(transformers, f"{kind}Config").model_type for kind, _ in CASES.values()}
    assert kinds | {"gemma3"} == set(FAMILIES)  # the multimodal class is tested in test_models.py


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_transformers(name: str) -> None:
    model, ids, lengths = tiny(name), token_ids(3, 17), torch.tensor([17, 9, 1])
    ours, theirs = describe(model).forward(ids, lengths), hf_logits(model, ids, lengths)
    for row, count in enumerate(lengths.tolist()):
        assert error(ours[row, :count], theirs[row, :count]) <= FORWARD


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("site", REPLAYED)
def test_replay_is_exact_in_float64(name: str, site: str) -> None:
    report = tk.replay(tiny(name, 1, torch.float64), token_ids(1, 23)[0], (3, 9), site=site)
    assert report.block_error.max() <= 1e-9 and report.logit_error <= 1e-9
    assert report.control_error >= max(1e-3, 1e6 * report.logit_error)


def logits_at_e(model: Any, ids: list[int], hole: tuple[int, int], last: int) -> Tensor:
    """Logits of the last tokens, by the adapter's float64 path; learned positions leave the hole out."""
    decoder = describe(model)
    positions = [*range(hole[0]), *range(hole[1], hole[1] + len(ids) - hole[0])]
    _, final = run_patched(decoder, torch.tensor([ids]), None, torch.tensor([positions]))
    return decoder.logits(final)[0, -last:]


@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
@pytest.mark.parametrize("name", CASES)
def test_one_example_is_interpolated(name: str, pairing: str) -> None:
    """exact, all blocks, attention site: the patched model on [H, e] gives the prompted logits at e (theory §2).

    Learned positions of its own part the sequential stream at the embedding; the down site closes that gap too.
    """
    model = tiny(name, 2, torch.float64)
    own = describe(model).positions == "learned" and pairing == "sequential"
    header, chunk, e = tk.align(TOKENIZER, "Sum now", EXAMPLE)
    hole = len(header), len(header) + (0 if own else len(chunk))
    assert len(header) + len(e) <= describe(model).blocks[0].attention_width  # or no matrix could do it
    patch = tk.transmute(
        model, TOKENIZER, "Sum now", [EXAMPLE], sites=("attention", "down") if own else ("attention",),
        estimator="exact", pairing=pairing, header_weight=0.3,
    )  # fmt: skip
    wanted = logits_at_e(model, header + chunk + e, (hole[0], hole[0]), len(e))
    bare = logits_at_e(model, header + e, hole, len(e))
    with patch.applied(model):
        patched = logits_at_e(model, header + e, hole, len(e))
    assert error(patched, wanted) <= 1e-6
    assert error(bare, wanted) >= 1e-3


@pytest.mark.parametrize("pairing", ["sequential", "layerwise"])
@pytest.mark.parametrize("name", DENSE_CASES)
def test_one_example_is_interpolated_by_down_proj_alone(name: str, pairing: str) -> None:
    """exact, all blocks: wherever no norm stands behind down_proj, each block's output is met, and so the logits.

    But a parallel block's z knows nothing of its own attention: in the first block it is the token's alone, so that
    tokens that occur twice share one change, which later blocks can mend in `sequential` only.
    """
    model = tiny(name, 2, torch.float64)
    blocks = describe(model).blocks
    own = describe(model).positions == "learned" and pairing == "sequential"
    header, chunk, e = tk.align(TOKENIZER, "Sum now", EXAMPLE)
    hole = len(header), len(header) + (0 if own else len(chunk))
    assert len(header) + len(e) < blocks[0].mlp_width
    patch = tk.transmute(
        model, TOKENIZER, "Sum now", [EXAMPLE], sites=("down",), estimator="exact", pairing=pairing, header_weight=0.3
    )
    wanted = logits_at_e(model, header + chunk + e, (hole[0], hole[0]), len(e))
    bare = logits_at_e(model, header + e, hole, len(e))
    with patch.applied(model):
        patched = logits_at_e(model, header + e, hole, len(e))
    if blocks[0].post_feedforward_norm is None and (pairing == "sequential" or not blocks[0].parallel):
        assert error(patched, wanted) <= 1e-6
    else:
        assert error(patched, wanted) > 1e-6
        assert pairing == "layerwise" or error(patched, wanted) < error(bare, wanted)
    assert error(bare, wanted) >= 1e-3


@pytest.mark.parametrize("name", DENSE_CASES)
def test_differences_are_those_of_two_runs(name: str) -> None:
    decoder = describe(tiny(name, 3, torch.float64))
    block = decoder.blocks[1]
    generator = torch.Generator().manual_seed(0)
    sizes = (decoder.hidden_size, block.attention_width, block.attention_width)
    x, o, delta = (torch.randn(2, 5, size, generator=generator, dtype=torch.float64) for size in sizes)
    h, change = block.attention_delta(x, o, delta)
    assert error(h, block.attention_residual(x, o)) <= 1e-14
    assert error(change, block.attention_residual(x, o + delta) - h) <= 1e-13
    u, change_u = block.mlp_input_delta(h, change, x)
    assert error(u, block.mlp_input(h, x)) <= 1e-14
    if block.parallel:  # the MLP reads x, which is common
        assert not change_u.any()
        assert torch.equal(u, block.mlp_input(h + change, x))
    else:
        assert error(change_u, block.mlp_input(h + change, x) - u) <= 1e-13


@pytest.mark.parametrize("name", DENSE_CASES)
def test_a_norms_difference_keeps_its_accuracy(name: str) -> None:
    """In float32, where a subtraction of two norms would lose it."""
    exact, decoder = describe(tiny(name, 3, torch.float64)).blocks[1], describe(tiny(name, 3, torch.float32))
    block, generator = decoder.blocks[1], torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, decoder.hidden_size, generator=generator)
    delta = 1e-6 * torch.randn(h.shape, generator=generator)
    _, truth = exact.mlp_input_delta(h.double(), delta.double(), h.double())
    _, change = block.mlp_input_delta(h, delta, h)
    assert largest(change.double() - truth) <= DIFFERENCE * largest(truth)
    subtracted = block.mlp_input(h + delta, h) - block.mlp_input(h, h)
    if not block.parallel and block.pre_feedforward_norm is not None:
        assert largest(subtracted.double() - truth) > DIFFERENCE * largest(truth)


@pytest.mark.parametrize("name", CASES)
def test_a_patch_does_the_same_applied_merged_saved_and_as_a_lora(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="reads what export_peft writes; pip install 'thought_kernels[peft]'")
    model, ids = tiny(name, 4), token_ids(2, 11)
    before, bare = weights(model), hf_logits(model, ids)
    patch = patch_for(model, ("attention",) if name in EXPERT_CASES else MATRICES, rank=2)
    with patch.applied(model):
        applied, ours = hf_logits(model, ids), describe(model).forward(ids)
    assert error(applied, bare) >= 1e-2
    assert error(ours, applied) <= FORWARD
    patch.export_peft(tmp_path / "lora", model)
    with patch.merge_(model):
        assert error(hf_logits(model, ids), applied) <= FORWARD
        model.save_pretrained(tmp_path / "merged")
    assert same_bits(model, before)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **options).eval()
    assert error(hf_logits(saved, ids), applied) <= FORWARD
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert error(hf_logits(wrapped, ids), applied) <= FORWARD
    assert error(hf_logits(wrapped.merge_and_unload(), ids), applied) <= FORWARD  # fan_in_fan_out is told right


@pytest.mark.parametrize("name", BIASED_CASES)
def test_vectors_go_into_biases_where_there_are_some(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="reads what export_peft writes; pip install 'thought_kernels[peft]'")
    model, ids = tiny(name, 5, torch.float64), token_ids(2, 11)
    before = weights(model)
    patch = patch_for(model, vectors=True, dtype=torch.float64)
    with patch.applied(model):
        applied = describe(model).forward(ids)
    with patch.merge_(model) as merged:
        assert not merged.fold_residuals
        assert error(describe(model).forward(ids), applied) <= 1e-13
    assert same_bits(model, before)
    assert patch.export_peft(tmp_path, model).has_bias
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path).double()
    assert error(describe(wrapped).forward(ids), applied) <= 1e-12


@pytest.mark.parametrize("sites", [("residual",), ("attention", "down", "residual")])
@pytest.mark.parametrize("name", BIASED_CASES)
def test_residual_vectors_go_into_the_last_bias_where_there_is_one(
    name: str, sites: tuple[str, ...], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="reads what export_peft writes; pip install 'thought_kernels[peft]'")
    model, ids = tiny(name, 5, torch.float64), token_ids(2, 11)
    before, bare = weights(model), describe(model).forward(ids)
    patch = patch_for(model, sites, vectors=True, rank=2, dtype=torch.float64)
    with patch.applied(model):
        applied = describe(model).forward(ids)
    assert error(applied, bare) >= 1e-2
    with patch.merge_(model) as merged:
        assert not merged.fold_residuals
        assert error(describe(model).forward(ids), applied) <= 1e-13
    assert same_bits(model, before)
    written = patch.export_peft(tmp_path, model)
    assert written.has_bias and written.rank == (1 if sites == ("residual",) else 2)
    with tk.ThoughtPatch(written.entries).applied(model):
        assert error(describe(model).forward(ids), applied) <= 1e-13
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path).double()
    assert error(describe(wrapped).forward(ids), applied) <= 1e-12
    assert error(describe(wrapped.merge_and_unload()).forward(ids), applied) <= 1e-12


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "down_proj has no bias"),
        ("gemma3", "a norm stands behind down_proj"),
        ("mixtral", "its MLP is a mixture of experts"),
    ],
)
def test_a_residual_vector_without_such_a_bias_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    model = tiny(name)
    before, patch = weights(model), patch_for(model, ("residual",))
    for call in (lambda: patch.merge_(model, fold=True), lambda: patch.export_peft(tmp_path, model, fold=True)):
        with pytest.raises(
            ValueError, match=f"patch must have no residual vector, got .*; block 0, .* since {reason}; "
        ):
            call()
    assert same_bits(model, before) and not list(tmp_path.iterdir())


def add(amount: float) -> Callable[..., Tensor]:
    return lambda module, args, out: out + amount


@pytest.mark.parametrize("name", CASES)
def test_hooks_act_as_they_do_in_the_models_forward(name: str) -> None:
    model, ids = tiny(name, 6), token_ids(2, 8)
    plain, block = hf_logits(model, ids), describe(model).blocks[1]
    norms = (block.input_norm, block.pre_feedforward_norm, block.post_attention_norm, block.post_feedforward_norm)
    handles = [
        block.layer.register_forward_hook(add(0.5)),
        block.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.3 + 0.1,)),
        block.mlp.register_forward_pre_hook(lambda module, args: (args[0] - 0.2,)),
        *(module.register_forward_hook(add(0.1)) for module in block.mlp_inputs),
        *(norm.module.register_forward_hook(add(0.2)) for norm in norms if norm is not None),
    ]
    hooked = hf_logits(model, ids)
    assert error(hooked, plain) > 1e-2
    assert error(describe(model).forward(ids), hooked) <= FORWARD
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", CASES)
def test_what_acts_on_which_width(name: str) -> None:
    model, seen = tiny(name), {}
    blocks = describe(model).blocks

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        seen[id(module)] = args[0]

    for block in blocks:
        for module in filter(None, (block.o_proj, block.down_proj, block.mlp, *block.mlp_inputs)):
            module.register_forward_pre_hook(keep)
    hf_logits(model, token_ids(1, 3))
    for block in blocks:
        assert seen[id(block.o_proj)].shape[-1] == block.attention_width
        assert all(torch.equal(seen[id(module)], seen[id(block.mlp)]) for module in block.mlp_inputs)
        if block.down_proj is None:
            assert block.mlp_width is None and not block.mlp_inputs
        else:
            assert seen[id(block.down_proj)].shape[-1] == block.mlp_width and block.mlp_inputs


@pytest.mark.parametrize("site", ["mlp", "down"])
@pytest.mark.parametrize("name", EXPERT_CASES)
def test_mixtures_of_experts_have_the_attention_site_alone(name: str, site: str) -> None:
    model = tiny(name)
    experts = [block.index for block in describe(model).blocks if not block.mlp_inputs]
    with pytest.raises(
        ValueError, match=rf"transmute: sites must be without '{site}' .* at block {experts[0]}, got .*'{site}'"
    ):
        tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE], sites=("attention", site))
    dense = [block.index for block in describe(model).blocks if block.mlp_inputs]
    with pytest.raises(ValueError, match=r"such as 0$" if dense else r"give sites=\('attention',\)$"):
        tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE], sites=(site,))
    if dense:  # as the sentence says
        assert tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE], sites=(site,), layers=dense).layers == tuple(dense)
    assert tk.transmute(model, TOKENIZER, "Sum now", [EXAMPLE]).sites == ("attention",)
    patch = patch_for(model, (site,))
    for name, call in (("applied", patch.applied), ("merge_", patch.merge_)):
        with pytest.raises(
            ValueError, match=f"^{name}: patch must not have site '{site}' at block {experts[0]}, whose MLP"
        ):
            call(model)
    with pytest.raises(
        ValueError, match=f"have one MLP where the patch acts, got a mixture of experts; block {experts[0]}"
    ):
        tk.spectral.diagnose(patch, model)


def test_learned_positions_enter_the_embedding_and_end() -> None:
    decoder = describe(tiny("gpt2"))
    assert decoder.positions == "learned" and describe(tiny("llama")).positions == "rotary"
    ids, positions = token_ids(2, 4), torch.tensor([[7, 8, 9, 20]])
    moved = decoder.embed(ids, positions) - decoder.embed(ids)
    table = decoder.embed_positions.weight
    torch.testing.assert_close(moved, (table[positions] - table[:4]).expand_as(moved))
    q, _, _ = decoder.blocks[0].qkv(decoder.embed(ids))
    cos, sin = decoder.rotary(0, positions)
    assert torch.equal(decoder.blocks[0].rotate(q, cos, sin), q)
    with pytest.raises(ValueError, match=r"^embed: positions must be below 96, which the model has learned, got 96; "):
        decoder.embed(ids, torch.tensor([[1, 2, 3, 96]]))


def test_layers_without_rotary_embedding_know_no_positions() -> None:
    decoder = describe(tiny("smollm3"))
    assert [block.rotary for block in decoder.blocks] == [True, False, True]
    q, _, _ = decoder.blocks[1].qkv(decoder.embed(token_ids(1, 4)))
    turned = [block.rotate(q, *decoder.rotary(block.index, torch.arange(5, 9)[None])) for block in decoder.blocks]
    assert torch.equal(turned[1], q) and not torch.equal(turned[0], q)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral", [5, 5, 5]),
        ("mistral without windows", [None, None, None]),
        ("gemma2", [5, None, 5]),
        ("olmo3", [5, None, 5]),
        ("qwen2", [None, None, None]),
        ("qwen2, windows above", [None, 5, 5]),
    ],
)
def test_windows_are_those_of_the_layers(name: str, windows: list[int | None]) -> None:
    assert [block.window for block in describe(tiny(name)).blocks] == windows


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (Gemma3nTextConfig, "AltUp's several residual streams and embeddings that enter at every layer"),
        (Gemma4TextConfig, "embeddings that enter at every layer, keys and values shared between layers"),
    ],
)
def test_what_a_family_lacks_is_named(config: Any, missing: str) -> None:
    with pytest.raises(TypeError, match=f"^describe: model must be of one of .*; its blocks have {missing}"):
        describe(SimpleNamespace(config=config()))  # type: ignore[arg-type]


def longrope(short: float, long: float, original: int) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [short] * 6, "long_factor": [long] * 6}
    return tiny("phi3", rope_parameters=rope, sliding_window=None, original_max_position_embeddings=original)


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not depend on the .* length, got rope_type='longrope' for all layers"):
        describe(longrope(1.0, 2.0, 32))
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match=r"do not depend on the .* length, got rope_type='dynamic' for all layers"):
        describe(dynamic)


@pytest.mark.parametrize(("short", "long", "original"), [(2.0, 2.0, 32), (1.5, 2.0, 96)])
def test_frequencies_that_could_but_do_not_depend_on_the_length_are_served(
    short: float, long: float, original: int
) -> None:
    model, ids = longrope(short, long, original), token_ids(1, 40)
    assert error(describe(model).forward(ids), hf_logits(model, ids)) <= FORWARD
