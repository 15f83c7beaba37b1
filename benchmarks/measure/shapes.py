"""The shapes that are timed: those of real models, and those where a kernel is expected to lose."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """What a benchmark needs of a model's config."""

    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    blocks: int
    window: int  # keys including self, on the sliding blocks


GEMMA3 = {
    "270m": Model(640, 4, 1, 256, 18, 512),
    "1b": Model(1152, 4, 1, 256, 26, 512),
    "4b": Model(2560, 8, 4, 256, 34, 1024),
    "12b": Model(3840, 16, 8, 256, 48, 1024),
    "27b": Model(5376, 32, 16, 128, 62, 1024),
}

ACCUMULATE = [  # (rows, d): d_out = d_in = d
    (16384, GEMMA3["270m"].hidden),
    (16384, GEMMA3["1b"].hidden),
    (512, GEMMA3["1b"].hidden),  # few rows: the accumulators' own traffic counts
    (64, GEMMA3["270m"].hidden),  # too few: so is the cost of a call
]
ACCUMULATE_GPU = [
    *ACCUMULATE,
    (16384, GEMMA3["4b"].hidden),
    (16384, GEMMA3["27b"].hidden),
]

ATTENTION = [
    (32, 32),
    (32, 256),
    (32, 512),
    (128, 32),
    (128, 128),
    (128, 512),
    (512, 32),
    (512, 512),
]  # (tokens, prefix keys)
ATTENTION_HEAD_DIMS = (64, 128, 256)
