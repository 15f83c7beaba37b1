"""Tokens that a patch writes towards, on patches built to write one."""

from __future__ import annotations

import pytest
import torch
from models import tiny_gemma3
from patches import random_patch

from thought_kernels.models import describe
from thought_kernels.models.linear import linear_weight
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.patches.site import SitePatch
from thought_kernels.spectral.written import written_tokens


def test_a_token_that_is_written_comes_first_and_its_gain_is_the_formula() -> None:
    model = tiny_gemma3()
    decoder = describe(model)
    U = linear_weight(decoder.lm_head).detach().double()
    U = U - U.mean(0)
    down, o_proj = (
        linear_weight(getattr(decoder.blocks[1], name)).detach().double() for name in ("down_proj", "o_proj")
    )
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(down.shape[1], generator=generator, dtype=torch.float64)
    token = 7
    M = torch.outer(U[token], read)
    # W Δ = u rᵀ has the least-squares solution Δ = W⁺ u rᵀ; o_proj may not reach all of u.
    reach = torch.linalg.pinv(o_proj) @ U[token]
    delta = torch.outer(reach, torch.randn(o_proj.shape[1], generator=generator, dtype=torch.float64))
    patch = ThoughtPatch({(1, "down"): SitePatch(M), (1, "attention"): SitePatch(delta)})
    names = [f"token {i}" for i in range(len(U))]
    found = written_tokens(patch, model, names, count=len(U))
    assert found.keys() == {(1, "down"), (1, "attention")}
    assert found[1, "down"][0].name == "token 7"
    assert found[1, "down"][0].gain == pytest.approx(U.shape[1], rel=1e-4)  # all of it, in one of d directions
    for key, change in (((1, "down"), M), ((1, "attention"), o_proj @ delta)):
        gains = U.shape[1] * (U @ change).square().sum(1) / U.square().sum(1) / change.square().sum()
        told = {written.name: written.gain for written in found[key]}
        assert [told[name] for name in names] == pytest.approx(gains.tolist(), rel=1e-3, abs=1e-5)
        assert [one.gain for one in found[key]] == sorted(told.values(), reverse=True)
    assert [one.name for one in written_tokens(patch, model, count=1)[1, "down"]] == ["7"]
    with pytest.raises(ValueError, match="written_tokens: names must be"):
        written_tokens(patch, model, ["a"])


def test_the_mlp_site_writes_into_no_stream() -> None:
    model = tiny_gemma3()
    found = written_tokens(random_patch(), model, count=3)
    assert found and all(site != "mlp" for _, site in found)
    # Chance gives 1 on average over directions; a random patch's best of the vocabulary is not far above it.
    assert all(0 < one.gain < 30 for tokens in found.values() for one in tokens)
