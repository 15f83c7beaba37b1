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

    _places: list[Tensor]  # keys and values, [B, Hkv, places, D]
    _first: int  # of those that are shown
    _stop: int

    def __init__(self, held: DynamicLayer, rows: int, room: int) -> None:
        super().__init__()
        assert held.keys is not None and held.values is not None
        self.lazy_initialization(held.keys, held.values)
        self._begin([tensor.expand(rows, -1, -1, -1) for tensor in (held.keys, held.values)], room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, Hkv, T, D] behind what is there; both with all that came before."""
        count = key_states.shape[-2]
        if self._stop + count > self._places[0].shape[2]:
            self._begin(list(self._shown(self._first)), count + (self._stop - self._first) // 2)
        for places, states in zip(self._places, (key_states, value_states), strict=True):
            places[:, :, self._stop : self._stop + count] = states
        self._stop += count
        keys, values = self.keys, self.values = self._shown(self._first)
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        self._places = [places[:, :, self._first :][indices.to(places.device)] for places in self._places]
        self._first, self._stop = 0, self._stop - self._first
        self.keys, self.values = self._shown(0)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RoomyLayer: the cache must only be read, grow and lose rows, got another call")

    batch_repeat_interleave = reorder_cache = crop = reset = offload = prefetch = _refuse

    def _begin(self, held: list[Tensor], room: int) -> None:
        """Takes memory for what is held, and for so many places more."""
        self._first, self._stop = 0, held[0].shape[2]
        self._places = [_with_room(tensor, self._stop + room) for tensor in held]
        self.keys, self.values = self._shown(0)

    def _shown(self, first: int) -> tuple[Tensor, Tensor]:
        keys, values = (places[:, :, first : self._stop] for places in self._places)
        return keys, values


class RoomySlidingLayer(RoomyLayer):
    """As DynamicSlidingWindowLayer, without a copy for every token: what the window leaves behind is not shown.

    It stays in memory until there is more of it than the window holds, and than room was made for.

    Args:
        held, rows, room: as in RoomyLayer.
    """

    is_sliding = True
    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes
    get_max_length = DynamicSlidingWindowLayer.get_max_length

    def __init__(self, held: DynamicSlidingWindowLayer, rows: int, room: int) -> None:
        super().__init__(held, rows, room)
        self.sliding_window, self.cumulative_length = held.sliding_window, held.cumulative_length

    def get_seq_length(self) -> int:
        """Tokens so far, those that are not held any more included."""
        return self.cumulative_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, Hkv, T, D] behind what is there; both with what the first of the new tokens still sees."""
        self.cumulative_length += key_states.shape[-2]
        seen = super().update(key_states, value_states)
        self._first = max(self._first, self._stop - self.sliding_window + 1)
        self.keys, self.values = self._shown(self._first)
        if self._first > max(self.sliding_window, _ROOM):
            self._begin([self.keys, self.values], _ROOM)
        return seen


def _with_room(held: Tensor, length: int) -> Tensor:
    """[B, Hkv, P, D] at the beginning of [B, Hkv, length, D]."""
    places = held.new_empty(*held.shape[:2], length, held.shape[3])
    places[:, :, : held.shape[2]] = held
    return places


def repeated(cache: Any, rows: int, width: int, room: int = 0) -> None:
    """Repeats a cache of one row, in place; a layer of another kind stays what it is.

    Args:
        cache: of transformers.
        rows: how many it shall have.
        width: tokens of each row that come first, together.
        room: tokens at most that may follow them.
    """
    kinds = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}
    for index, layer in enumerate(cache.layers):
        kind = kinds.get(type(layer))
        if kind is not None and layer.get_seq_length():
            cache.layers[index] = kind(layer, rows, width + min(room, _ROOM))
        else:
            layer.batch_repeat_interleave(rows)
