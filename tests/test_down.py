"""The down site: down_proj learns what the sites before it left of the block's output, and what stands behind it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import DENSE_CASES
from families import tiny as family
from models import tiny_gemma3, tiny_tokenizer
from tolerances import SOLVED, largest
from torch import Tensor
from two_forwards import activations, float64_throughout, recorded, row_sums

import thought_kernels as tk
from thought_kernels.estimation import estimators
from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.models import describe
from thought_kernels.models.decoder import Decoder
from thought_kernels.models.norm import Norm
from thought_kernels.pairing.batches import group_examples
from thought_kernels.pairing.before_norm import before_norm
from thought_kernels.pairing.pairings import PAIRINGS, Run, passes
from thought_kernels.pairing.streams import observe_difference
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import encode, load_examples

TOKENIZER = tiny_tokenizer()
INSTRUCTION = "Sum now"
EXAMPLES = [
    {"prompt": "8 7", "completion": "8 + 7"},
    {"prompt": "abc", "completion": "c"},
    {"prompt": "12 4 9", "completion": "12, 4, 9"},
]
ALL = sorted(PAIRINGS)
# δ/g is kept finite by g/(g² + this · mean g²) in place of 1/g.
GUARD = 1e-3


def model_of(seed: int = 0, **changes: object) -> Any:
    return tiny_gemma3(seed, torch.float64, vocab_size=len(TOKENIZER), **changes)


def through_the_norm(model: Any, layer: int, m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """δm and r², row by row, from the least-norm solution of the norm's Jacobian, its direction m left out."""
    norm = model.model.layers[layer].post_feedforward_layernorm
    g = 1 + norm.weight.double()
    rows, weights = [], []
    for m_row, delta_row in zip(m, delta, strict=True):
        r = (m_row.square().mean() + norm.eps) ** -0.5
        wanted = delta_row * g / (g**2 + GUARD * (g**2).mean()) / r
        unit = m_row / m_row.norm()
        rows.append(wanted - unit * unit.dot(wanted))
        weights.append(r**2)
    return torch.stack(rows), torch.stack(weights)


def without_instruction(model: Any, pairing: str, ids: tuple[list[int], list[int], list[int]], layer: int) -> dict:
    """What a patched model's block sees at e without the instruction; in layerwise, of the with-context stream."""
    header, chunk, e = ids
    if pairing != "layerwise":
        return activations(model, header + e, len(e))
    full = activations(model, header + chunk + e, len(header + chunk + e))
    kept = torch.cat([full[layer, "stream"][: len(header)], full[layer, "stream"][-len(e) :]])[None]
    module, positions = model.model.layers[layer], torch.arange(kept.shape[1])
    distance = positions[:, None] - positions[None]
    visible = (distance >= 0) & (distance < (module.self_attn.sliding_window or 10**6))
    with recorded(model) as seen, float64_throughout(), torch.no_grad():
        angles = model.model.rotary_emb(kept, positions[None], module.self_attn.layer_type)
        mask = torch.where(visible, 0.0, -torch.inf).double()[None, None]
        module(kept, position_embeddings=angles, attention_mask=mask)
    return {key: value[-len(e) :] for key, value in seen.items()}


@pytest.mark.parametrize("normalization", ["none", "norm"])
@pytest.mark.parametrize("sites", [("down",), ("attention", "down"), ("attention", "mlp", "down", "residual")])
@pytest.mark.parametrize("pairing", ALL)
def test_rows_are_those_of_a_loop_over_whole_forwards(pairing: str, sites: tuple[str, ...], normalization: str) -> None:
    """δ is what the block's output lacks once the patches of the same block's other sites are at work."""
    model = model_of(1)
    patch = tk.transmute(
        model, TOKENIZER, INSTRUCTION, EXAMPLES, sites=sites, pairing=pairing, ridge=0.2, header_weight=0.0,
        normalization=normalization,
    )  # fmt: skip
    for layer in range(3):
        before = {
            key: entry
            for key, entry in patch.entries.items()
            if (key[0] < layer and pairing == "sequential") or (key[0] == layer and key[1] != "down")
        }
        rows = []
        for example in EXAMPLES:
            ids = tk.align(TOKENIZER, INSTRUCTION, example)
            prime = activations(model, ids.H + ids.I + ids.e, len(ids[2]))
            if before:
                with ThoughtPatch(before).applied(model):
                    plain = without_instruction(model, pairing, ids, layer)
            else:
                plain = without_instruction(model, pairing, ids, layer)
            delta, share = through_the_norm(model, layer, plain[layer, "m"], prime[layer, "y"] - plain[layer, "y"])
            rows.append((delta, plain[layer, "down"], share))
        cross, gram, _ = row_sums(rows, normalization == "norm")
        wanted = estimators.ridge_solve(cross, gram, 0.2)
        assert largest(patch.matrix(layer, "down") - wanted) <= SOLVED * largest(wanted)


def without_norm(decoder: Decoder) -> Decoder:
    """The same decoder with nothing between its MLPs and the residual stream, as Llama has it."""
    blocks = tuple(dataclasses.replace(block, post_feedforward_norm=None) for block in decoder.blocks)
    return dataclasses.replace(decoder, blocks=blocks)


def fitted(decoder: Decoder, pairing: str, sites: tuple[str, ...]) -> ThoughtPatch:
    """The first example's patch at the first block, exact at the down site and rough at others; no header rows."""
    accumulator = ThoughtAccumulator(dtype=torch.float64)

    def solve(layers: frozenset[int], sites: frozenset[str]) -> ThoughtPatch:
        parts = [
            accumulator.solve("exact" if site == "down" else "ridge", ridge=3.0, layers=layers, sites=[site])
            for site in sites
        ]
        return sum(parts[1:], parts[0])

    encoded = [encode(TOKENIZER, INSTRUCTION, example) for example in load_examples(EXAMPLES[:1])]
    run = Run(
        decoder=decoder, groups=group_examples(encoded, 1, "all", torch.float64), layers=frozenset({0}),
        sites=frozenset(sites), accumulator=accumulator, tick=lambda: None, header_weight=0.0,
        solve=solve,
    )  # fmt: skip
    with torch.no_grad():
        PAIRINGS[pairing](run)
    return solve(run.layers, run.sites)


@pytest.mark.parametrize("sites", [("down",), ("attention", "down"), ("mlp", "down", "residual")])
@pytest.mark.parametrize("pairing", ALL)
def test_without_a_norm_the_output_is_met_exactly(pairing: str, sites: tuple[str, ...]) -> None:
    """Fewer tokens than z is wide: M z = y' − y at each of them, however rough the sites before it were."""
    model = model_of(2, sliding_window=64)
    decoder = without_norm(describe(model))
    patch = fitted(decoder, pairing, sites)
    header, chunk, e = tk.align(TOKENIZER, INSTRUCTION, EXAMPLES[0])
    assert len(e) < decoder.blocks[0].mlp_width

    def output(ids: list[int]) -> Tensor:
        """What leaves block 0 at e."""
        seen: list[Tensor] = []
        hook = model.model.layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out[0, -len(e) :]))
        decoder.forward(torch.tensor([ids]))
        hook.remove()
        return seen[0]

    wanted, bare = output(header + chunk + e), output(header + e)
    with patch.applied(model):
        assert largest(output(header + e) - wanted) <= SOLVED * largest(wanted - bare)
    others = [entry for entry in patch.entries.items() if entry[0][1] != "down"]
    if others:
        with ThoughtPatch(dict(others)).applied(model):
            assert largest(output(header + e) - wanted) > 0.1 * largest(wanted - bare)


def norm_of(g: Tensor) -> Norm:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(g)
    return Norm(module, 1e-12, 0.0)


def test_the_way_back_through_the_norm_is_right_to_first_order() -> None:
    torch.manual_seed(0)
    m, delta, g = torch.randn(2, 5, 24).double(), torch.randn(2, 5, 24).double(), torch.rand(24).double() + 0.5
    norm = norm_of(g)
    unit = m / m.norm(dim=-1, keepdim=True)
    reached = delta / g - unit * (unit * delta / g).sum(-1, keepdim=True)  # along m nothing can be reached
    delta = reached * (g + GUARD * g.square().mean() / g)  # the guard takes this factor off again
    errors = []
    for size in (1e-2, 1e-3):
        change, weight = before_norm(norm, m, size * delta)
        errors.append(largest(norm(m + change) - norm(m) - size * g * reached) / size)
        torch.testing.assert_close(weight, 1 / m.square().mean(-1))
    assert errors[0] < 1e-1
    assert errors[1] < 0.15 * errors[0] + 1e-9  # the error falls with δ
    along = before_norm(norm, m, delta)[0] @ m.transpose(-1, -2)
    assert largest(along.diagonal(dim1=-2, dim2=-1)) < 1e-12


def test_rows_that_are_not_finite_keep_their_weight() -> None:
    m, delta = torch.randn(3, 4), torch.randn(3, 4)
    m[0, 1], m[2, 0] = torch.nan, torch.inf
    change, weight = before_norm(norm_of(torch.ones(4)), m, delta)
    assert weight.tolist()[::2] == [1, 1] and weight[1] != 1
    assert change.isnan().any(-1).tolist() == [True, False, True]


def test_nothing_stands_between_where_there_is_no_norm() -> None:
    m, delta = torch.randn(3, 4), torch.randn(3, 4)
    change, weight = before_norm(None, m, delta)
    assert torch.equal(change, delta) and torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("pairing", ALL)
def test_header_rows_enter_with_zero_delta(pairing: str) -> None:
    model = model_of(5)
    options = {"pairing": pairing, "layers": [0], "ridge": 0.1, "sites": ("down",)}
    patch = tk.transmute(model, TOKENIZER, INSTRUCTION, EXAMPLES, header_weight=0.6, **options)
    rows = []
    for example in EXAMPLES:
        header, chunk, e = tk.align(TOKENIZER, INSTRUCTION, example)
        prime, plain = activations(model, header + chunk + e, len(e)), activations(model, header + e, len(header + e))
        m, y = (plain[0, name][-len(e) :] for name in "my")
        delta, share = through_the_norm(model, 0, m, prime[0, "y"] - y)
        rows.append((delta, plain[0, "down"][-len(e) :], share))
        m = plain[0, "m"][: len(header)]
        delta, share = through_the_norm(model, 0, m, torch.zeros_like(m))
        rows.append((delta, plain[0, "down"][: len(header)], 0.6 * share))
    cross, gram, _ = row_sums(rows)
    wanted = estimators.ridge_solve(cross, gram, 0.1)
    assert largest(patch.matrix(0, "down") - wanted) <= SOLVED * largest(wanted)


def test_there_are_as_many_passes_as_stages() -> None:
    sites = frozenset({"attention", "mlp", "down", "residual"})
    assert [passes("layerwise", sites & chosen) for chosen in (sites, {"mlp", "down"}, {"down"})] == [3, 2, 1]
    assert passes("sequential", sites) == 1


def test_hooks_inside_the_mlp_take_part() -> None:
    """z is what down_proj is given, also where a hook changes it."""
    model = model_of(6)
    block = describe(model).blocks[1]
    u = torch.randn(1, 3, 36).double()
    m, z = block.mlp_activation(u)
    handle = block.down_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    doubled_m, doubled_z = block.mlp_activation(u)
    handle.remove()
    assert torch.equal(doubled_z, 2 * z) and torch.equal(doubled_m, 2 * m)
    assert not block.down_proj._forward_pre_hooks


@pytest.mark.parametrize("share", [0.1, 0.001])
@pytest.mark.parametrize("name", DENSE_CASES)
def test_small_differences_keep_their_accuracy_in_narrow_models(name: str, share: float) -> None:
    """As a share of the activations they are differences of; subtracted in bfloat16 they would be rounding."""
    narrow = family(name, 0, torch.bfloat16)
    wide = family(name, 0, torch.bfloat16).double()  # the same numbers
    generator, width = torch.Generator().manual_seed(0), describe(narrow).blocks[1].attention_width
    shapes = {"x": describe(narrow).hidden_size, "o": width, "delta": width}
    drawn = {name: torch.randn(3, 11, size, generator=generator).bfloat16() for name, size in shapes.items()}
    drawn["delta"] *= share

    def observed(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        decoder = describe(model)
        run: Any = SimpleNamespace(
            decoder=decoder, update=lambda _, site, delta, *rest: found.update({site: delta}),
            mlp_rows=lambda u, h: u,
        )  # fmt: skip
        batch: Any = SimpleNamespace(weights=torch.ones(3, 11))
        x, o = drawn["x"].to(decoder.dtype), drawn["o"].to(decoder.dtype)
        stage = frozenset({"mlp", "residual", "down"})
        observe_difference(run, decoder.blocks[1], x, o, drawn["delta"].to(dtype), batch, stage, None)
        return found

    found, truth = observed(narrow, torch.float32), observed(wide, torch.float64)
    for site, delta in found.items():
        error = torch.linalg.vector_norm(delta.double() - truth[site])
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * torch.linalg.vector_norm(truth[site])
