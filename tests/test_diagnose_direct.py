"""diagnose against each figure's definition written out with dense float64 matrices, nothing of the package's used.

Features are W's rows w_i; G = W Wᵀ holds all their inner products, F = WᵀW is their frame operator.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import tiny_gemma3
from patches import random_patch
from torch import Tensor

from thought_kernels.demo import CHECKPOINT
from thought_kernels.models.load import load
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.spectral import diagnose, interference

# Leverage divides by the smallest singular value of W, 2e-6 of the largest in the shipped model: eps over that.
DIRECT = 1e-8

# Grouped queries everywhere; heads times head_dim above the hidden size, below it, and equal to it.
SHAPES = {
    "wide": {"hidden_size": 30, "head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3},
    "narrow": {"hidden_size": 42, "head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1},
    "square": {"hidden_size": 24, "head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def rows(model: Any, layer: int, site: str) -> Tensor:
    """What Δ multiplies, from the state's own names."""
    state, place = model.state_dict(), f"model.layers.{layer}"
    if site == "attention":
        return state[f"{place}.self_attn.o_proj.weight"].double()
    return torch.cat([state[f"{place}.mlp.{name}_proj.weight"].double() for name in ("gate", "up")])


def eigen(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positive eigenvalues of WᵀW [r], their vectors as columns [d, r], and those of W Wᵀ [n, r]."""
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    kept = s > s[0] * 1e-10
    return s[kept].square(), vh[kept].T, u[:, kept]


def directly(W: Tensor, delta: Tensor) -> dict[str, Any]:
    """All figures of one site."""
    edited = W + W @ delta
    values, vectors, _ = eigen(W)
    spaces = [0]  # eigenvalues whose neighbours are within 1e-6 of the largest share an eigenspace
    for larger, smaller in itertools.pairwise(values.tolist()):
        spaces.append(spaces[-1] + (larger - smaller > 1e-6 * float(values[0])))
    member = torch.nn.functional.one_hot(torch.tensor(spaces)).double()  # [r, E]
    sides = {}
    for name, w in (("before", W), ("after", edited)):
        gram = w @ w.T
        norms = gram.diagonal()
        D = norms.square() / gram.square().sum(1)
        leverage = eigen(w)[2].square().sum(1)  # w F⁺ wᵀ projects on the range of w
        rayleigh = gram.square().sum(1) / norms
        image = gram @ w  # row i is F w_i
        residual = (image - rayleigh[:, None] * w).norm(dim=1) / (rayleigh * norms.sqrt())
        sides[name] = {"squared_norm": norms, "dimensionality": D, "leverage": leverage, "rayleigh": rayleigh,
                       "slack": 1 - D / leverage, "residual": residual}  # fmt: skip
    p = (W @ vectors).square() @ member / W.square().sum(1, keepdim=True)
    q = (edited @ vectors).square() @ member / edited.square().sum(1, keepdim=True)
    energy = delta.square().sum()
    squares = torch.linalg.eigvalsh(delta.T @ delta).clamp(min=0).flip(0)
    share = (squares / squares.sum()).clamp(min=1e-300)
    average = W.square().sum() / len(delta)
    return {
        **sides,
        "squares": squares,
        "stable_rank": energy / torch.linalg.matrix_norm(delta, 2) ** 2,
        "effective_rank": (-(share * share.log()).sum()).exp(),
        "strength": (W @ delta).norm() / W.norm(),
        "eigenvalues": values @ member / member.sum(0),
        "write": (vectors.T @ delta).square().sum(1) @ member / energy,
        "read": (delta @ vectors).square().sum(0) @ member / energy,
        "write_gain": (W @ delta).square().sum() / energy / average,
        "read_gain": (W @ delta.T).square().sum() / energy / average,
        "moved": (edited - W).norm(dim=1) / W.norm(dim=1),
        "transport": ((p - q).abs().sum(1) + (1 - q.sum(1)).abs()) / 2,
    }


def agree(model: Any, patch: ThoughtPatch) -> None:
    """Every figure of the report, and its summary."""
    report = diagnose(patch, model)
    assert list(report.sites) == [key for key in patch.entries if key[1] != "residual"]
    for key, found in report.sites.items():
        delta = patch.matrix(*key)
        assert delta is not None
        truth = directly(rows(model, *key), delta.double())

        def same(mine: Any, name: str, truth: dict[str, Any] = truth, key: Any = key) -> None:
            mine, wanted = torch.as_tensor(mine, dtype=torch.float64), torch.as_tensor(truth[name])
            assert mine.shape == wanted.shape, (key, name)
            error = (mine - wanted).abs().max() / wanted.abs().max()
            assert error <= DIRECT, (key, name, float(error))

        for name in ("stable_rank", "effective_rank", "strength", "write_gain", "read_gain", "eigenvalues"):
            same(getattr(found, name), name)
        for name in ("write", "read"):
            same(getattr(found, name), name)
            left = 1 - float(truth[name].sum())
            assert getattr(found, f"{name}_kernel") == pytest.approx(left, abs=DIRECT)
        same(found.singular_values.square(), "squares")
        changed = found.features
        for side in ("before", "after"):
            for name in truth[side]:
                same(getattr(getattr(changed, side), name), name, truth[side])
        same(changed.moved, "moved")
        same(changed.transport, "transport")
        before, after = (truth[side]["dimensionality"] for side in ("before", "after"))
        summary = changed.summary()
        assert summary["mean_absolute_dimensionality_change"] == pytest.approx(float((after - before).abs().mean()))
        W = rows(model, *key)
        ranks = [len(eigen(w)[0]) for w in (W, W + W @ delta.double())]
        saturations = [float(D.sum()) / rank for D, rank in zip((before, after), ranks, strict=True)]
        assert summary["saturation"] == pytest.approx(saturations, rel=1e-6)
        assert summary["largest_transport"] == pytest.approx(float(truth["transport"].max()))


def patch_for(model: Any, seed: int, **options: Any) -> ThoughtPatch:
    config = model.config
    widths = {"hidden": config.hidden_size, "attention": config.num_attention_heads * config.head_dim}
    return random_patch(seed, **{"sites": ["attention", "mlp"], **widths, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape: str, dtype: torch.dtype) -> None:
    model = tiny_gemma3(5, dtype, **SHAPES[shape])
    agree(model, patch_for(model, 1, layers=[0, 2]))


def test_low_rank_one_block_one_site_and_vectors() -> None:
    model = tiny_gemma3(6, **SHAPES["wide"])
    low = patch_for(model, 2, layers=[1], rank=3, dtype=torch.float64)
    agree(model, low)
    assert {found.rank for found in diagnose(low, model).sites.values()} == {3}
    agree(model, patch_for(model, 3, layers=[2], sites=["mlp"], vectors=False))
    agree(model, patch_for(model, 3, layers=[2], sites=["attention", "residual"]))
    whole = patch_for(model, 3, layers=[0, 2], dtype=torch.bfloat16)
    agree(model, ThoughtPatch({key: whole.entries[key] for key in ((0, "attention"), (2, "mlp"))}))


def test_the_rank_of_a_rounded_matrix_is_not_its_rounding() -> None:
    model = tiny_gemma3(6, **SHAPES["square"])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = diagnose(patch_for(model, 4, layers=[0], rank=2, dtype=dtype), model)
        assert [site.rank for site in found.sites.values()] == [2, 2], dtype


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_weights_and_patch_changes_no_ratio(scale: float) -> None:
    model = tiny_gemma3(7, torch.float64, **SHAPES["narrow"])
    patch = patch_for(model, 5, layers=[1], sites=["mlp"], dtype=torch.float64)
    wanted = diagnose(patch, model).sites[1, "mlp"]
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data *= scale
    found = diagnose(patch, model).sites[1, "mlp"]
    for name in ("strength", "write_gain", "read_gain"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=DIRECT)
    assert torch.allclose(found.features.after.dimensionality, wanted.features.after.dimensionality, rtol=DIRECT)
    assert torch.allclose(found.features.transport, wanted.features.transport, rtol=DIRECT)
    small = diagnose(1e-12 * patch, model).sites[1, "mlp"]
    assert small.write_gain == pytest.approx(wanted.write_gain, rel=DIRECT)
    assert small.strength == pytest.approx(1e-12 * wanted.strength, rel=DIRECT)


def test_shares_of_leading_directions_are_asked_for_in_words_it_knows() -> None:
    model = tiny_gemma3(7, **SHAPES["square"])
    found = diagnose(patch_for(model, 1, layers=[0], sites=["mlp"]), model).sites[0, "mlp"]
    assert found.top_share("read", 1) == pytest.approx(1 - found.read_kernel)
    with pytest.raises(ValueError, match="top_share: part must be 'write' or 'read', got 'wrote'"):
        found.top_share("wrote")
    for dimensions in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"top_share: dimensions must be in \(0, 1\], got"):
            found.top_share("read", dimensions)


def test_an_edit_that_erases_what_it_edits() -> None:
    model = tiny_gemma3(8, torch.float64, **SHAPES["square"])
    identity = torch.eye(24, dtype=torch.float64)
    changed = diagnose(ThoughtPatch({(0, "mlp"): SitePatch(-identity)}), model).sites[0, "mlp"].features
    assert float(changed.after.dimensionality.abs().max()) == 0
    assert torch.allclose(changed.moved, torch.ones_like(changed.moved))
    assert float(changed.transport.max()) == 0  # nothing is left that could lie elsewhere
    assert changed.summary()["saturation"][1] == 0


def test_weights_of_zero_are_refused() -> None:
    model = tiny_gemma3(9, **SHAPES["square"])
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.gate_proj.weight.data.zero_()
    patch = patch_for(model, 6, layers=[0])
    sentence = "model must have nonzero weights where the patch acts, got zeros at o_proj; block 0"
    with pytest.raises(ValueError, match=f"^diagnose: {sentence}"):
        diagnose(patch, model)
    with pytest.raises(ValueError, match=f"^interference: {sentence}"):
        interference(patch, [patch], model)
    half = diagnose(patch_for(model, 6, layers=[0], sites=["mlp"]), model).sites[0, "mlp"].features
    dead = len(half.moved) // 2  # gate_proj's rows come first
    for values in (half.moved, half.transport, half.before.dimensionality, half.after.leverage):
        assert float(values[:dead].abs().max()) == 0 and float(values[dead:].min()) > 0


def test_a_block_is_never_counted_from_the_end() -> None:
    class Last:
        layers, sites = (-1,), ("mlp",)

        def matrix(self, layer: int, site: str) -> Tensor:
            return torch.eye(24)

    with pytest.raises(ValueError, match="diagnose: patch must have blocks 0 to 2 only, got -1"):
        diagnose(Last(), tiny_gemma3(**SHAPES["square"]))


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError):
        diagnose(random_patch(), torch.nn.Linear(3, 3))


def test_interference_is_what_diagnose_says_of_each_other_patch() -> None:
    model = tiny_gemma3(10, torch.bfloat16, **SHAPES["wide"])
    ours = patch_for(model, 7, layers=[0, 1])
    others = [patch_for(model, 8, layers=[1, 2], size=0.5), patch_for(model, 9, layers=[2], sites=["attention"])]
    found = interference(ours, others, model)
    for other, one in zip(others, found, strict=True):
        report = diagnose(ours, model, other=other)
        assert (one.felt, one.caused) == pytest.approx((report.felt, report.caused))
        assert one.sites == {key: site.overlap for key, site in report.sites.items() if site.overlap is not None}
    assert found[1].felt == found[1].caused == 0 and not found[1].sites
    total_felt, total_caused = 0.0, 0.0
    for layer, site in ours.entries:
        if (layer, site) not in others[0].entries:
            continue
        W = rows(model, layer, site)
        A, B = (patch.matrix(layer, site).double() for patch in (ours, others[0]))  # type: ignore[union-attr]
        total_felt += float((W @ B @ A.T).square().sum() / (W @ A @ A.T).square().sum())
        total_caused += float((W @ A @ B.T).square().sum() / (W @ B @ B.T).square().sum())
    assert found[0].felt == pytest.approx((total_felt / 4) ** 0.5, rel=DIRECT)
    assert found[0].caused == pytest.approx((total_caused / 4) ** 0.5, rel=DIRECT)
    with pytest.raises(ValueError, match="interference: others must have a nonzero matrix"):
        interference(ours, [others[0], 0 * others[0]], model)


def test_the_shipped_model() -> None:
    model, _ = load(str(CHECKPOINT))
    agree(model, patch_for(model, 11, layers=[0, 5], size=0.2))
