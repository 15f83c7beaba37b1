"""What a patch touches: every figure against its definition, on patches built to lie where they are found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_multimodal_gemma3
from patches import ATTENTION, HIDDEN, MATRICES, random_patch
from torch import Tensor, nn

from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.spectral import Diagnosis, diagnose, measure_features, spectral_measure
from thought_kernels.spectral.overlap import overlap

# Two float64 computations of the same figure, decompositions of matrices of condition 100 or so included.
SAME = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_site(matrix: Tensor, site: str = "mlp", layer: int = 1) -> ThoughtPatch:
    return ThoughtPatch({(layer, site): SitePatch(matrix)})


def features(model: nn.Module, site: str = "mlp", layer: int = 1) -> Tensor:
    """The rows of the edited weights as columns."""
    block = describe(model).blocks[layer]
    modules = {"attention": (block.o_proj,), "down": (block.down_proj,)}.get(site, block.mlp_inputs)
    return torch.cat([module.weight for module in modules]).double().T


@pytest.mark.parametrize("site", MATRICES)
def test_every_figure_is_its_definition(site: str) -> None:
    model = tiny_gemma3()
    patch = random_patch(3, layers=[1], sites=[site], vectors=False, rank=4, dtype=torch.float64)
    found = diagnose(patch, model).sites[1, site]
    delta, X = patch.matrix(1, site), features(model, site)
    assert delta is not None
    d_out, d_in = delta.shape
    change = delta.T if site == "down" else delta.T @ X  # of W's rows
    assert torch.allclose(found.singular_values, torch.linalg.svdvals(delta), atol=1e-12)
    assert found.rank == 4
    energy = found.singular_values.square()
    assert found.stable_rank == pytest.approx(float(energy.sum() / energy[0]), rel=SAME)
    share = energy[:4] / energy.sum()
    assert found.effective_rank == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-6)
    assert found.strength == pytest.approx(float(change.norm() / X.norm()), rel=SAME)
    F, outputs = X @ X.T, X if site == "down" else X.T
    amplified = float((outputs @ delta).square().sum() / delta.square().sum()) / (float(F.trace()) / d_out)
    assert found.write_gain == pytest.approx(amplified, rel=SAME)
    heard = float((delta @ F @ delta.T).trace() / delta.square().sum()) / (float(F.trace()) / d_in)
    assert found.read_gain == pytest.approx(heard, rel=SAME)

    changed = found.features
    edited = X + change
    for measures, W in ((changed.before, X), (changed.after, edited)):
        for name, expected in measure_features(W)._asdict().items():
            if name != "eigenspace":
                assert torch.allclose(getattr(measures, name), expected, rtol=SAME, atol=SAME), name
    assert torch.allclose(changed.moved, (edited - X).norm(dim=0) / X.norm(dim=0))
    eigenvalues, weights, multiplicities = spectral_measure(X)
    assert torch.equal(found.multiplicities, multiplicities)
    values, basis = torch.linalg.eigh(F)
    values, basis = values.flip(0)[: len(eigenvalues)], basis.flip(1)[:, : len(eigenvalues)]
    q = (edited.T @ basis).square() / edited.square().sum(0)[:, None]
    expected = ((q - weights).abs().sum(1) + (1 - q.sum(1))) / 2  # all eigenvalues of a random matrix are distinct
    assert torch.allclose(changed.transport, expected, atol=SAME)
    written = X.T @ basis / values.sqrt() if site == "down" else basis
    assert torch.allclose(found.write, (written.T @ delta).square().sum(1) / delta.square().sum(), atol=SAME)
    assert torch.allclose(found.read, (delta @ basis).square().sum(0) / delta.square().sum(), atol=SAME)
    assert float(found.write.sum()) + found.write_kernel == pytest.approx(1, abs=SAME)
    assert float(found.read.sum()) + found.read_kernel == pytest.approx(1, abs=SAME)
    # The attention output is wider than what o_proj makes of it: the rest is o_proj's kernel, and so at down_proj.
    assert (found.write_kernel > 0.02) == (site == "attention")
    assert (found.read_kernel > 0.02) == (site != "mlp")


def test_a_patch_is_found_in_the_eigenspaces_it_was_built_in() -> None:
    model = tiny_gemma3(dtype=torch.float64)
    values, basis = torch.linalg.eigh(features(model) @ features(model).T)
    basis, values = basis.flip(1), values.flip(0)
    found = diagnose(one_site(0.3 * torch.outer(basis[:, 2], basis[:, 30])), model).sites[1, "mlp"]
    assert found.write.argmax() == 2 and found.read.argmax() == 30
    assert float(found.write[2]) == pytest.approx(1) and float(found.read[30]) == pytest.approx(1)
    assert found.write_gain == pytest.approx(float(values[2] / values.mean()))
    assert found.top_share("write") == pytest.approx(1) and found.top_share("read") == pytest.approx(0, abs=SAME)
    # 36 dimensions: a tenth are 3.6, so of an edit in the fourth eigenspace 0.6 counts.
    fourth = diagnose(one_site(torch.outer(basis[:, 3], basis[:, 0])), model).sites[1, "mlp"]
    assert fourth.top_share("write") == pytest.approx(0.6)


def test_what_is_written_into_the_kernel_does_nothing() -> None:
    model = tiny_gemma3(dtype=torch.float64)
    _, _, vh = torch.linalg.svd(features(model, "attention").T)
    patch = one_site(torch.outer(vh[-1], vh[0]), "attention")
    found = diagnose(patch, model, other=one_site(normal(ATTENTION, ATTENTION), "attention")).sites[1, "attention"]
    assert found.write_kernel == pytest.approx(1) and found.strength < 1e-7 and found.write_gain < 1e-12
    assert found.overlap is not None
    # Rows of o_proj lie outside its kernel, so no feature moves at all.
    assert float(found.features.moved.max()) < 1e-12 and float(found.features.transport.max()) < 1e-12


def test_a_rotation_of_the_spectrum_moves_features_and_a_scaling_does_not() -> None:
    model = tiny_gemma3(dtype=torch.float64)
    scaled = diagnose(one_site(0.5 * torch.eye(HIDDEN, dtype=torch.float64)), model).sites[1, "mlp"].features
    assert torch.allclose(scaled.moved, torch.tensor(0.5, dtype=torch.float64))
    assert float(scaled.transport.max()) < SAME
    assert float(scaled.dimensionality_change.abs().max()) < SAME
    rotation = torch.linalg.qr(normal(HIDDEN, HIDDEN))[0]
    rotated = diagnose(one_site(rotation.T - torch.eye(HIDDEN, dtype=torch.float64)), model).sites[1, "mlp"].features
    assert float(rotated.transport.mean()) > 0.3
    assert float(rotated.dimensionality_change.abs().max()) < SAME  # D does not change under rotations


def test_overlap_is_its_definition() -> None:
    A, B, W = normal(9, 9), normal(9, 9, seed=1), normal(14, 9, seed=2)
    found = overlap(A, B, W.T @ W)
    norm = torch.linalg.vector_norm
    assert found.read == pytest.approx(float(norm(A @ B.T) ** 2 / (norm(A.T @ A) * norm(B.T @ B))))
    written = float(norm((W @ A).T @ (W @ B)) ** 2 / (norm((W @ A).T @ (W @ A)) * norm((W @ B).T @ (W @ B))))
    assert found.write == pytest.approx(written)
    assert found.alignment == pytest.approx(float(((W @ A) * (W @ B)).sum() / (norm(W @ A) * norm(W @ B))))
    assert found.felt == pytest.approx(float(norm(W @ B @ A.T) / norm(W @ A @ A.T)))
    assert found.caused == pytest.approx(float(norm(W @ A @ B.T) / norm(W @ B @ B.T)))


def test_at_the_down_site_edits_meet_in_down_proj_s_own_output() -> None:
    patches = [random_patch(seed, layers=[1], sites=["down"], vectors=False, dtype=torch.float64) for seed in (1, 2)]
    found = diagnose(patches[0], tiny_gemma3(), other=patches[1]).sites[1, "down"].overlap
    A, B = (patch.matrix(1, "down") for patch in patches)
    assert found.felt == pytest.approx(float((B @ A.T).norm() / (A @ A.T).norm()))
    assert found.write == pytest.approx(float((A.T @ B).norm() ** 2 / ((A.T @ A).norm() * (B.T @ B).norm())))


def test_overlap_of_equal_opposite_and_separate_edits() -> None:
    F = normal(12, 8).T @ normal(12, 8)
    A = normal(8, 8, seed=1)
    same, opposite = overlap(A, 3 * A, F), overlap(A, -A, F)
    assert (same.read, same.write, same.alignment, same.felt) == pytest.approx((1, 1, 1, 3))
    assert (opposite.read, opposite.alignment, opposite.felt) == pytest.approx((1, -1, 1))
    first, second = A.clone(), A.clone()
    first[:, 4:], second[:, :4] = 0, 0  # they read different coordinates
    apart = overlap(first, second, F)
    assert apart.read == apart.felt == apart.caused == 0 and apart.write > 0


def test_the_report_covers_both_patches_and_prints() -> None:
    model = tiny_multimodal_gemma3(dtype=torch.bfloat16)
    a = random_patch(1, layers=(0, 1), vectors=True)
    b = random_patch(2, layers=(1, 2), sites=["attention"], size=0.6)
    report = diagnose(a, model, other=b)
    assert isinstance(report, Diagnosis)
    assert list(report.sites) == [(layer, site) for layer in (0, 1) for site in MATRICES]
    common = report.sites[1, "attention"].overlap
    assert common is not None and report.sites[1, "mlp"].overlap is None
    assert report.felt == pytest.approx((common.felt**2 / 6) ** 0.5)
    assert report.caused == pytest.approx((common.caused**2 / 2) ** 0.5)
    back = diagnose(b, model, other=a)
    assert (back.felt, back.caused) == pytest.approx((report.caused, report.felt))
    described = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [site["layer"] for site in described["sites"]] == [0, 0, 0, 1, 1, 1]
    assert described["sites"][3]["overlap"]["felt"] == common.felt
    assert described["sites"][1]["features"]["features"] == 2 * 52
    lines = str(report).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1 and f"felt {report.felt:.3g}" in lines[-1]
    assert diagnose(a, model).felt is None and "felt" not in str(diagnose(a, model))


class Shown:
    """No ThoughtPatch, but it has what is asked of one."""

    layers, sites = (2,), ("attention",)

    def matrix(self, layer: int, site: str) -> Tensor:
        return torch.eye(ATTENTION)


class Packed(nn.Module):
    """A projection without plain weights."""


def test_any_object_that_shows_its_matrices_will_do() -> None:
    assert list(diagnose(Shown(), tiny_gemma3()).sites) == [(2, "attention")]


def refusals() -> dict[str, tuple[Any, dict[str, Any], type[Exception], str]]:
    fine, nan = random_patch(), one_site(torch.full((HIDDEN, HIDDEN), float("nan")))
    return {
        "kind": ("patch", {}, TypeError, "patch must be a patch with layers, sites and matrix.*, got str"),
        "vectors": (random_patch(sites=["residual"]), {}, ValueError, "patch must have a nonzero matrix, got none"),
        "zero": (0.0 * fine, {}, ValueError, "patch must have a nonzero matrix, got none"),
        "block": (random_patch(layers=[5]), {}, ValueError, "patch must have blocks 0 to 2 only, got 5"),
        "width": (random_patch(hidden=20), {}, ValueError, "patch must have matrices of width 36, got \\[20, 20\\]"),
        "nan": (nan, {}, ValueError, "patch must be finite, got NaN"),
        "other": (fine, {"other": nan}, ValueError, "other must be finite, got NaN"),
        "other's block": (fine, {"other": random_patch(layers=[7])}, ValueError, "other must have blocks 0 to 2 only"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_refusals(case: str) -> None:
    patch, options, kind, sentence = refusals()[case]
    with pytest.raises(kind, match=f"^diagnose: {sentence}"):
        diagnose(patch, tiny_gemma3(), **options)


def test_weights_must_be_plain() -> None:
    model = tiny_gemma3()
    model.model.layers[2].self_attn.o_proj = Packed()
    with pytest.raises(
        ValueError,
        match="model must have plain floating weights, got test_diagnose.Packed with no weight at o_proj; block 2",
    ):
        diagnose(random_patch(), model)
