"""The machine that times are predicted for: its published peaks, and what kernels are taken to reach of them."""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """A GPU as a roofline sees it.

    Attributes:
        name: of its results file.
        bandwidth: bytes/s of its memory, published.
        peaks: dense FLOP/s by the path that a product takes, published.
        processors: multiprocessors.
        streamed: share of the bandwidth that a kernel is taken to reach.
        reached: share of a peak, by whose kernel it is: a library's product, one of ours, a factorisation or
            triangular solve of a library.
        launch: seconds that the host takes to launch a kernel from eager PyTorch.
        replay: seconds that a kernel of a CUDA graph takes to start.
        wait: seconds that the host loses where it reads a number of the device's, or copies to or from it.
    """

    name: str
    bandwidth: float
    peaks: dict[str, float]
    processors: int
    streamed: float
    reached: dict[str, float]
    launch: float
    replay: float
    wait: float


# Peaks are those of NVIDIA's data sheet, without sparsity; all the rest is guessed until a GPU has run it.
H200 = Machine(
    name="nvidia-h200",
    bandwidth=4.8e12,
    peaks={"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 67e12},
    processors=132,
    streamed=0.8,
    reached={"library": 0.7, "ours": 0.5, "solve": 0.2},
    launch=4e-6,
    replay=1.5e-6,
    wait=10e-6,
)
