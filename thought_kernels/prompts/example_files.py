"""Rows of a file of examples, each with the place where it stands, by the file's ending."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_MARK = b"\xef\xbb\xbf"  # some editors begin with it
_COLUMNS = ("prompt", "completion")
_HEADERS = {"prompts", "question", "questions", "input", "inputs", "text", "texts", "query", "request", "instruction"}


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        where: "examples.csv, line 3".
        value: a text, dict or message list.
        error: what to raise where it cannot be read.
    """

    where: str
    value: Any
    error: ValueError | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a txt, csv, json or jsonl file; one with another ending is read as jsonl.

    Raises:
        ValueError: no such file, or one whose rows cannot be told apart.
    """
    if not path.is_file():
        raise ValueError(
            "load_examples: examples must be a list of examples or the path of a txt, csv, json or jsonl file, "
            f"got {str(path)!r}, where no file is; put a single text in a list"
        )
    return _READERS.get(path.suffix.lower(), _jsonl)(path, path.read_bytes().removeprefix(_MARK))


def _lines(path: Path, content: bytes) -> Iterator[Row]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            yield Row(where, None, _no_text(f"{where},", error))
            continue
        if text.strip():
            yield Row(where, text)


def _jsonl(path: Path, content: bytes) -> Iterator[Row]:
    for row in _lines(path, content):
        if row.error is None:
            try:
                value = _parsed(row.value, f"{row.where}, must be one JSON value, got {row.value[:60]!r}")
                row = row._replace(value=value)
            except ValueError as error:
                row = row._replace(error=error)
        yield row


def _json(path: Path, content: bytes) -> Iterator[Row]:
    rows = _parsed(_decoded(path, content), f"{path} must be JSON, got something else")
    if not isinstance(rows, list):
        raise ValueError(f"load_examples: {path} must be a list of examples, got a JSON {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield Row(f"{path}, entry {index}", row)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _no_text(str(path), error) from error


def _no_text(subject: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"load_examples: {subject} must be text in UTF-8, got other bytes; {error}")


def _parsed(text: str, refusal: str) -> Any:
    try:
        return json.loads(text)
    # No JSON, an integer of too many digits, or brackets nested too deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_examples: {refusal}; {error}") from None


def _csv(path: Path, content: bytes) -> Iterator[Row]:
    """Rows under the columns prompt and completion; where each row is one text, all of them are prompts.

    Then a first row "prompt" is the column's name. An empty completion is none.
    """
    rows = list(_cells(path, _decoded(path, content)))
    if not rows:
        return
    (where, first, wrong), *rest = rows
    if wrong is not None:
        raise wrong
    columns = [cell.strip().lower() for cell in first]
    if len(columns) == 1 and columns != ["prompt"]:
        _check_no_header(where, columns[0])
        columns, rest = ["prompt"], rows
    if "prompt" not in columns or not set(columns) <= set(_COLUMNS) or len(set(columns)) != len(columns):
        raise ValueError(
            f"load_examples: {where}, must name the columns prompt and completion, or prompt alone, got "
            f"{', '.join(first)}; rename or drop the others"
        )
    for where, row, error in rest:
        if error is None and len(row) != len(columns):
            error = ValueError(
                f"load_examples: {where}, must have {len(columns)} cells as the first row has, got {len(row)}; "
                "a text with a comma in it stands in quotation marks"
            )
        cells = {} if error is not None else dict(zip(columns, row, strict=True))
        yield Row(where, {"prompt": cells.get("prompt"), "completion": cells.get("completion") or None}, error)


def _cells(path: Path, text: str) -> Iterator[Row]:
    """The cells of each row that has any; behind a row that cannot be read it goes on at that row's second line."""
    lines, start = list(io.StringIO(text, newline="")), 0
    reader, first = csv.reader(lines, strict=True), 0  # the reader's first line
    while start < len(lines):
        where = f"{path}, line {start + 1}"
        try:
            row = next(reader)
            start = first + reader.line_num  # a quoted cell may hold line ends
        except csv.Error as error:
            yield Row(where, None, ValueError(f"load_examples: {where}, must be comma-separated values; {error}"))
            start = first = start + 1
            reader = csv.reader(lines[first:], strict=True)
            continue
        if any(cell.strip() for cell in row):
            yield Row(where, row)


def _check_no_header(where: str, cell: str) -> None:
    """Refuses a first row that is taken for a prompt and is plainly none."""
    if "prompt" in [name.strip() for name in cell.replace(";", "\t").split("\t")]:
        raise ValueError(
            f"load_examples: {where}, must name columns with commas between them, got {cell!r}; save it comma-separated"
        )
    if cell in _HEADERS:
        raise ValueError(f"load_examples: {where}, must name the column prompt, got {cell!r}; rename it")


_READERS: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {
    ".txt": _lines, ".csv": _csv, ".json": _json, ".jsonl": _jsonl,
}  # fmt: skip
