"""An accumulator's sums as a state_dict: tensors, strings and numbers, which load under weights_only=True."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thought_kernels.estimation.sums import Sums, copied, zeros
from thought_kernels.patches.site import SITES, is_finite

_STATE_VERSION = 1

Key = tuple[int, str]  # (block, site)


def state_of(sums: Mapping[Key, Sums], normalization: str, dtype: torch.dtype) -> dict[str, Any]:
    """A copy of the sums and settings."""
    return {
        **_settings(normalization, dtype),
        "sums": {
            f"{layer}.{site}.{name}": tensor.detach().clone()
            for (layer, site), held in sums.items()
            for name, tensor in held.tensors().items()
        },
    }


def read_state(
    state: Any, normalization: str, dtype: torch.dtype, matrix_sites: tuple[str, ...], device: torch.device | None
) -> dict[Key, Sums]:
    """Copies of a state_dict's sums.

    Args:
        state: of an accumulator with the settings that follow.
        normalization: ν.
        dtype: of the sums.
        matrix_sites: whose sums have a matrix.
        device: for the copies, None for where each lies.

    Raises:
        ValueError: no state_dict, another version, normalization or dtype, or sums that are missing, unknown,
            misshapen or not finite.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state_dict: state must be a state_dict, got {type(state).__name__}")
    for name, value in _settings(normalization, dtype).items():
        if state.get(name) != value:
            raise ValueError(f"load_state_dict: {name} must be {value!r}, got {state.get(name)!r}")
    loaded = {}
    for key, tensors in _grouped(state.get("sums")).items():
        _check_kinds(key, tensors, dtype, matrix=key[1] in matrix_sites)
        loaded[key] = copied(tensors, device)
    return loaded


def _settings(normalization: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"version": _STATE_VERSION, "normalization": normalization, "dtype": str(dtype).removeprefix("torch.")}


def _grouped(held: Any) -> dict[Key, dict[str, Tensor]]:
    """Tensors named block.site.field, by block and site."""
    if not isinstance(held, Mapping):
        raise ValueError(f"load_state_dict: sums must be tensors by name, got {type(held).__name__}")
    grouped: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        place = str(name).split(".")
        if len(place) != 3 or not _is_index(place[0]) or place[1] not in SITES or not isinstance(tensor, Tensor):
            raise ValueError(
                f"load_state_dict: sums must be tensors named block.site.field, got {name!r}, a {type(tensor).__name__}"
            )
        grouped.setdefault((int(place[0]), place[1]), {})[place[2]] = tensor
    return grouped


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or not text.startswith("0"))


def _check_kinds(key: Key, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, matrix: bool) -> None:
    """Raises unless a block's and site's tensors are all of those that it has, in shape and dtype, and finite."""
    d_out, d_in = (tensors[name].numel() if name in tensors else 0 for name in ("delta_sum", "activation_sum"))
    widths = (d_out, d_in if key[1] == "down" else d_out)
    wanted = zeros(widths, matrix=matrix, dtype=dtype, device=torch.device("meta")).tensors()
    kinds, expected = (
        {name: (list(tensor.shape), tensor.dtype) for name, tensor in found.items()} for found in (tensors, wanted)
    )
    if kinds != expected:
        raise ValueError(f"load_state_dict: sums must be {expected}, got {kinds}; block {key[0]}, site {key[1]!r}")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"load_state_dict: sums must be finite, got NaN or an infinity in {name}; block {key[0]}, "
                f"site {key[1]!r}"
            )
