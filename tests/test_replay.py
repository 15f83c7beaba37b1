"""The exactness theorem, on random Gemma 3 models of many shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import thought_kernels as tk
from thought_kernels.models import describe
from thought_kernels.pairing import replay as module
from thought_kernels.pairing.batches import Group

SPANS = [(0, 9), (3, 12), (1, 20), (2, 3)]


def ids(seed: int, length: int = 29) -> torch.Tensor:
    return torch.randint(6, 60, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("window", [1, 3, 7, 64])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("site", module.REPLAYED)
def test_replay_is_exact_in_float64(span: tuple[int, int], window: int, heads: tuple[int, int], site: str) -> None:
    seed = window + heads[0]
    model = tiny_gemma3(
        seed, torch.float64, sliding_window=window, num_attention_heads=heads[0], num_key_value_heads=heads[1]
    )
    report = tk.replay(model, ids(seed), span, site=site)
    assert report.block_error.shape == (3,)
    assert report.block_error.max() <= 1e-9
    assert report.logit_error <= 1e-9
    assert report.control_error >= 1e6 * report.logit_error
    assert report.control_error > 1e-3


@pytest.mark.parametrize("left_out", ["matrix", "vector"])
def test_the_paper_s_site_needs_its_matrix_and_its_vector(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: with one of the two alone the replay errs as much as it can be seen to."""
    made = module.token_patches

    def spoilt(*arguments: object) -> object:
        patches, outputs, last = made(*arguments)
        name = {"matrix": "delta", "vector": "vector"}[left_out]
        return [replace(patch, **{name: torch.zeros_like(getattr(patch, name))}) for patch in patches], outputs, last

    monkeypatch.setattr(module, "token_patches", spoilt)
    report = tk.replay(tiny_gemma3(0, torch.float64), ids(1), (3, 12), site="mlp")
    assert report.logit_error > 1e-3


def test_replay_serves_the_text_blocks_of_a_multimodal_model() -> None:
    report = tk.replay(tiny_multimodal_gemma3(0, torch.float64), ids(1), (3, 12))
    assert report.logit_error <= 1e-9 < report.control_error


def test_patches_act_on_what_is_recomputed() -> None:
    """δ (a·o)/‖a‖² follows o: were a stored activation injected, halving o would change nothing."""
    decoder = describe(tiny_gemma3(0, torch.float64))
    tokens = ids(2).tolist()
    patches, _, _ = module.token_patches(
        decoder, Group(tuple(tokens[:3]), tuple(tokens[3:9]), (), ()), torch.tensor([tokens[9:]])
    )
    for patch in patches:
        torch.testing.assert_close(patch(0.5 * patch.activation), 0.5 * (patch.activation + patch.delta))
    seen: list[torch.Tensor] = []
    block = decoder.blocks[0]
    handle = block.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    without = torch.tensor([tokens[:3] + tokens[9:]])
    module.run_patched(decoder, without, patches, torch.arange(23)[None])
    v_proj = block.layer.self_attn.v_proj
    with torch.no_grad():
        v_proj.weight.mul_(0.5)
    module.run_patched(decoder, without, patches, torch.arange(23)[None])
    handle.remove()
    torch.testing.assert_close(seen[1], 0.5 * seen[0])


def test_a_token_without_activation_has_no_patch() -> None:
    patch = module.TokenPatches(torch.ones(2, 4), torch.tensor([[0.0] * 4, [1.0] * 4]))
    rows = torch.ones(2, 4)
    torch.testing.assert_close(patch(rows), torch.tensor([[1.0] * 4, [2.0] * 4]))


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (4, 2), (3, 29), (0, 29)])
def test_bad_spans_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"replay: span must satisfy"):
        tk.replay(tiny_gemma3(0), ids(0), span)


def test_a_site_that_is_not_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match="^replay: site must be one of attention, mlp, got 'down'"):
        tk.replay(tiny_gemma3(0), ids(0), (1, 3), site="down")


def test_ids_must_be_one_row() -> None:
    with pytest.raises(ValueError, match=r"replay: with_ids must be one row"):
        tk.replay(tiny_gemma3(0), ids(0)[None], (1, 3))
    with pytest.raises(ValueError, match=r"replay: with_ids must be one row"):
        tk.replay(tiny_gemma3(0), ids(0).float(), (1, 3))


def test_ids_must_be_the_model_s() -> None:
    model = tiny_gemma3(0)
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match=rf"^replay: with_ids must be between 0 and .*, got .*{wrong}"):
            tk.replay(model, torch.cat([ids(0), torch.tensor([wrong])]), (1, 3))
    with pytest.raises(TypeError, match=r"^replay: with_ids must be token ids, got NoneType"):
        tk.replay(model, None, (1, 3))


def test_a_model_without_a_head_has_no_logits_to_compare() -> None:
    with pytest.raises(ValueError, match="^replay: model must have a language-model head, got Gemma3TextModel"):
        tk.replay(tiny_gemma3(0).model, ids(0), (1, 3))


@pytest.mark.parametrize("span", [None, 3, (1,), (1, 2, 3), ("1", "3"), (1.0, 3.0)])
def test_a_span_is_two_integers(span: object) -> None:
    with pytest.raises(TypeError, match=r"^replay: span must be two integers \(start, stop\), got"):
        tk.replay(tiny_gemma3(0), ids(0), span)


@pytest.mark.slow
def test_float32_replay_through_all_blocks_of_the_1b_shape() -> None:
    config = Gemma3TextConfig(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=512, vocab_size=262144,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    with_ids = torch.randint(6, 262144, (48,), generator=torch.Generator().manual_seed(0))
    report = tk.replay(model, with_ids, (4, 16))
    assert report.logit_error <= 2.5e-5, report
    assert report.control_error >= 1000 * report.logit_error, report
