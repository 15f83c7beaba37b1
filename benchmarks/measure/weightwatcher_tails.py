"""Ranks and tails of the same matrices by thought_kernels and by the weightwatcher package, side by side.

    pip install --target DIR --no-deps weightwatcher "powerlaw<2" pandas scipy scikit-learn joblib loky cloudpickle \\
        threadpoolctl narwhals mpmath matplotlib-inline traitlets python-dateutil six pytz
    PYTHONPATH=DIR python benchmarks/measure/weightwatcher_tails.py [--model DIR] [--output results/weightwatcher.csv]

A directory of its own, since weightwatcher pins nothing and would pull other versions of what is installed here. The
last columns repeat the tail with weightwatcher's choices (eigenvalues above 1e-5, tails of two or more): they
show that nothing else differs. What the differences are is said in docs/spectral_models.md.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thought_kernels.demo import CHECKPOINT
from thought_kernels.spectral.inspect import inspect_matrix
from thought_kernels.spectral.stored import stored_matrices
from thought_kernels.spectral.tails import power_law_tail

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLUMNS = ("matrix", "rows", "columns", "rank", "ww_rank", "stable_rank", "ww_stable_rank", "effective_rank",
           "ww_effective_rank", "log_norm", "ww_log_norm", "log_spectral_norm", "ww_log_spectral_norm",
           "alpha", "ww_alpha", "tail", "ww_tail", "distance", "ww_distance", "alpha_weighted", "ww_alpha_weighted",
           "log_alpha_norm", "ww_log_alpha_norm", "alpha_by_ww_rules", "tail_by_ww_rules", "distance_by_ww_rules",
           "alpha_weighted_by_ww_rules", "log_alpha_norm_by_ww_rules")  # fmt: skip
WW_EIGENVALUE = 1e-5  # weightwatcher.constants.EVALS_THRESH


def synthetic() -> dict[str, Tensor]:
    """Matrices whose spectra are known: noise, an exact power law, noise at a small scale, low rank, heavy entries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(600, 400))[0], torch.linalg.qr(normal(400, 400))[0]
    quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    power_law = (1 - quantiles) ** (-1 / (3.0 - 1))  # eigenvalues with density λ^-3
    noise = normal(600, 400)
    heavy = normal(600, 400) / (torch.rand(600, 400, generator=generator, dtype=torch.float64) ** 0.5)
    return {
        "gaussian": noise / 600**0.5,
        "gaussian, scaled by 1e-4": 1e-4 * noise / 600**0.5,
        "exact power law, alpha 3": (left * power_law.sqrt()) @ right.T,
        "rank 60 and noise of 1e-4": normal(600, 60) @ normal(60, 400) / 600 + 1e-4 * noise,
        "heavy-tailed entries": heavy / 600**0.5,
    }


def by_weightwatcher(matrices: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    model = nn.Module()
    names = {}
    for index, (name, W) in enumerate(matrices.items()):
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
        layer.weight.data.copy_(W)
        model.add_module(f"m{index}", layer)
        names[f"m{index}"] = name
    details = weightwatcher.WeightWatcher(model=model).analyze(min_evals=50, plot=False)
    found = {}
    for line in details.to_dict("records"):
        found[names[line["longname"]]] = {
            "ww_rank": line["matrix_rank"], "ww_stable_rank": line["stable_rank"],
            "ww_effective_rank": float(np.exp(line["entropy"] * np.log(line["matrix_rank"]))),
            "ww_log_norm": line["log_norm"], "ww_log_spectral_norm": line["log_spectral_norm"],
            "ww_alpha_weighted": line["alpha_weighted"], "ww_log_alpha_norm": line["log_alpha_norm"],
            "ww_alpha": line["alpha"], "ww_tail": line["num_pl_spikes"], "ww_distance": line["D"],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--output", type=Path, default=RESULTS / "weightwatcher.csv")
    settings = parser.parse_args()
    stored = {m.name.removesuffix(".weight"): m.read() for m in stored_matrices(settings.model) if min(m.shape) >= 50}
    matrices = {**synthetic(), **stored}
    theirs = by_weightwatcher(matrices)
    rows = []
    for name, W in matrices.items():
        ours = inspect_matrix(W)
        values = torch.linalg.svdvals(W.double()).square()
        same = power_law_tail(values[values > WW_EIGENVALUE], min_tail=2)
        row = {
            "matrix": name, "rows": W.shape[0], "columns": W.shape[1], **theirs[name],
            **{figure: ours[figure] for figure in
               ("rank", "stable_rank", "effective_rank", "log_norm", "log_spectral_norm", "alpha", "tail", "distance",
                "alpha_weighted", "log_alpha_norm")},
            "alpha_by_ww_rules": same and same.alpha, "tail_by_ww_rules": same and same.length,
            "distance_by_ww_rules": same and same.distance,
            "alpha_weighted_by_ww_rules": same and same.alpha * float(values[0].log10()),
            "log_alpha_norm_by_ww_rules": same and float(
                torch.logsumexp(same.alpha * values[values > WW_EIGENVALUE].log(), 0) / math.log(10)
            ),
        }  # fmt: skip
        rows.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    temporary = settings.output.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(settings.output)
    for row in rows:
        print(*(row[name] for name in COLUMNS), sep=", ")


if __name__ == "__main__":
    main()
