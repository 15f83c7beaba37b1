"""Results as they come: a file of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from thought_kernels.evaluation.records.files import write_text

T = TypeVar("T")


class Journal:
    """Named results of one run with given settings; each is written when it is there, and never computed again.

    The first line holds the settings, every other a result. A last line that was cut is computed again.

    Args:
        path: the file; its folder is created.
        settings: what the results depend on, JSON values.

    Raises:
        ValueError: a file that holds the results of other settings, or is no journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        wanted = json.loads(json.dumps(dict(settings), allow_nan=False))
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines:
            self._read(lines, wanted)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([{"settings": wanted}])

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The result of that name, computed and written if it is not there; JSON values."""
        if name not in self._found:
            value = json.loads(json.dumps(compute(), allow_nan=False))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "value": value}, ensure_ascii=False) + "\n")
            self._found[name] = value
        return self._found[name]

    def __getitem__(self, name: str) -> Any:
        """A result that is there."""
        return self._found[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def _read(self, lines: list[str], wanted: dict[str, Any]) -> None:
        rows = []
        for index, line in enumerate(lines):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if index < len(lines) - 1 or index == 0:
                    raise ValueError(
                        f"experiment: {self._path} must hold one JSON value a line, got {line[:60]!r} in line "
                        f"{index + 1}; remove it to start over"
                    ) from None
        held = rows[0].get("settings") if isinstance(rows[0], dict) else None
        if held != wanted:
            held = held if isinstance(held, dict) else {}
            names = sorted({*held, *wanted})
            other = [f"{n} {held.get(n)!r:.60} there" for n in names if held.get(n) != wanted.get(n)]
            raise ValueError(
                f"experiment: {self._path} must hold results of the same settings, got {', '.join(other)}; "
                "give another --output, or remove the file to start over"
            )
        self._found = {row["name"]: row["value"] for row in rows[1:]}
        self._write(rows)  # without a last line that was cut, which the next result would be appended to

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), self._path)
