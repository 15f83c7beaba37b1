"""A results file that a stopped run goes on with."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows of a CSV file: what it holds is not measured again, and each new row is written at once.

    A row that a killed run has written in part is not read, and is taken away before the next one is written.

    Args:
        path: of the file, which need not be there yet.
        key: the columns that say what was measured.
        columns: all of them.

    Raises:
        ValueError: a file with other columns, among which new rows would be out of place.
    """

    def __init__(self, path: Path, key: Sequence[str], columns: Sequence[str]) -> None:
        self._path, self._key, self._columns = path, key, columns
        found = next(csv.reader(io.StringIO(self._whole().decode())), list(columns))
        if found != list(columns):
            raise ValueError(
                f"Results: columns of {path} must be {', '.join(columns)}, got {', '.join(found)}; move the file away"
            )
        self._held = {self._key_of(row) for row in self.rows()}

    def __contains__(self, row: Row) -> bool:
        return self._key_of(row) in self._held

    def rows(self) -> list[dict[str, str]]:
        """What the file holds now."""
        return list(csv.DictReader(io.StringIO(self._whole().decode(), newline="")))

    def add(self, row: Row) -> None:
        self.extend([row])

    def extend(self, rows: Iterable[Row]) -> None:
        """Rows that belong together, written in one go."""
        rows, whole = list(rows), len(self._whole())
        if self._path.exists():
            os.truncate(self._path, whole)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if not whole:
                writer.writeheader()
            writer.writerows(rows)
        self._held |= {self._key_of(row) for row in rows}

    def _whole(self) -> bytes:
        """The file without a last row that is not whole: whose line has no end, or lies in an open quotation."""
        if not self._path.exists():
            return b""
        text, quotes, read, whole = self._path.read_bytes(), 0, 0, 0
        for line in text.splitlines(keepends=True):
            quotes, read = quotes + line.count(b'"'), read + len(line)
            if line.endswith(b"\n") and quotes % 2 == 0:
                whole = read
        return text[:whole]

    def _key_of(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self._key)
