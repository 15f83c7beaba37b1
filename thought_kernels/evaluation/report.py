"""What `evaluate` returns: the report, with the verbs that write it as a page and as files."""

from __future__ import annotations

import os
from pathlib import Path

from thought_kernels.evaluation.figures.report import Report
from thought_kernels.evaluation.pages.page import render
from thought_kernels.evaluation.records.files import write_json, write_text
from thought_kernels.ops.checks import as_path


class Evaluation(Report):
    """Everything `evaluate` measured, see Report for the attributes."""

    def to_html(self) -> str:
        """One page that needs no network: tables, and plots as inline SVG."""
        return render(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes evaluation.json, evaluation.csv and evaluation.html to a folder, replacing each in one step.

        Returns:
            The path of the page.

        Raises:
            ValueError: a path that is not a folder.
        """
        folder = output_folder(directory)
        write_json(self.to_dict(), folder / "evaluation.json")
        write_text(self.to_csv(), folder / "evaluation.csv")
        write_text(self.to_html(), folder / "evaluation.html")
        return folder / "evaluation.html"


def output_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there."""
    folder = as_path("evaluate", "output", directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"evaluate: output must be a folder, got the file {str(folder)!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"evaluate: output must be a folder that can be made, got {str(folder)!r}; {error}") from error
    return folder
