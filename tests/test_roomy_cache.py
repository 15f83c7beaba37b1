"""The cache of the package's own generation: what transformers' own holds, without a copy of it for every token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import tiny_gemma3
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from thought_kernels.generation import prefix
from thought_kernels.generation.continuations import continue_prompts
from thought_kernels.models import roomy_cache
from thought_kernels.models.roomy_cache import RoomyLayer, RoomySlidingLayer, repeated

PREFIX, ROWS = 5, 3


def states(seed: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2))
    return keys, values


def filled(layer: Any) -> Any:
    layer.update(*states(0, 1, PREFIX))
    return layer


def cache_of(*layers: Any) -> Any:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def same_steps(ours: Any, theirs: Any, steps: int, rows: int = ROWS) -> None:
    """Both layers say the same of every step; the first has several tokens."""
    for step in range(steps):
        new = states(step + 1, rows, 4 if step == 0 else 1)
        assert ours.get_mask_sizes(new[0].shape[2]) == theirs.get_mask_sizes(new[0].shape[2])
        for found, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("room", [0, 2, 30])
def test_a_layer_holds_what_transformers_own_does_however_little_room_there_was(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roomy_cache, "_ROOM", room)
    theirs = filled(DynamicLayer())
    cache = cache_of(copy.deepcopy(theirs))
    repeated(cache, ROWS, 4, room=16)
    assert isinstance(cache.layers[0], RoomyLayer)
    theirs.batch_repeat_interleave(ROWS)
    same_steps(cache.layers[0], theirs, steps=9)
    left = torch.tensor([0, 2])
    for layer in (cache.layers[0], theirs):
        layer.batch_select_indices(left)
    same_steps(cache.layers[0], theirs, steps=9, rows=2)


@pytest.mark.parametrize("layer", [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)])
def test_no_token_moves_the_keys_before_it(layer: Any) -> None:
    cache = cache_of(filled(layer))
    repeated(cache, ROWS, 1, room=19)
    places = set()
    for step in range(20):
        shown = cache.layers[0].update(*states(step, ROWS, 1))
        places.add(tuple(tensor.untyped_storage().data_ptr() for tensor in shown))
    assert len(places) == 1


@pytest.mark.parametrize("room", [0, 3, 30])
@pytest.mark.parametrize("window", [PREFIX + 12, PREFIX + 4, PREFIX + 1, PREFIX, 3, 2])
def test_a_layer_that_slides_shows_what_transformers_own_does(
    window: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roomy_cache, "_ROOM", room)
    theirs = filled(DynamicSlidingWindowLayer(sliding_window=window))
    cache = cache_of(copy.deepcopy(theirs))
    repeated(cache, ROWS, 4, room=8)
    assert isinstance(cache.layers[0], RoomySlidingLayer) and cache.layers[0].is_sliding
    theirs.batch_repeat_interleave(ROWS)
    same_steps(cache.layers[0], theirs, steps=9)  # 4 + 8 tokens
    left = torch.tensor([0, 2])
    for layer in (cache.layers[0], theirs):
        layer.batch_select_indices(left)
    same_steps(cache.layers[0], theirs, steps=9, rows=2)


def test_what_a_window_left_behind_does_not_stay_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roomy_cache, "_ROOM", 8)
    theirs = filled(DynamicSlidingWindowLayer(sliding_window=4))
    cache = cache_of(copy.deepcopy(theirs))
    repeated(cache, ROWS, 40, room=60)
    theirs.batch_repeat_interleave(ROWS)
    for step, length in enumerate((40, *[1] * 60)):
        new = states(step, ROWS, length)
        for found, wanted in zip(cache.layers[0].update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        held = cache.layers[0].keys.untyped_storage().nbytes() / (ROWS * 2 * 4 * 4)
        assert held <= 4 + 2 * 8 + 1


def test_layers_of_other_kinds_stay_what_they_are() -> None:
    class Other(DynamicLayer):
        pass

    cache = cache_of(filled(Other()), DynamicLayer())  # the second holds nothing yet
    repeated(cache, ROWS, 4, room=8)
    assert [type(layer) for layer in cache.layers] == [Other, DynamicLayer]
    assert cache.layers[0].keys.shape[0] == ROWS


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [64, 8])
def test_a_model_says_the_same_behind_it(attention: str, window: int) -> None:
    model = tiny_gemma3(1, attention=attention, sliding_window=window)
    generator = torch.Generator().manual_seed(0)
    prefix, rows = (torch.randint(6, 40, shape, generator=generator) for shape in ((1, PREFIX), (ROWS, 9)))
    caches = []
    with torch.no_grad():
        for ours in (True, False):
            cache = DynamicCache(config=model.config)
            model(prefix, past_key_values=cache)
            if ours:
                repeated(cache, ROWS, 4, room=5)
            else:
                cache.batch_repeat_interleave(ROWS)
            caches.append(cache)
        for tokens in rows.split([4, 1, 1, 3], dim=1):
            found, wanted = (model(tokens, past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["batch_repeat_interleave", "reorder_cache", "crop", "reset", "offload", "prefetch"])
def test_what_would_leave_its_memory_behind_is_refused(call: str) -> None:
    layer = RoomyLayer(filled(DynamicLayer()), ROWS, 4)
    with pytest.raises(NotImplementedError, match="RoomyLayer"):
        getattr(layer, call)(2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_uneven_rows_that_end_early_are_written_as_behind_transformers_own_cache(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gemma3(1, attention=attention, sliding_window=64)
    generator = torch.Generator().manual_seed(3)
    lengths = (3, 7, 1, 5)
    first = torch.randint(6, 40, (PREFIX,), generator=generator).tolist()
    prompts = [[*first, *torch.randint(6, 40, (length,), generator=generator).tolist()] for length in lengths]

    def write() -> list[list[int]]:
        return continue_prompts(
            model, prompts, lambda answer: len(answer) % 5 == answer[0] % 5, max_new_tokens=12, batch_size=4
        )

    found = write()
    monkeypatch.setattr(prefix, "repeated", lambda cache, rows, width, room: cache.batch_repeat_interleave(rows))
    assert found == write()
    assert len({len(answer) for answer in found}) > 1
