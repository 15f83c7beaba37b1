"""Rows of a file of examples, each with the place where it stands, by the file's ending."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_COLUMNS = ("prompt", "completion")
_HEADERS = {"prompts", "question", "questions", "input", "inputs", "text", "texts", "query", "request", "instruction"}


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("examples.csv, line 3", a text, dict or message list) for each row of a txt, csv, json or jsonl file.

    A file with another ending is read as jsonl. In place of a row that cannot be read stands its ValueError.

    Raises:
        ValueError: no such file, no text in UTF-8, or a file of which no row can be told from the next.
    """
    if not path.is_file():
        raise ValueError(
            "load_examples: examples must be a list of examples or the path of a txt, csv, json or jsonl file, "
            f"got {str(path)!r}, where no file is"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # some editors begin with a mark
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"load_examples: {path} must be text in UTF-8, got other bytes; {error}") from error
    return _READERS.get(path.suffix.lower(), _jsonl)(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path, text):
        try:
            row = _parsed(line, f"{where}, must be one JSON value, got {line[:60]!r}")
        except ValueError as error:
            row = error
        yield where, row


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(text, f"{path} must be JSON, got something else")
    if not isinstance(rows, list):
        raise ValueError(f"load_examples: {path} must be a list of examples, got a JSON {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path}, entry {index}", row


def _parsed(text: str, refusal: str) -> Any:
    try:
        return json.loads(text)
    # No JSON, an integer of too many digits, or brackets nested too deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_examples: {refusal}; {error}") from None


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows under the columns prompt and completion; where each row is one text, all of them are prompts.

    Then a first row "prompt" is the column's name. An empty completion is none.
    """
    rows, line = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:  # a quoted cell may hold line ends: the row stands where it starts
            if any(cell.strip() for cell in row):
                rows.append((f"{path}, line {line}", row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"load_examples: {path}, line {line}, must be comma-separated values; {error}") from None
    if not rows:
        return
    (where, first), *rest = rows
    columns = [cell.strip().lower() for cell in first]
    if len(columns) == 1 and columns != ["prompt"]:
        _check_no_header(where, columns[0])
        columns, rest = ["prompt"], rows
    if "prompt" not in columns or not set(columns) <= set(_COLUMNS) or len(set(columns)) != len(columns):
        raise ValueError(
            f"load_examples: {where}, must name the columns prompt and completion, or prompt alone, got "
            f"{', '.join(first)}; rename or drop the others"
        )
    for where, row in rest:
        if len(row) != len(columns):
            yield (
                where,
                ValueError(
                    f"load_examples: {where}, must have {len(columns)} cells as the first row has, got {len(row)}; "
                    "a text with a comma in it stands in quotation marks"
                ),
            )
            continue
        cells = dict(zip(columns, row, strict=True))
        yield where, {"prompt": cells["prompt"], "completion": cells.get("completion") or None}


def _check_no_header(where: str, cell: str) -> None:
    """Refuses a first row that is taken for a prompt and is plainly none."""
    if "prompt" in [name.strip() for name in cell.replace(";", "\t").split("\t")]:
        raise ValueError(
            f"load_examples: {where}, must name columns with commas between them, got {cell!r}; save it comma-separated"
        )
    if cell in _HEADERS:
        raise ValueError(f"load_examples: {where}, must name the column prompt, got {cell!r}; rename it")


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".txt": _lines, ".csv": _csv, ".json": _json, ".jsonl": _jsonl,
}  # fmt: skip
