"""Patches on models that share modules between blocks, are wrapped, copied, or run again in backward."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_gemma3
from patches import hooks, random_patch, same_bits, token_ids, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import thought_kernels as tk
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch

IDS = token_ids()


def share(name: str) -> Any:
    """A model whose second block has a module of the first."""
    model = tiny_gemma3()
    first, second = model.model.layers[:2]
    path, _, last = name.rpartition(".")
    setattr(second.get_submodule(path), last, first.get_submodule(name))
    return model


def applied(patch: ThoughtPatch, model: Any, folder: Path) -> Any:
    return patch.applied(model)


def merged(patch: ThoughtPatch, model: Any, folder: Path) -> Any:
    return patch.merge_(model)


def exported(patch: ThoughtPatch, model: Any, folder: Path) -> Any:
    return patch.export_peft(folder, model)


VERBS = {"applied": applied, "merge_": merged, "export_peft": exported}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("site", "module"),
    [("attention", "self_attn"), ("attention", "self_attn.o_proj"), ("mlp", "mlp"), ("down", "mlp.down_proj")],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_module_of_two_blocks_is_not_patched(verb: str, site: str, module: str, layer: int, tmp_path: Path) -> None:
    model, patch = share(module), random_patch(layers=[layer], sites=[site], vectors=False)
    before = weights(model)
    sentence = rf"{verb}: patch must not change a module that several blocks share, .* \[0, 1\]; block {layer}, site"
    with pytest.raises(ValueError, match=sentence):
        VERBS[verb](patch, model, tmp_path / "folder")
    assert same_bits(model, before) and not hooks(model) and not (tmp_path / "folder").exists()
    VERBS[verb](random_patch(layers=[2], sites=[site], vectors=False), model, tmp_path / "folder")  # no other's module


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_a_module_of_two_names_is_not_exported(site: str, tmp_path: Path) -> None:
    model, patch = tiny_gemma3(), random_patch(layers=[0], sites=[site], vectors=False)
    block = model.model.layers[0]
    if site == "mlp":
        block.mlp.up_proj = block.mlp.gate_proj
    else:
        block.alias = block.self_attn.o_proj
    with pytest.raises(ValueError, match=rf"^export_peft: modules must not be shared, got .* block 0, site '{site}'"):
        patch.export_peft(tmp_path / "folder", model)
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="^merge_: weights must not be shared, got .* and .* as one memory"):
        patch.merge_(model)


def test_tied_weights_are_no_shared_module(tmp_path: Path) -> None:
    model, patch = tiny_gemma3(), random_patch(layers=[0], sites=["mlp"], vectors=False)
    first, second = model.model.layers[:2]
    second.mlp.gate_proj.weight = first.mlp.gate_proj.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    with patch.applied(model):
        pass
    assert not patch.export_peft(tmp_path, model).lossy


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_the_bare_model(way: Callable[[Any], Any]) -> None:
    model, patch = tiny_gemma3(), random_patch()
    bare = model(IDS).logits
    with patch.applied(model):
        patched = model(IDS).logits
        twin = way(model)
        assert torch.equal(twin(IDS).logits, bare)
        with patch.applied(twin):
            assert torch.equal(twin(IDS).logits, patched)
        assert torch.equal(twin(IDS).logits, bare) and torch.equal(model(IDS).logits, patched)
    assert torch.equal(model(IDS).logits, bare) and not torch.equal(bare, patched)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_data_parallel_models_are_the_models_inside(wrap: Callable[[Any], Any], group: None) -> None:
    model, patch = tiny_gemma3().requires_grad_(True), random_patch()
    with patch.applied(model):
        expected = model(IDS).logits
    wrapped = wrap(model)
    assert describe(wrapped).model is model
    with patch.applied(wrapped):
        assert torch.equal(wrapped(input_ids=IDS).logits, expected)
    assert tk.replay(wrapped, IDS[0], (1, 3)).logit_error == tk.replay(model, IDS[0], (1, 3)).logit_error


def gradient(model: Any, backward_inside: bool, patch: ThoughtPatch) -> Tensor:
    model.zero_grad()
    with patch.applied(model):
        loss = model(IDS, use_cache=False).logits.square().sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return model.model.layers[0].self_attn.q_proj.weight.grad.clone()


def test_blocks_that_backward_runs_again_need_the_patch() -> None:
    patch = random_patch(sites=["attention", "mlp", "down"])
    plain = tiny_gemma3(dtype=torch.float64).requires_grad_(True).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = gradient(plain, False, patch)
    model = tiny_gemma3(dtype=torch.float64).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="^applied: model should not checkpoint gradients with use_reentrant=True"):
        inside = gradient(model, True, patch)
    torch.testing.assert_close(inside, expected)
    with pytest.warns(UserWarning, match="call backward before the patch is removed"):
        assert not torch.allclose(gradient(model, False, patch), expected)  # what the warning is about
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="different number of tensors|different metadata"):
        gradient(model, False, patch)


def enabled_afterwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train().gradient_checkpointing_enable({"use_reentrant": True})


def trained_afterwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()


def by_the_user(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(layer: nn.Module, x: Tensor, *others: Any, **options: Any) -> Any:
        return checkpoint(partial(nn.Module.__call__, layer, **options), x, *others, use_reentrant=True)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call)


@pytest.mark.parametrize("begin", [enabled_afterwards, trained_afterwards, by_the_user])
def test_checkpoints_that_begin_after_the_patch_are_noticed_once(
    begin: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gemma3().requires_grad_(True).eval()
    if begin is trained_afterwards:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with random_patch(sites=["attention"]).applied(model):
            assert not caught
            with torch.no_grad():
                model(IDS)
                copied = copy.deepcopy(model)
            begin(model, monkeypatch)
            model(IDS, use_cache=False).logits.sum().backward()
            model(IDS, use_cache=False)
        begin(copied, monkeypatch)
        copied(IDS, use_cache=False)  # the patch is not in it
    told = [warning for warning in caught if str(warning.message).startswith("applied: ")]
    assert [warning.filename for warning in told] == [__file__]
    assert "call backward before the patch is removed" in str(told[0].message)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("from_pretrained", ThoughtPatch.from_pretrained),
        ("save_pretrained", random_patch().save_pretrained),
        ("export_peft", partial(random_patch().export_peft, model=None)),
    ],
)
def test_what_is_no_path_is_refused(function: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=f"^{function}: directory must be a path, got NoneType"):
        call(None)
