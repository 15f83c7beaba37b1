"""The file of rows that `thought-kernels inspect --csv` keeps: each written as it is measured, and used again."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic

from thought_kernels.evaluation.records.files import replace_file
from thought_kernels.spectral.inspect import Row, row_of

_Key = tuple[str, str]  # a matrix's name and source
_AT = re.compile(r" at ([0-9a-f]{12})\b")


class KeptRows(Generic[Row]):
    """Rows of one kind in PATH, and those of an interrupted run in PATH.partial.

    Rows that were measured on another file, or with other features, stay. Those of a file that has changed since are
    dropped when it is measured again.

    Args:
        path: of the CSV; None keeps nothing.
        kind: dataclass of a row.
        command: that writes such rows, for the error.

    Attributes:
        measured: rows that ``collect`` did not find here.

    Raises:
        ValueError: the file holds other columns.
    """

    def __init__(self, path: Path | None, kind: type[Row], command: str) -> None:
        self.measured = 0
        self._path, self._kind = path, kind
        self._columns = [*(field.name for field in fields(kind)), "source"]  # type: ignore[arg-type]
        self._lines: dict[_Key, dict[str, str]] = {}
        if path is not None:
            self._partial = path.with_name(f"{path.name}.partial")
            for file in (path, self._partial):
                for line in self._read(file, command):
                    self._lines[line["name"], line["source"]] = line

    def collect(self, wanted: Sequence[_Key], measure: Callable[[list[int]], Iterator[Row]]) -> Iterator[Row]:
        """A row for each name and source; ``measure`` is given the places of those that are not here.

        Each is in PATH.partial as soon as it is known; PATH itself changes when all are.
        """
        known = [self._known(key) for key in wanted]
        missing = [place for place, row in enumerate(known) if row is None]
        fresh, self.measured = measure(missing), len(missing)
        others = self._others(set(wanted))
        found: dict[_Key, dict[str, Any]] = {
            key: self._line(row, key) for key, row in zip(wanted, known, strict=True) if row is not None
        }
        partial = False
        for key, old in zip(wanted, known, strict=True):
            row = next(fresh) if old is None else old
            if old is None and self._path is not None:
                if not partial:  # with all that is known, or a second interruption would lose it
                    self._write(self._partial, [*found.values(), *others])
                found[key], partial = self._line(row, key), True
                with self._partial.open("a", newline="", encoding="utf-8") as file:
                    self._writer(file).writerow(found[key])
            yield row
        if self._path is not None:
            self._write(self._path, [*(found[key] for key in wanted), *others])
            self._partial.unlink(missing_ok=True)

    def _known(self, key: _Key) -> Row | None:
        # Earlier versions did not say where the file is.
        line = self._lines.get(key) or self._lines.get((key[0], _AT.sub("", key[1])))
        try:
            return None if line is None else row_of(line, self._kind)
        except ValueError:
            return None

    def _others(self, wanted: set[_Key]) -> list[dict[str, str]]:
        sources = {source for _, source in wanted}
        places = {_place(source) for source in sources}
        taken = wanted | {(name, _AT.sub("", source)) for name, source in wanted}
        return [
            line for key, line in self._lines.items()
            if key not in taken and (key[1] in sources or _place(key[1]) not in places)
        ]  # fmt: skip

    def _line(self, row: Row, key: _Key) -> dict[str, Any]:
        return {**asdict(row), "source": key[1]}  # type: ignore[call-overload]

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, lineterminator="\n")

    def _write(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = self._writer(file)
                writer.writeheader()
                writer.writerows(lines)

        replace_file(path, write)

    def _read(self, path: Path, command: str) -> list[dict[str, str]]:
        """The lines of a file that are whole."""
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if path == self._partial:
            text = text[: text.rfind("\n") + 1]  # its last line may have been cut off
        reader = csv.DictReader(io.StringIO(text))
        try:
            columns = list(reader.fieldnames or ())
            if text and columns != self._columns:
                actual = f"{path} with the columns {', '.join(columns):.60}"
                raise ValueError(f"inspect: --csv must hold rows of {command}, got {actual}; name another file")
            return [line for line in reader if None not in line and None not in line.values()]
        except csv.Error as error:
            raise ValueError(f"inspect: --csv must be a CSV file, got {path}: {error}; name another file") from error


def source_of(features: str, *files: Path) -> str:
    """What a row was measured on, so that it is not taken for one of another model of the same shapes."""
    return f"{features} " + " against ".join(map(_state, files))


def _state(file: Path) -> str:
    """A file's name, size, time of change, and where it is, as a digest: rows may be shown to others."""
    state = file.stat()
    digest = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:12]
    return f"{file.name} {state.st_size} {state.st_mtime_ns} at {digest}"


def _place(source: str) -> tuple[str, ...]:
    """The features and files of a source, in whatever state; the whole source where it does not say which files."""
    digests = _AT.findall(source)
    return (source.split(" ")[0], *digests) if digests else (source,)
