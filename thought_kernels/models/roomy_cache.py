"""Keys and values of a layer with room for what is still to come.

transformers' own growing cache copies all of a layer's keys and values for every token that is written: behind a prompt
of 300 tokens that takes longer than the matrix products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 256  # tokens of an answer at first: most need no more, and callers may allow for thousands


class RoomyLayer(DynamicLayer):
    """As DynamicLayer, in memory that is taken once: a token's keys and values are written behind the others.

    When that is full, half as much again is taken. It does what the package's own generation asks of it: it is read,
    grows, and loses rows. The rest of what transformers' layers do would leave its memory behind, and is refused.

    Args:
        held: a layer of one row, whose contents every row begins with.
        rows: how many.
        room: places behind them at first.
    """

    def __init__(self, held: DynamicLayer, rows: int, room: int) -> None:
        super().__init__()
        assert held.keys is not None and held.values is not None
        self.lazy_initialization(held.keys, held.values)
        length = held.keys.shape[-2]
        self._places = [
            _with_room(tensor.expand(rows, -1, -1, -1), length + room) for tensor in (held.keys, held.values)
        ]
        self._fill(length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, Hkv, T, D] behind what is there; both with all that came before."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if stop > self._places[0].shape[2]:
            self._places = [_with_room(tensor, stop + stop // 2) for tensor in (self.keys, self.values)]
        for places, states in zip(self._places, (key_states, value_states), strict=True):
            places[:, :, start:stop] = states
        return self._fill(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        length = self.get_seq_length()
        self._places = [places[indices.to(places.device)] for places in self._places]
        self._fill(length)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RoomyLayer: the cache must only be read, grow and lose rows, got another call")

    batch_repeat_interleave = reorder_cache = crop = reset = offload = prefetch = _refuse

    def _fill(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (places[:, :, :length] for places in self._places)
        self.keys, self.values = keys, values
        return keys, values


def _with_room(held: Tensor, length: int) -> Tensor:
    """[B, Hkv, P, D] at the beginning of [B, Hkv, length, D]."""
    places = held.new_empty(*held.shape[:2], length, held.shape[3])
    places[:, :, : held.shape[2]] = held
    return places


def repeated(cache: Any, rows: int, width: int, room: int = 0) -> None:
    """Repeats a cache of one row, in place.

    A layer that slides is as any other where its window holds all that may come; else, and where it is of another kind,
    it stays what it is.

    Args:
        cache: of transformers.
        rows: how many it shall have.
        width: tokens of each row that come first, together.
        room: tokens at most that may follow them.
    """
    for index, layer in enumerate(cache.layers):
        grows = type(layer) is DynamicLayer or (
            type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() + width + room <= layer.sliding_window
        )
        if grows and layer.get_seq_length():
            cache.layers[index] = RoomyLayer(layer, rows, width + min(room, _ROOM))
        else:
            layer.batch_repeat_interleave(rows)
