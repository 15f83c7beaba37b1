"""The pairings against hooks on whole transformers forwards (tests/two_forwards.py)."""

from __future__ import annotations

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED
from torch import Tensor
from two_forwards import activations, float64_throughout, row_sums, sums

import thought_kernels as tk
from thought_kernels.estimation import estimators
from thought_kernels.patches.patch import ThoughtPatch

TOKENIZER = tiny_tokenizer()
INSTRUCTION = "Sum now"
EXAMPLES = [
    {"prompt": "8 7", "completion": "8 + 7"},
    {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"},
]
SITES = ("attention", "mlp", "residual")


def model_of(seed: int = 0, **changes: object):
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER), **changes)


def aligned() -> list[tuple[list[int], list[int], list[int]]]:
    return [tk.align(TOKENIZER, INSTRUCTION, example) for example in EXAMPLES]


def pairs_of(model: object, key: tuple[int, str]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for header, chunk, e in aligned():
        prime = activations(model, header + chunk + e, len(e))[key]
        found.append((prime, activations(model, header + e, len(e))[key]))
    return found


def close(actual: Tensor | None, wanted: Tensor, tolerance: float = SOLVED) -> None:
    assert actual is not None
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("normalization", ["none", "norm"])
def test_two_pass_sums_are_those_of_two_forwards(window: int, normalization: str) -> None:
    model = model_of(sliding_window=window)
    for site in SITES:
        patch = tk.transmute(
            model, TOKENIZER, INSTRUCTION, EXAMPLES, sites=(site,), pairing="two_pass", estimator="mean",
            normalization=normalization, header_weight=0.0,
        )  # fmt: skip
        for layer in range(3):
            cross, _, delta_sum = sums(pairs_of(model, (layer, site)), norm=normalization == "norm")
            if site == "residual":
                close(patch.vector(layer, site), delta_sum)
            else:
                close(patch.matrix(layer, site), cross)


def test_the_paper_recipe_is_algorithm_1() -> None:
    """Two forwards with hooks, token by token, with the constant divisor and the norm of §4.1."""
    model = model_of(1)
    patch = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES, **tk.paper_recipe(c1=0.5, c2=0.2, layers=[1, 2], steps=7)
    )
    assert patch.layers == (1, 2)
    for layer in (1, 2):
        cross, _, _ = sums(pairs_of(model, (layer, "mlp")), norm=True)
        _, _, delta_sum = sums(pairs_of(model, (layer, "residual")))
        close(patch.matrix(layer, "mlp"), 0.5 / 7 * cross)
        close(patch.vector(layer, "residual"), 0.2 / 7 * delta_sum)


@pytest.mark.parametrize("window", [4, 64])
def test_layerwise_hides_only_the_instruction(window: int) -> None:
    """Each block's own attention over [H, e], given the with-context stream at those tokens."""
    model = model_of(2, sliding_window=window)
    patch = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing="layerwise", estimator="mean", header_weight=0.0
    )
    for layer, module in enumerate(model.model.layers):
        found = []
        for header, chunk, e in aligned():
            full = activations(model, header + chunk + e, len(header + chunk + e))
            kept = torch.cat([full[layer, "stream"][: len(header)], full[layer, "stream"][-len(e) :]])[None]
            seen: list[Tensor] = []
            handle = module.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0][0])
            )
            positions = torch.arange(kept.shape[1])
            with float64_throughout():
                angles = model.model.rotary_emb(kept, positions[None], module.self_attn.layer_type)
            distance = positions[:, None] - positions[None]
            visible = (distance >= 0) & (distance < (module.self_attn.sliding_window or 10**6))
            mask = torch.where(visible, 0.0, -torch.inf).double()[None, None]
            with float64_throughout():
                module(kept, position_embeddings=angles, attention_mask=mask)
            handle.remove()
            found.append((full[layer, "attention"][-len(e) :], seen[0][-len(e) :].double()))
        close(patch.matrix(layer, "attention"), sums(found)[0])


@pytest.mark.parametrize("sites", [("attention",), ("attention", "mlp", "residual"), ("mlp", "residual")])
def test_sequential_fits_each_block_to_what_the_patched_model_sees(sites: tuple[str, ...]) -> None:
    model = model_of(3)
    options = {"sites": sites, "ridge": 0.2, "header_weight": 0.0}
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing="sequential", **options)
    applied: dict = {}
    for layer in range(3):
        for site in sites:
            found = []
            for header, chunk, e in aligned():
                prime = activations(model, header + chunk + e, len(e))[layer, site]
                if not applied:
                    plain = activations(model, header + e, len(e))
                else:
                    with ThoughtPatch(applied).applied(model):
                        plain = activations(model, header + e, len(e))
                rows = plain[layer, site]
                found.append((prime, rows))
            cross, gram, delta_sum = sums(found)
            if site == "residual":
                close(patch.vector(layer, site), delta_sum / len(EXAMPLES))
            else:
                close(patch.matrix(layer, site), estimators.ridge_solve(cross, gram, 0.2))
            applied[layer, site] = patch.entries[layer, site]


@pytest.mark.parametrize("pairing", ["layerwise", "two_pass"])
def test_the_mlp_site_is_fitted_after_the_attention_patch(pairing: str) -> None:
    """Where the attention patch is exact for the tokens at hand, the MLP input already is the prompted one."""
    model = model_of(4, head_dim=64)
    patch = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES[:1], sites=("attention", "mlp"), pairing=pairing, estimator="exact",
        header_weight=0.0, layers=[0],
    )  # fmt: skip
    alone = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES[:1], sites=("mlp",), pairing=pairing, estimator="exact",
        header_weight=0.0, layers=[0],
    )  # fmt: skip
    assert patch.matrix(0, "mlp").norm() < 1e-9 * alone.matrix(0, "mlp").norm()


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_header_rows_enter_with_zero_delta(pairing: str) -> None:
    """Weight w spread over H's rows for each example: only Z grows, by w · examples / |H| · Σ o oᵀ over H."""
    model = model_of(5)
    options = {"pairing": pairing, "estimator": "ridge", "layers": [0], "ridge": 0.1}
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, header_weight=0.6, **options)
    found = pairs_of(model, (0, "attention"))
    cross, gram, _ = sums(found)
    header, chunk, e = aligned()[0]
    rows = activations(model, header + chunk + e, len(header + chunk + e))[0, "attention"][: len(header)]
    gram += 0.6 * len(EXAMPLES) / len(header) * rows.T @ rows
    close(patch.matrix(0, "attention"), estimators.ridge_solve(cross, gram, 0.1))


def test_header_rows_dilute_the_residual_vector() -> None:
    model = model_of(5)
    options = {"sites": ("residual",), "layers": [0], "pairing": "two_pass"}
    alone, diluted = (
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, header_weight=weight, **options).vector(0, "residual")
        for weight in (0.0, 3.0)
    )
    close(diluted, alone / 4, 1e-9)


def test_a_faint_instruction_survives_bf16() -> None:
    """At block 0 two_pass and layerwise are one and the same. A header that holds nearly all attention leaves the
    instruction a difference far below the rounding of two bf16 outputs."""
    model = model_of(7, layer_types=["full_attention"])
    bos = TOKENIZER.bos_token_id
    with torch.no_grad():
        embedding, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        embedding *= 0.05
        embedding[:, 0], embedding[bos, 0] = 1.0, 30.0
        attention.q_proj.weight[:, 0] += 3.0 * attention.k_proj.weight[:10, 0].repeat(4)
    model = model.to(torch.bfloat16)
    crosses = [
        tk.transmute(
            model, TOKENIZER, INSTRUCTION, EXAMPLES, pairing=pairing, estimator="mean", sites=("attention",)
        ).matrix(0, "attention")
        for pairing in ("layerwise", "two_pass")
    ]
    close(crosses[1].double(), crosses[0].double(), 1e-4)


@pytest.mark.parametrize("sites", [("attention",), ("mlp",), ("residual",), SITES], ids="+".join)
@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_batches_and_their_order_change_nothing_but_rounding(pairing: str, sites: tuple[str, ...]) -> None:
    model = model_of(6)
    options = {"sites": sites, "pairing": pairing}
    one = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, batch_size=1, **options)
    all_ = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES[::-1], batch_size=3, **options)
    again = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, batch_size=1, **options)
    assert set(one.entries) == {(layer, site) for layer in range(3) for site in sites}
    for (layer, site), entry in one.entries.items():
        for name, tensor in entry.tensors().items():
            close(all_.entries[layer, site].tensors()[name], tensor, SOLVED)
            assert torch.equal(again.entries[layer, site].tensors()[name], tensor)


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_low_precision_runs_repeat_bit_by_bit(pairing: str) -> None:
    model = model_of(6).to(torch.bfloat16)
    first, second = (
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, batch_size=2, pairing=pairing, header_weight=0.1)
        for _ in range(2)
    )
    for key, entry in first.entries.items():
        assert torch.equal(entry.matrix, second.entries[key].matrix)


def test_blocks_beyond_the_last_targeted_one_and_the_head_are_not_run() -> None:
    model = model_of(7)

    def refuse(*_: object) -> None:
        raise AssertionError("this module must not be run")

    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(refuse)
    model.model.layers[2].mlp.register_forward_pre_hook(refuse)
    model.lm_head.register_forward_pre_hook(refuse)
    for pairing in ("two_pass", "layerwise", "sequential"):
        patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, layers=[0, 1], pairing=pairing)
        assert patch.layers == (0, 1)
    model.model.layers[1].mlp.register_forward_pre_hook(refuse)  # nor the MLP of the last one where no site needs it
    for pairing in ("two_pass", "layerwise", "sequential"):
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, layers=[0, 1], sites=("attention",), pairing=pairing)


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_the_mlp_s_activation_may_be_the_stream_before_its_norm(pairing: str) -> None:
    """Σ δ hᵀ/‖h‖, δ still the change of u: the paper's A(x) with its skip, in a block with a norm before the MLP."""
    model = model_of(8)
    options = {"sites": ("mlp",), "pairing": pairing, "layers": [0], "estimator": "mean", "normalization": "norm"}
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, mlp_activation="residual", **options)
    rows = []
    for (prime, u), (_, h) in zip(pairs_of(model, (0, "mlp")), pairs_of(model, (0, "residual")), strict=True):
        rows.append((prime - u, h, torch.ones(len(h), dtype=h.dtype)))
    close(patch.matrix(0, "mlp"), row_sums(rows, norm=True)[0])
    fit = patch.entries[0, "mlp"].fit  # nothing is said of how well Δ h fits: the patch acts on u
    assert fit.rows == sum(len(u) for _, u, _ in rows) and fit.residual is fit.best_scale is None
    assert patch.entries[0, "mlp"].activation_mean is None
    assert tk.Recipe.from_dict(patch.provenance["recipe"]).mlp_activation == "residual"
    default, named = (
        tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, **options, **given)
        for given in ({}, {"mlp_activation": "input"})
    )
    assert torch.equal(default.matrix(0, "mlp"), named.matrix(0, "mlp"))
    close(named.matrix(0, "mlp"), sums(pairs_of(model, (0, "mlp")), norm=True)[0])
    assert (patch.matrix(0, "mlp") - named.matrix(0, "mlp")).norm() > 0.01 * named.matrix(0, "mlp").norm()


@pytest.mark.parametrize("pairing", ["two_pass", "layerwise", "sequential"])
def test_the_header_s_rows_have_the_same_activation(pairing: str) -> None:
    """A fit's condition is that of Z, which the header's rows with δ = 0 enter."""
    model = model_of(9)
    patch = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES, sites=("mlp",), pairing=pairing, layers=[0], estimator="mean",
        header_weight=0.6, mlp_activation="residual",
    )  # fmt: skip
    found = pairs_of(model, (0, "residual"))
    gram = sums(found)[1]
    header, chunk, e = aligned()[0]
    ids = header + chunk + e
    rows = activations(model, ids, len(ids))[0, "residual"][: len(header)]
    gram += 0.6 * len(EXAMPLES) / len(header) * rows.T @ rows
    mean = gram.trace() / len(gram)
    wanted = (gram - mean * torch.eye(len(gram), dtype=gram.dtype)).norm() / gram.norm()
    assert patch.entries[0, "mlp"].fit.anisotropy == pytest.approx(float(wanted), rel=1e-6)


def test_the_paper_recipe_takes_either_reading_of_its_activation() -> None:
    model = model_of(1)
    recipe = tk.paper_recipe(c1=0.5, c2=0.2, layers=[1, 2], steps=7, mlp_activation="residual")
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, **recipe)
    for layer in (1, 2):
        streams = zip(pairs_of(model, (layer, "mlp")), pairs_of(model, (layer, "residual")), strict=True)
        rows = [(prime - u, h, torch.ones(len(h), dtype=h.dtype)) for (prime, u), (_, h) in streams]
        close(patch.matrix(layer, "mlp"), 0.5 / 7 * row_sums(rows, norm=True)[0])
        close(patch.vector(layer, "residual"), 0.2 / 7 * sums(pairs_of(model, (layer, "residual")))[2])
