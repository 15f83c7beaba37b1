"""What the processes of a group have to agree on before their sums are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

Key = tuple[int, str]


def agreed(
    held: Mapping[Key, tuple[tuple[int, int], str]],
    normalization: str,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> dict[Key, tuple[tuple[int, int], torch.device]]:
    """Every block and site of which a process has sums, in one order: widths, and where one without them has zeros.

    Args:
        held: this process's: widths (d_out, d_in) and the type of device.
        normalization, dtype: of its sums.
        group: of torch.distributed, None for the default one.

    Raises:
        ValueError: processes that disagree, on all of them.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (normalization, dtype, dict(held)), group=group)
    shared: dict[Key, tuple[tuple[int, int], str]] = {}
    for theirs, their_dtype, sums in everyone:
        if (theirs, their_dtype) != everyone[0][:2]:
            raise ValueError(
                f"all_reduce: processes must share normalization and dtype, got {theirs!r} with {their_dtype} and "
                f"{everyone[0][0]!r} with {everyone[0][1]}"
            )
        for key, (widths, device) in sums.items():
            wanted = shared.setdefault(key, (widths, device))
            if wanted != (widths, device):
                told = [f"{one[0][0]} from {one[0][1]} on {one[1]}" for one in (wanted, (widths, device))]
                raise ValueError(
                    f"all_reduce: processes must hold one width on one type of device, got {' and '.join(told)}; "
                    f"block {key[0]}, site {key[1]!r}"
                )
    return {key: (shared[key][0], _here(shared[key][1])) for key in sorted(shared)}


def _here(kind: str) -> torch.device:
    """This process's own device of a type."""
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.accelerator.current_device_index())
