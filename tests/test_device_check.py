"""The GPU round runs from end to end on a CPU, at sizes of a few elements: a slip must not cost a turn on a device."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thought_kernels as tk

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device_check.py"


def test_every_section_writes_rows(tmp_path: Path) -> None:
    if tk.available_backends("accumulate", "cpu")["cpp"] is not None:
        pytest.skip(str(tk.available_backends("accumulate", "cpu")["cpp"]))
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / "steps.log").read_text()
    assert run.returncode == 0, log[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"]["sections"]["outcome"] == "passed"
    (file,) = tmp_path.glob("*.csv")
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    providers = {(row["op"], row["provider"]) for row in rows}
    for op in ("accumulate", "paired_attention", "rms_norm_pair"):
        assert (op, f"{op} (cpp)") in providers
    assert ("paired_attention", "flash on own keys and on the prefix, merged") in providers
    shapes = {row["shape"].split()[0] for row in rows if row["op"] == "transmute"}
    assert shapes == {"1b", "4b"}


def test_a_wrong_provider_is_counted_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent / "measure"))
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
