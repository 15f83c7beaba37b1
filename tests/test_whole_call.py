"""The benchmark of whole calls on a tiny model: all ways run, those that should agree do, the file says what ran."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "real"))

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "tables"))

import tasks
import whole_call
import whole_call_tables

from thought_kernels.evaluation.records.files import write_csv

PAIRS = ", ".join(f"{n} {n % 10}: {n * 3 % 10}" for n in range(60))


def with_bos() -> Any:
    """A tokenizer that begins every text with <bos>, as Gemma's does: the header that the ways with hooks need."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> whole_call.Ways:
    monkeypatch.setattr(tasks, "HELD_OUT", 4)
    monkeypatch.setattr(whole_call, "INPUTS", 6)
    monkeypatch.setattr(tasks, "_tables", lambda: {"digits": ("word", {"reserved": False, "pairs": PAIRS})})
    tokenizer = with_bos()
    return whole_call.Ways(
        tiny_gemma3(0, torch.float32, vocab_size=len(tokenizer), sliding_window=512), tokenizer, "digits"
    )


def test_ways_that_should_agree_do_and_all_are_timed(
    ways: whole_call.Ways, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways.check()
    *_, lines = whole_call.measured(ways, rounds=2)
    assert len(lines) == 12 and all(line["seconds"] > 0 and line["low"] <= line["high"] for line in lines)
    assert {line["peer"]: line["ratio"] for line in lines if line["way"] == line["peer"]} == dict.fromkeys(
        (whole_call.DEFAULT, whole_call.ALIKE, whole_call.OURS, whole_call.OURS_LONG), 1.0
    )
    assert sum(line["recovered"] != "" for line in lines) == 3
    monkeypatch.setattr(whole_call_tables, "RESULTS", tmp_path / "whole_call.csv")
    assert whole_call_tables.whole_call() == "Not measured yet."
    write_csv(lines, whole_call_tables.RESULTS)
    table = whole_call_tables.whole_call().splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in table] == [line["way"] for line in lines]


def test_a_way_that_is_wrong_is_not_timed(ways: whole_call.Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = whole_call.strong

    def other(model: Any, header: Any, instruction: Any, tokens: Any, batch: int) -> Any:
        return honest(model, header, instruction.flip(0), tokens, batch)

    monkeypatch.setattr(whole_call, "strong", other)
    with pytest.raises(SystemExit, match="hooks in batches is off"):
        ways.check()
