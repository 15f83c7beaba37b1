"""Predictions for a GPU: every row of a round has one, counts are those of known kernels, and costs are as by hand."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "measure"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tables"))

import device_sections
import gpu_tables
import predict
from bench_fit import Task
from bench_transmute import IDS, build
from counted import counting
from machine import H200
from roofline import Work, pairs

import thought_kernels as tk

ROOT = Path(__file__).parents[1]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def counted(run) -> Work:
    with counting(H200) as work:
        run()
    return work


def test_a_product_costs_its_bytes_flops_and_launch() -> None:
    x, weight = meta(1024, 640), meta(2048, 640)
    work = counted(lambda: x @ weight.T)  # the transpose is no kernel
    assert work.launches == 1 and work.waits == 0
    assert work.bytes == 2 * (1024 * 640 + 2048 * 640 + 1024 * 2048)
    assert work.flops == {"bfloat16": 2 * 1024 * 640 * 2048}
    floor = max(work.bytes / (4.8e12 * H200.streamed), work.flops["bfloat16"] / (989e12 * H200.reached["library"]))
    assert work.device == pytest.approx(floor)
    assert work.seconds() == pytest.approx(floor + H200.launch)
    assert work.seconds(replayed=True) == pytest.approx(floor + H200.replay)


def test_factors_decide_the_path_and_not_what_is_added_to() -> None:
    x, total = meta(64, 8), meta(8, 8, dtype=torch.float32)
    work = counted(lambda: torch.addmm(total, x.T, x, out_dtype=torch.float32, out=total))
    assert work.flops == {"bfloat16": 2 * 64 * 8 * 8}
    assert work.bytes == 2 * 2 * 64 * 8 + 2 * 4 * 8 * 8  # the total is read and written


def test_views_and_memory_are_no_kernels_and_reading_a_number_is_a_wait() -> None:
    x = meta(4, 6, dtype=torch.float32)
    assert counted(lambda: x.T.reshape(6, 4)[:2].unsqueeze(0).expand(3, -1, -1)).launches == 0
    assert counted(lambda: torch.empty_like(x)).launches == 0
    reading = counted(lambda: float(x.sum()))
    assert (reading.launches, reading.waits) == (2, 1)
    assert counted(lambda: torch.ones(3).to("meta")).waits == 1
    assert counted(lambda: torch.ones(3) + 1).launches == 0  # the host's own


def test_spread_memory_is_read_once() -> None:
    row = meta(1, 8, dtype=torch.float32)
    assert counted(lambda: row.expand(16, 8) + 1).bytes == 4 * 8 + 4 * 16 * 8


@pytest.mark.parametrize("window", [None, 3, 7, 40])
def test_pairs_are_those_of_a_mask(window: int | None) -> None:
    from dense_attention import visible

    assert pairs(9, 5, window) == int(visible(9, 5, window).sum())


def test_our_operators_cost_what_they_multiply() -> None:
    query, key = meta(2, 4, 8, 16), meta(2, 2, 8, 16)
    prefix = (meta(2, 5, 16), meta(2, 5, 16))
    attention = counted(lambda: tk.paired_attention(query, key, key, prefix))
    assert attention.launches == 1
    assert attention.flops == {"bfloat16": 4 * 2 * 4 * 16 * (8 * 9 / 2 + 8 * 5)}
    delta, activation = meta(100, 24), meta(100, 40)
    cross, gram = meta(24, 40, dtype=torch.float32), meta(40, 40, dtype=torch.float32)
    sums = counted(lambda: tk.accumulate(cross, delta, activation, gram=gram, normalization="norm"))
    assert sums.launches == 4  # row factors and their sum, tiles and their sum
    assert sums.flops == {"bfloat16": 100 * (2 * 24 * 40 + 40 * 41)}
    assert counted(lambda: tk.accumulate(cross, delta, activation)).launches == 2
    norm = counted(lambda: tk.rms_norm_pair(delta, delta, meta(24), eps=1e-6))
    assert norm.launches == 1 and norm.flops == {}


def test_what_is_left_on_the_host_shows() -> None:
    with counting(H200), pytest.raises(RuntimeError, match="aten::mm must be on one device"):
        meta(4, 4) @ torch.ones(4, 4, dtype=torch.bfloat16)


def test_a_fit_has_as_many_launches_for_each_block_of_a_kind() -> None:
    found = []
    for blocks in (2, 3, 4):
        with torch.device("meta"):
            model = build("270m", blocks, IDS).to(torch.bfloat16)
        found.append(counted(lambda model=model: Task(model, (8, 4, 2)).fit()))
    assert found[2].launches - found[1].launches == found[1].launches - found[0].launches > 100
    assert found[2].waits - found[1].waits == found[1].waits - found[0].waits > 0
    assert "float32" in found[0].flops and "float64" in found[0].flops  # the MLP's differences, and solving


def test_a_section_that_cannot_be_predicted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "SECTIONS", {"new": lambda section: None})
    with pytest.raises(RuntimeError, match="section new"):
        predict.predict(H200, "cpu", tiny=True)


def test_predicted_rows_are_committed_for_every_section() -> None:
    with (ROOT / "benchmarks" / "results" / f"predicted-{H200.name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    named = {(row["op"], row["shape"].split()[0]) for row in rows}
    for section in device_sections.SECTIONS:
        op, _, model = section.partition("-")
        ops = {"attention": "paired_attention", "norms": "rms_norm_pair"}
        assert any(name == ops.get(op, op) and model in ("", shape) for name, shape in named), section
    assert all(float(row["value"]) > 0 for row in rows)


def test_predictions_are_those_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {
        name: device_sections.SECTIONS[name] for name in ("attention", "accumulate", "norms")
    }  # fits take minutes
    monkeypatch.setattr(predict, "SECTIONS", kernels)
    # What others' kernels split into is for torch's version to say.
    found = [row for row in predict.predict(H200) if row["provider"].endswith(("(cuda)", "(triton)"))]
    committed = {gpu_tables.key(row): row for row in gpu_tables.read(gpu_tables.PREDICTED)}
    changed = [row for row in found if committed[predict.key(row)]["value"] != row["value"]]
    assert found and not changed, f"python benchmarks/measure/predict.py must change nothing, got {changed[:3]}"


def test_a_measured_row_stands_beside_its_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = next(row for row in gpu_tables.read(gpu_tables.PREDICTED) if row["provider"] == "accumulate (cuda)")
    row = {**wanted, "shape": "16384 x 640", "dtype": "bfloat16"}
    monkeypatch.setattr(gpu_tables, "SHAPES", {**gpu_tables.SHAPES, "accumulate": (row["shape"],)})
    measured = {**row, "provider": "accumulate (cuda), eager", "value": "2", "threads": "16"}
    for name, line in (("PREDICTED", {**row, "value": "0.5"}), ("MEASURED", measured)):
        path = tmp_path / f"{name}.csv"
        predict.write(path, tuple(line), [line])
        monkeypatch.setattr(gpu_tables, name, path)
    line = gpu_tables.predicted().splitlines()[-1]
    assert line == "| `accumulate` | 16384 x 640 | accumulate (cuda) | 0.5 | 2 | 4.00 |"
    monkeypatch.setattr(gpu_tables, "MEASURED", tmp_path / "none.csv")
    assert gpu_tables.predicted().endswith("| 0.5 | not measured | – |")


def test_every_shape_of_the_table_is_predicted() -> None:
    found = {(row["op"], row["shape"]) for row in gpu_tables.shown(gpu_tables.read(gpu_tables.PREDICTED))}
    wanted = {(op, shape) for op, shapes in gpu_tables.SHAPES.items() for shape in shapes}
    assert wanted <= found and {op for op, _ in found} == {op for op, _ in gpu_tables.SHOWN}
