"""A results file that a stopped run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows of a CSV file: what it holds is not measured again, and each new row is written at once.

    Args:
        path: of the file, which need not be there yet.
        key: the columns that say what was measured.
        columns: all of them.
    """

    def __init__(self, path: Path, key: Sequence[str], columns: Sequence[str]) -> None:
        self._path, self._key, self._columns = path, key, columns
        self._held = {self._key_of(row) for row in self.rows()}

    def __contains__(self, row: Row) -> bool:
        return self._key_of(row) in self._held

    def rows(self) -> list[dict[str, str]]:
        """What the file holds now."""
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def add(self, row: Row) -> None:
        self.extend([row])

    def extend(self, rows: Iterable[Row]) -> None:
        """Rows that belong together, written in one go."""
        rows, new = list(rows), not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self._held |= {self._key_of(row) for row in rows}

    def _key_of(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self._key)
