"""The pictures of docs/toy_models.md, from the committed results of the toy sweeps.

Drawings differ from one matplotlib to the next, so each picture carries a digest of its results, of this file and of
those that draw. It is drawn anew when that has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from thought_kernels.spectral.toy import figures, training_figures
from thought_kernels.spectral.toy.evolution_rows import read_evolution
from thought_kernels.spectral.toy.sweeps import read_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FOLDER = ROOT / "benchmarks" / "results", ROOT / "docs" / "toy"
CODE = (Path(__file__), Path(figures.__file__), Path(training_figures.__file__))


class ToyPicture(NamedTuple):
    """One picture: where it is, the results that it shows, and what makes a figure of their paths."""

    path: Path
    results: tuple[Path, ...]
    figure: Callable[..., Any]

    def digest(self) -> str:
        """Of everything that the picture depends on but matplotlib."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in (*CODE, *self.results))).hexdigest()

    def is_current(self) -> bool:
        return self.path.is_file() and self.digest().encode() in self.path.read_bytes()

    def draw(self) -> None:
        """Writes the picture, replacing the file in one step."""
        self.path.parent.mkdir(exist_ok=True)
        figures.save(self.figure(*self.results), self.path, f"drawn from {self.digest()}")


def saturation(*results: Path) -> Any:
    return figures.saturation_figure(*map(read_rows, results))


def linearity(*results: Path) -> Any:
    return figures.linearity_figure(*map(read_rows, results))


def residue(*results: Path) -> Any:
    return figures.residue_figure(*map(read_rows, results))


def dimensionality(results: Path) -> Any:
    rows = read_evolution(results)
    return training_figures.dimensionality_figure(rows, rows[0]["dimensions"])


def evolution(results: Path, **kept: float) -> Any:
    """Of all models, or of those of one m or S."""
    rows = [row for row in read_evolution(results) if all(row[name] == value for name, value in kept.items())]
    return training_figures.evolution_figure(rows)


def picture(name: str, figure: Callable[..., Any], *results: str) -> ToyPicture:
    return ToyPicture(FOLDER / f"{name}.png", tuple(RESULTS / f"toy_{result}.csv" for result in results), figure)


TOY_PICTURES = [
    *(
        picture(f"{name}{suffix}", figure, *(f"{result}{suffix}" for result in results))
        for suffix in ("", "_nonuniform")
        for name, figure, results in (
            ("saturation", saturation, ("sweep", "nulls")),
            ("linearity", linearity, ("clusters", "null_clusters")),
            ("residue", residue, ("sweep", "nulls")),
        )
    ),
    picture("dimensionality", dimensionality, "evolution"),
    picture("evolution", evolution, "evolution"),
]
# The paper's own models take hours of training; without their results there is nothing of them to show.
if (RESULTS / "toy_evolution_paper.csv").is_file():
    TOY_PICTURES += [
        picture("evolution_paper", partial(evolution, sparsity=0.9), "evolution_paper"),
        picture("evolution_paper_m112", partial(evolution, dimensions=112), "evolution_paper"),
    ]
