"""ThoughtPatch as a value: arithmetic, truncation, what it says of itself."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patches import ATTENTION, HIDDEN, INTERMEDIATE, MATRICES, random_patch
from tolerances import FLOORS, largest, rounding

import thought_kernels as tk
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import Fit, SitePatch

# Products of factors of at most 5 columns by two ways, each of which rounds sums of so many terms.
PRODUCT = 2 * rounding(5, torch.float32)
# Rounding of a float64 singular value decomposition of these sizes.
SVD = 1e-12


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert largest(actual - expected) <= relative * largest(expected)


@pytest.mark.parametrize("rank", [None, 3])
def test_numbers_scale_matrices_and_vectors(rank: int | None) -> None:
    patch = random_patch(rank=rank)
    for scaled, factor in (
        (2 * patch, 2.0),
        (patch * 0.5, 0.5),
        (-patch, -1.0),
        (patch * torch.tensor(3.0).item(), 3.0),
    ):
        assert scaled.entries.keys() == patch.entries.keys()
        for layer, site in patch.entries:
            assert_near(scaled.vector(layer, site), factor * patch.vector(layer, site), 0.0)
            if site != "residual":
                assert_near(scaled.matrix(layer, site), factor * patch.matrix(layer, site), PRODUCT)
                assert scaled.entries[layer, site].rank == rank
    assert (2 * patch).provenance["factor"] == 2.0
    assert (2 * patch * 3).provenance["factor"] == 6.0


def test_sums_cover_the_union() -> None:
    a, b = random_patch(1, layers=(0, 1), sites=("attention",)), random_patch(2, layers=(1, 2), sites=MATRICES)
    total = a + b
    assert total.layers == (0, 1, 2)
    assert total.sites == ("attention", "mlp", "down")
    assert torch.equal(total.matrix(0, "attention"), a.matrix(0, "attention"))
    assert torch.equal(total.matrix(1, "attention"), a.matrix(1, "attention") + b.matrix(1, "attention"))
    assert torch.equal(total.vector(1, "attention"), a.vector(1, "attention") + b.vector(1, "attention"))
    assert torch.equal(total.matrix(2, "mlp"), b.matrix(2, "mlp"))
    assert total.matrix(0, "mlp") is None
    assert total.vector(0, "mlp") is None
    nothing = total - a - b
    assert max(largest(nothing.matrix(*key)) for key in nothing.entries) <= FLOORS[torch.float32] * largest(
        total.matrix(1, "attention")
    )


def test_low_rank_sums_become_dense_where_that_is_smaller() -> None:
    a, b = (random_patch(seed, rank=10, vectors=False) for seed in range(2))
    for key, entry in (a + b).entries.items():
        if key[1] == "residual":
            continue
        d_out, d_in = entry.output_width, entry.input_width
        assert (entry.rank is None) == (20 * (d_out + d_in) >= d_out * d_in)
        torch.testing.assert_close(entry.dense(), a.matrix(*key) + b.matrix(*key))


def test_low_rank_sums_stay_low_rank_and_mixed_ones_become_dense() -> None:
    a, b, dense = random_patch(1, rank=2), random_patch(2, rank=3), random_patch(3)
    key = (0, "attention")
    assert (a + b).entries[key].rank == 5
    assert_near((a + b).matrix(*key), a.matrix(*key) + b.matrix(*key), PRODUCT)
    assert (a + dense).entries[key].rank is None
    assert_near((a + dense).matrix(*key), a.matrix(*key) + dense.matrix(*key), PRODUCT)


def test_patches_of_other_models_do_not_add() -> None:
    with pytest.raises(ValueError, match="share one hidden size, got 36 and 24"):
        random_patch() + random_patch(hidden=24)
    with pytest.raises(ValueError, match="share one width, got 40 and 48; block 0, site 'attention'"):
        random_patch(sites=("attention",)) + random_patch(attention=48, sites=("attention",))
    with pytest.raises(ValueError, match=r"share one width per site, got \[40, 48\]"):
        random_patch(layers=(0,), sites=("attention",)) + random_patch(attention=48, layers=(1,), sites=("attention",))
    with pytest.raises(TypeError):
        random_patch() + 1
    with pytest.raises(TypeError):
        random_patch() * random_patch()
    with pytest.raises(ValueError, match="factor must be finite, got nan"):
        math.nan * random_patch()


def test_fits_survive_only_where_they_still_hold() -> None:
    patch = random_patch()
    key = (0, "attention")
    assert (patch * 2).entries[key].fit == Fit(7, None, math.inf, 0.1)
    assert patch.truncate(2).entries[key].fit == Fit(7, None, math.inf, 0.1)
    assert (patch + patch).entries[key].fit is None
    disjoint = random_patch(layers=(0,)) + random_patch(layers=(1,))
    assert disjoint.entries[key].fit == Fit(7, 0.25, math.inf, 0.1)


def test_vectors_of_sums_fold_along_a_mean_of_means() -> None:
    a, b = random_patch(1), random_patch(2)
    bare = random_patch(3, vectors=False)
    key = (0, "mlp")
    means = [patch.entries[key].activation_mean for patch in (a, b)]
    assert torch.equal((a + b).entries[key].activation_mean, (means[0] + means[1]) / 2)
    assert torch.equal((a + bare).entries[key].activation_mean, means[0])
    assert torch.equal((bare + b).entries[key].activation_mean, means[1])
    assert (bare + bare).entries[key].activation_mean is None


def test_provenance_says_where_sums_come_from() -> None:
    a = random_patch(provenance={"instruction": "sum", "model": "tiny", "date": "1"})
    b = random_patch(provenance={"instruction": "sort", "model": "tiny"})
    c = random_patch(provenance={"instruction": "max", "model": "tiny"})
    joined = (a + b + c).provenance
    assert joined["model"] == "tiny"
    assert joined["hidden_size"] == HIDDEN
    assert "instruction" not in joined
    assert [part["instruction"] for part in joined["parts"]] == ["sum", "sort", "max"]
    later = random_patch(provenance={"instruction": "sum", "model": "tiny", "date": "2"})
    assert (a + later).provenance == a.provenance


def test_a_sum_remembers_what_either_side_knows_of_the_model() -> None:
    known = random_patch(0, provenance={"num_hidden_layers": 3})
    for joined in (known + random_patch(1), random_patch(1) + known):
        assert joined.provenance["num_hidden_layers"] == 3


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, 1, 4, 12]), st.integers(0, 99))
def test_truncation_is_the_best_approximation_of_its_rank(d: int, rank: int, stored: int | None, seed: int) -> None:
    patch = random_patch(
        seed, layers=(0,), sites=("mlp",), hidden=d, rank=stored and min(stored, d), dtype=torch.float64
    )
    dense = patch.matrix(0, "mlp")
    short = patch.truncate(rank)
    u, s, vh = torch.linalg.svd(dense)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    # The best approximation itself is ill-defined where singular values meet; its error is not.
    error = torch.linalg.matrix_norm(short.matrix(0, "mlp") - dense)
    assert abs(error - torch.linalg.matrix_norm(best - dense)) <= SVD * (1 + s[0])
    assert short.entries[0, "mlp"].rank <= rank
    assert torch.equal(short.vector(0, "mlp"), patch.vector(0, "mlp"))


def test_truncation_needs_a_positive_rank() -> None:
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="rank must be a positive integer, got"):
            random_patch().truncate(rank)


def test_norm_of_factors_is_that_of_their_product() -> None:
    entry = random_patch(rank=3).entries[0, "mlp"]
    assert entry.norm() == pytest.approx(float(entry.dense().norm()), rel=1e-5)
    assert random_patch().entries[0, "residual"].norm() == 0


def test_print_shows_each_block_and_site() -> None:
    text = str(random_patch(rank=3, provenance={"instruction": "sum the numbers"}))
    lines = text.splitlines()
    assert lines[0] == "ThoughtPatch(hidden size 36, blocks 0, 2, sites attention, mlp, down, residual)"
    assert "  instruction: sum the numbers" in lines
    assert [line.split()[:3] for line in lines if line.split()[0] in ("0", "2")] == [
        [layer, site, rank]
        for layer in "02"
        for site, rank in (("attention", "3"), ("mlp", "3"), ("down", "3"), ("residual", "–"))
    ]
    assert lines[-3].split()[-5:] == ["0.25", "inf", "–", "–", "–"]
    assert lines[-1].startswith("  condition inf: Z is singular")
    assert "–" in str(random_patch() * 2)


def test_print_sums_up_a_real_model_s_blocks() -> None:
    patch = random_patch(layers=(*range(9), 11), sites=("attention", "residual"), provenance={"instruction": "a" * 999})
    scaled = {key: entry.scaled(1.0 + key[0]) for key, entry in patch.entries.items()}
    patch = ThoughtPatch(scaled, patch.provenance)
    lines = str(patch).splitlines()
    assert lines[1] == f"  instruction: {'a' * 200}… (999 characters)"
    assert lines[2].split() == ["site", "blocks", "rank", "‖Δ‖", "‖v‖", "condition"]
    norms = [entry.norm() for (_, site), entry in patch.entries.items() if site == "attention"]
    assert f" 0–8, 11  full  {min(norms):.3g}–{max(norms):.3g}" in lines[3] and lines[3].split()[0] == "attention"
    assert lines[4].split()[:4] == ["residual", "0–8,", "11", "–"]
    assert lines[5].endswith("shows all 20") and len(lines) == 7
    assert len(patch.table().splitlines()) == 24 and "a" * 999 in patch.table()


def test_print_tells_how_far_rows_are_from_spherical_ones() -> None:
    fit = Fit(7, 0.25, 12.5, None, 0.625, 0.0375, 0.0875)
    lines = str(ThoughtPatch({(0, "mlp"): SitePatch(torch.eye(3), fit=fit)})).splitlines()
    assert lines[1].split()[-5:] == ["best", "λ", "anisotropy", "d/tr", "Z"]
    assert lines[2].split()[-5:] == ["0.25", "12.5", "0.0875", "0.625", "0.0375"]
    assert lines[3:] == [
        "  residual: the share of the differences left on the fitted rows; what it is worth only answers say",
        "  best λ: the scale that leaves the least residual",
        "  anisotropy 0: Z is a multiple of 1, the rows are spherical, and best for 'mean' is d/tr Z",
    ]
    assert len(lines[1]) == len(lines[2]) and "anisotropy 0" not in str(random_patch())


def test_to_moves_every_tensor() -> None:
    for patch in (random_patch(), random_patch(rank=2)):
        moved = patch.to(dtype=torch.float64)
        assert {t.dtype for entry in moved.entries.values() for t in entry.tensors().values()} == {torch.float64}
        assert {t.dtype for entry in patch.entries.values() for t in entry.tensors().values()} == {torch.float32}
        assert moved.provenance == patch.provenance


def test_hidden_size_comes_from_the_sites_or_the_provenance() -> None:
    assert random_patch(sites=("mlp",), provenance={"hidden_size": 1}).hidden_size == HIDDEN
    entry = random_patch().entries[0, "attention"]
    assert entry.output_width == entry.input_width == ATTENTION
    down = random_patch().entries[0, "down"]
    assert (down.output_width, down.input_width) == (HIDDEN, INTERMEDIATE)
    assert ThoughtPatch({(0, "down"): down}).hidden_size == HIDDEN
    assert ThoughtPatch({(0, "attention"): entry}).hidden_size is None
    assert ThoughtPatch({(0, "attention"): entry}, {"hidden_size": 36}).hidden_size == 36
    assert tk.ThoughtPatch is ThoughtPatch


_SQUARE, _VECTOR = torch.ones(3, 3), torch.ones(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThoughtPatch({}), "entries must hold at least one block and site"),
        (lambda: ThoughtPatch({(-1, "mlp"): SitePatch(_SQUARE)}), "layer must be a 0-based block index, got -1"),
        (lambda: ThoughtPatch({(0, "head"): SitePatch(_SQUARE)}), "site must be one of attention, mlp, down, residual"),
        (lambda: ThoughtPatch({(0, "residual"): SitePatch(_SQUARE)}), "'residual' must have a vector, got none"),
        (lambda: ThoughtPatch({(0, "residual"): SitePatch(_SQUARE, None, _VECTOR)}), "a vector only, got a matrix"),
        (lambda: SitePatch(), "must be given, got none of them"),
        (lambda: SitePatch(_SQUARE, (_SQUARE, _SQUARE)), "got both"),
        (lambda: ThoughtPatch({(0, "mlp"): SitePatch(torch.ones(3, 4))}), "'mlp' must have one width, got 3 from 4"),
        (lambda: SitePatch(torch.ones(3, 4, 5)), r"matrix must have shape \[3, 5\], got \[3, 4, 5\]"),
        (lambda: SitePatch(torch.ones(3, 4), None, torch.ones(4)), r"vector must have shape \[3\], got \[4\]"),
        (
            lambda: ThoughtPatch({(i, "down"): SitePatch(torch.ones(3, 4 + i)) for i in (0, 1)}),
            r"share one width per site, got \[4, 5\]",
        ),
        (lambda: SitePatch(_SQUARE, None, torch.ones(4)), r"vector must have shape \[3\], got \[4\]"),
        (
            lambda: SitePatch(None, (torch.ones(3, 2), torch.ones(3, 1))),
            r"right must have shape \[3, 2\], got \[3, 1\]",
        ),
    ],
)
def test_malformed_patches_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_patches_can_be_copied_and_sent_to_other_processes() -> None:
    patch = random_patch(rank=2, provenance={"instruction": "sum"})
    for copied in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch))):
        assert copied.provenance == patch.provenance and str(copied) == str(patch)
        assert torch.equal(copied.matrix(2, "mlp"), patch.matrix(2, "mlp"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_matrices_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"matrix must be float16, bfloat16, float32 or float64, got {dtype}"):
        SitePatch(torch.ones(3, 3).to(dtype))
