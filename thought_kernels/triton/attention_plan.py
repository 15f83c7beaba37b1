"""How an attention call is cut into tiles, and its tensors handed to a kernel."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# Keys per step where softmax weights are split: headers are short, and the parts need registers.
HEADER_KEYS = 16


class Plan(NamedTuple):
    """How an attention call is cut into programs.

    Attributes:
        block_m, block_n, block_d: rows and keys per tile, and head_dim padded to a power of two.
        header_n: keys per tile where softmax weights count as float32: their parts take registers.
        parts: into how many numbers of the inputs' dtype a softmax weight is split to count as float32.
        precision: Triton's input_precision.
        descriptors: whether keys and values are loaded by tensor descriptors (TMA).
        options: num_warps and num_stages.
    """

    block_m: int
    block_n: int
    block_d: int
    header_n: int
    parts: int
    precision: str
    descriptors: bool
    options: dict[str, int]


def plan(query: torch.Tensor, key: torch.Tensor, *others: torch.Tensor) -> Plan:
    """The tiles of a call on its device; ``others`` are whatever else is loaded as keys and values are."""
    capability, shared, processors = (9, 0), 232_448, 0  # on a CPU the interpreter stands for a large chip, never idle
    if query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(query.device)
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        shared = triton.runtime.driver.active.utils.get_device_properties(query.device.index or 0)["max_shared_mem"]
    whole = query.shape[3] * query.element_size() % 16 == 0  # else rows of prefixes that are joined are not aligned
    descriptors = capability >= (9, 0) and whole and all(map(describable, (key, *others)))
    rows = query.shape[2] * (query.shape[1] // key.shape[1])
    return choose_tiles(
        query.dtype, query.shape[3], rows, groups=query.shape[0] * key.shape[1], processors=processors,
        capability=capability, descriptors=descriptors, shared_memory=shared,
    )  # fmt: skip


def choose_tiles(
    dtype: torch.dtype, head_dim: int, rows: int, *, groups: int, processors: int, capability: tuple[int, int],
    descriptors: bool, shared_memory: int,
) -> Plan:  # fmt: skip
    """Chooses tiles that neither spill registers (tests/test_aot_attention.py) nor exceed shared memory.

    Args:
        dtype: of the inputs.
        head_dim: at most 256.
        rows: tokens times query heads per key head.
        groups: examples times key heads.
        processors: multiprocessors of the device.
        capability: of the device, such as (9, 0).
        descriptors: whether the device has tensor descriptors and the inputs' strides allow them.
        shared_memory: bytes a program may have.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}[dtype]
    if dtype == torch.float32:
        # Ordinary instructions, because tensor cores truncate sums. Operands pass through shared memory in strips of 16
        # features or keys, by pointers, copied two strips ahead. A thread has up to 4 x 4 scores and 8 x 4 outputs, as
        # many as its registers allow: each read of shared memory then serves 4 to 10 multiply-add instructions.
        block_m, block_n, warps, stages = 64 if block_d <= 128 else 32, 64, 8, 3
        descriptors = False
    elif shared_memory < 160 * 1024 or (block_d == 256 and not descriptors):  # addresses take registers too
        block_m, block_n, warps, stages = 64, 32, 8 if block_d == 256 else 4, 2
    else:
        # Blackwell copies a wide accumulator from tensor memory to registers, which leaves room for fewer rows.
        # Where all programs of 64 rows run at once, they are done sooner than half as many of 128. Four warps have no
        # registers to spare for 64 rows of 256 features on Hopper, of 128 before it.
        small = rows <= 64 or triton.cdiv(rows, 64) * groups <= processors
        block_m, warps = (64, 4) if small or (block_d == 256 and capability >= (10, 0)) else (128, 8)
        if capability < (9, 0) or (block_d == 256 and capability < (10, 0)):
            warps = 8
        block_n, stages = 64 if block_d < (256 if descriptors else 128) else 32, 3
    header_n = block_n if parts == 1 else HEADER_KEYS
    options = {"num_warps": warps, "num_stages": stages}
    return Plan(block_m, block_n, block_d, header_n, parts, "ieee", descriptors, options)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with unit stride along its last dimension, as the kernels assume."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe keys or values: rows start at multiples of 16 bytes."""
    strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False) if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in strides)
    return aligned and all(stride > 0 for stride in strides)


def describe(tensor: torch.Tensor | None, rows: int, chosen: Plan) -> TensorDescriptor | torch.Tensor | None:
    """A source for load_rows, ``rows`` at a time: ``[B, Hkv, T, D]``, or a prefix ``[Hkv, P, D]`` as one batch row."""
    if tensor is None or not chosen.descriptors:
        return tensor
    if tensor.dim() == 3:
        tensor = tensor[None]
    # The stride of a dimension of one element is never used, but must be a multiple of 16 bytes.
    strides = [16 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], [1, 1, rows, chosen.block_d])


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which this makes the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
