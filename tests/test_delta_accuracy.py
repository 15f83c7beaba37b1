"""The difference that a prefix makes keeps its accuracy for bfloat16 and float16 inputs, whatever the prefix's share.

The figures of ``benchmarks/measure/bench_delta.py`` as bounds, on every backend of this machine and in Triton's
interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import deltas_from_outputs, deltas_from_rows, norm_error, of_mass

import thought_kernels as tk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name, reason in tk.available_backends("paired_attention", DEVICE).items() if reason is None]
NARROW = [torch.bfloat16, torch.float16]
ALLOWED = 0.005  # the project's figure for delta; rounding delta itself to bfloat16 costs 0.0017
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: argument.to(DEVICE) if torch.is_tensor(argument) else argument and tuple(p.to(DEVICE) for p in argument)
        for name, argument in arguments.items()
    }


def delta_of(arguments: dict[str, Any], backend: str) -> torch.Tensor:
    return tk.paired_attention(**on_device(arguments), backend=backend)[1].cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mass", [1e-1, 1e-2, 1e-3])
def test_delta_of_narrow_inputs(backend: str, dtype: torch.dtype, mass: float) -> None:
    arguments = of_mass(mass, 0.0, dtype)
    truth = deltas_from_outputs(arguments, torch.float64)
    share = (truth.norm() / arguments["value"].double().norm()).item()
    assert 0.1 * mass < share < 10 * mass  # the case is what it says
    assert norm_error(delta_of(arguments, backend), truth) <= ALLOWED
    if dtype == torch.bfloat16 and mass == 1e-3:
        assert norm_error(deltas_from_outputs(arguments, dtype), truth) > 1  # nothing but rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_delta_beside_a_header_that_holds_most_of_the_mass(backend: str, dtype: torch.dtype) -> None:
    arguments = of_mass(1e-3, 0.9, dtype)
    truth = deltas_from_outputs(arguments, torch.float64)
    # o_H - o_S is a thousand times the difference: weights of the header rounded to bfloat16 would err by more than it.
    assert norm_error(delta_of(arguments, backend), truth) <= ALLOWED
    assert norm_error(deltas_from_outputs(arguments, dtype), truth) > 10 * ALLOWED


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("header", [0.0, 0.9])
def test_a_difference_of_float32_rows_of_narrow_inputs(backend: str, dtype: torch.dtype, header: float) -> None:
    arguments = of_mass(1e-3, header, dtype)
    truth = deltas_from_outputs(arguments, torch.float64)
    assert norm_error(deltas_from_rows(on_device(arguments), backend).cpu(), truth) <= ALLOWED
