"""The GPU round runs from end to end on a CPU, at sizes of a few elements: a slip must not cost a turn on a device."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "measure"))

import device_check
import device_sections
import predict
from machine import H200

import thought_kernels as tk

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device_check.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What a round at sizes of a few elements writes."""
    tmp_path = tmp_path_factory.mktemp("round")
    if tk.available_backends("accumulate", "cpu")["cpp"] is not None:
        pytest.skip(str(tk.available_backends("accumulate", "cpu")["cpp"]))
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / "steps.log").read_text()
    assert run.returncode == 0, log[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"]["sections"]["outcome"] == "passed"
    (file,) = tmp_path.glob("*.csv")
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_every_section_writes_rows(rows: list[dict[str, str]]) -> None:
    providers = {(row["op"], row["provider"]) for row in rows}
    for op in ("accumulate", "paired_attention", "rms_norm_pair"):
        assert (op, f"{op} (cpp)") in providers
    assert ("paired_attention", "flash on own keys and on the prefix, merged") in providers
    for op, models in (("transmute", {"1b", "4b"}), ("fit", {"270m", "1b", "4b"})):
        assert {row["shape"].split()[0] for row in rows if row["op"] == op} == models
    share = [float(row["value"]) for row in rows if row["measure"] == "share of the fit's time"]
    assert len(share) == 3 and all(0 < value < 1 for value in share)


def test_every_row_is_predicted(rows: list[dict[str, str]]) -> None:
    of_cpus = {"two addmm_ on inputs scaled before"}  # which have no product of bfloat16 numbers into float32
    predicted = {predict.key(row) for row in predict.predict(H200, "cpu", tiny=True)}
    lost = {predict.key(row) for row in rows if row["provider"] not in of_cpus} - predicted
    assert not lost, f"predict.py must have a prediction for every row of a round, got none for {sorted(lost)}"


def test_what_matters_most_comes_first_and_fits_the_budget() -> None:
    found = device_check.steps(Path("out"))
    names = [step.name for step in found]
    assert names[:3] == ["build", "bench-fit-270m", "bench-attention"]
    assert {f"bench-{name}" for name in device_sections.SECTIONS} <= set(names)
    kept = [step for step in found[: names.index("bench-accumulate")] if step.name != "build"]
    assert found[0].limit + sum(step.limit for step in kept) <= device_check.BUDGET  # even where each takes its limit


def test_a_wrong_provider_is_counted_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import harness
    from device_section import Section

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    section, right = Section("cpu", True, 60.0), torch.ones(3)

    def broken() -> dict[str, torch.Tensor]:
        raise RuntimeError("no such kernel")

    candidates = [
        harness.Provider("wrong", lambda: None, lambda: {"x": right + 1}),
        harness.Provider("broken", lambda: None, broken),
        harness.Provider("right", lambda: None, lambda: {"x": right}),
    ]
    rows = section.measure(harness.Case("op", "case", "3", "float32"), candidates, {"x": right.double()}, {"x": right})
    assert [row["provider"] for row in rows] == ["right"]
    assert section.wrong == 2
    printed = capsys.readouterr().out
    assert "wrong errs by 1" in printed and "no such kernel" in printed
