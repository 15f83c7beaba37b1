"""Hidden states that outgrow memory: buffers on the model's device, then in CPU memory, then in a file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a cache line


def buffers(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device, budget: int) -> list[Tensor]:
    """Uninitialised tensors, the first of them in memory and what a budget leaves over in a memory-mapped file.

    The file has no name any more when this returns (POSIX), so nothing is left behind however the process ends, and
    its space is free again once the tensors are. It lies in the directory that `tempfile.gettempdir` names (TMPDIR).

    Args:
        shapes: of the tensors.
        dtype: of all of them.
        device: where they should be.
        budget: bytes on the device; where that is not the CPU, the same again in CPU memory.

    Returns:
        One tensor for each shape, on the device or on the CPU.

    Raises:
        OSError: no room for the file.
    """
    cpu = torch.device("cpu")
    tiers = [device] if device.type == "cpu" else [device, cpu]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    places: list[torch.device | int] = []  # a device, or an offset in the file
    left, file_bytes = budget, 0
    for size in sizes:
        while tiers and size > left:
            tiers, left = tiers[1:], budget
        if tiers:
            places.append(tiers[0])
            left -= size
        else:
            places.append(file_bytes)
            file_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
    file = _unnamed_file(file_bytes) if file_bytes else None
    found = []
    for shape, size, place in zip(shapes, sizes, places, strict=True):
        if isinstance(place, torch.device):
            found.append(torch.empty(tuple(shape), dtype=dtype, device=place))
        else:
            assert file is not None
            found.append(file[place : place + size].view(dtype).view(tuple(shape)))
    return found


def _unnamed_file(size: int) -> Tensor:
    """A shared mapping of a new file of this many bytes, uint8; the name is gone, the space goes with the tensor."""
    handle, path = tempfile.mkstemp(prefix="thought-kernels-")
    try:
        # Reserved now: a disk that fills up later would end the process with SIGBUS, not with an exception.
        if hasattr(os, "posix_fallocate"):  # Linux
            os.posix_fallocate(handle, 0, size)
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(handle)
        os.unlink(path)
