"""What does one patch do to another on a pretrained model, and what foretells it?

    python benchmarks/real/foretell.py smol=DIR [--diagnosis FILE.csv]
    python benchmarks/real/foretell.py gemma=DIR --kind word        told by demonstrations: it has no chat template
        [--instructions french,pirate,...] [--examples 32] [--inputs 16] [--tokens 24] [--output FILE.csv]

A patch for each instruction (or word task) that is not reserved, and for each ordered pair (a, b) the model with both
patches on a's held-out inputs: how much of a's recovered effect is lost, (KL(prompted ‖ a + b) − KL(prompted ‖ a)) /
KL(prompted ‖ bare), summed over the prompted model's answers. Beside it what the weights foretell (`felt` of
spectral.interference, the cosine of the matrices, the overlap of what they read and write), what the weights and a's
activations foretell (`disturbance`), and what two forwards without the pair do: `moved`, KL(bare ‖ b) on a's inputs,
and `additive`, the loss if log-probabilities moved by the sum of what each patch alone moves them by.

Rank correlations with their bootstrap intervals over instructions go to FILE_correlations.csv. Every pair is written as
it is finished, patches are kept in FILE_patches/, and a run that was stopped goes on where it was; rows of other models
and settings stay. With --diagnosis, what each patch touches goes to a file too, a line for each block and site, with
the neurons it moves most and the tokens it writes towards.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tasks import WORD_FORMAT, task
from tasks import names as task_names
from torch import Tensor
from tqdm import tqdm

import thought_kernels as tk
from thought_kernels.evaluation.measures.overlap import activation_moments, predictions, rank_correlation
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.generation.logprobs import completion_logprobs, divergence
from thought_kernels.spectral import diagnose, interference, written_tokens

RESULTS = Path(__file__).resolve().parents[1] / "results"
FROM_WEIGHTS = ("felt", "felt_largest", "cosine", "inputs", "outputs", "norm")
PREDICTORS = (*FROM_WEIGHTS, "disturbance", "direction", "moved", "additive")
DRAWS = 1000

Row = dict[str, Any]


def read_rows(path: Path, key: Row, *, others: bool = False) -> list[Row]:
    """The rows with these settings, or all the others."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (key.items() <= row.items()) != others]


def write_rows(path: Path, key: Row, rows: Sequence[Row]) -> None:
    """Puts these rows, which have these settings, in the place of those that the file holds."""
    rows = [*read_rows(path, key, others=True), *rows]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def patches(model: Any, tokenizer: Any, instructions: Sequence[str], examples: int, folder: Path) -> dict[str, Any]:
    """A patch for each instruction, made once and kept."""
    found = {}
    for name in tqdm(instructions, desc="patches"):
        place = folder / f"{name}-{examples}"
        if not (place / "thought_patch.json").is_file():
            asked = task(name, seed=0, inputs=examples)
            made = tk.transmute(model, tokenizer, asked.instruction, [text for text, _ in asked.inputs], **turn(name))
            made.save_pretrained(place)
        found[name] = tk.ThoughtPatch.from_pretrained(place)
    return found


def turn(name: str) -> dict[str, str]:
    """How a turn of the task is written, where not by the chat template."""
    return {"format": WORD_FORMAT} if task(name, seed=0).kind == "word" else {}


class Asked:
    """One instruction's inputs, and what the prompted, the bare and the patched model think of the answers."""

    def __init__(self, model: Any, tokenizer: Any, name: str, made: dict[str, Any], settings: Any) -> None:
        patch, others = made[name], [other for other in made if other != name]
        found = interference(patch, [made[other] for other in others], model)  # the weights are read once for all
        self.weights, self.patch = dict(zip(others, found, strict=True)), patch
        held_out = [text for text, _ in task(name, seed=0).held_out][: settings.inputs]
        self.trial = Trial(
            model, tokenizer, task(name, seed=0).instruction, held_out, None, max_new_tokens=settings.tokens,
            **turn(name),
        )  # fmt: skip
        self.model, self.bare = model, self.read(model)
        with patch.applied(model), activation_moments(model, patch) as moments:
            self.alone = self.read(model)
        self.moments = moments
        self.scale = self.missed(self.bare)

    def read(self, model: Any) -> list[Tensor]:
        return list(completion_logprobs(model, self.trial.bare_prompts, self.trial.written, batch_size=8))

    def missed(self, logprobs: Sequence[Tensor]) -> float:
        """ΣKL(prompted ‖ these)."""
        assert self.trial.prompted_logprobs is not None
        return sum(float(one.sum()) for one in divergence(self.trial.prompted_logprobs, logprobs))

    def beside(self, name: str, other: Any) -> Row:
        """The measures of another patch on this instruction's inputs."""
        ours, weights = self.patch, self.weights[name]
        with (ours + other).applied(self.model):
            both = self.read(self.model)
        with other.applied(self.model):
            without = self.read(self.model)
        summed = [
            (bare + (mine - bare) + (theirs - bare)).log_softmax(-1)
            for bare, mine, theirs in zip(self.bare, self.alone, without, strict=True)
        ]
        alone = self.missed(self.alone)
        return {
            "felt": weights.felt, "felt_largest": max((one.felt for one in weights.sites.values()), default=0.0),
            "norm": math.sqrt(sum(entry.norm() ** 2 for entry in other.entries.values())),
            **predictions(ours, other, self.moments),
            "moved": sum(float(one.sum()) for one in divergence(self.bare, without)) / self.scale,
            "additive": (self.missed(summed) - alone) / self.scale,
            "recovered": 1 - alone / self.scale, "loss": (self.missed(both) - alone) / self.scale,
        }  # fmt: skip


def correlations(key: Row, rows: Sequence[Row]) -> list[Row]:
    """Spearman's ρ of each predictor with the loss, over all pairs and within an instruction, and its interval."""
    instructions = sorted({row["instruction"] for row in rows})
    lines = []
    for predictor in PREDICTORS:
        within = [spearman([row for row in rows if row["instruction"] == name], predictor) for name in instructions]
        known = [value for value in within if value is not None]
        low, high = interval(rows, predictor, instructions)
        overall = spearman(rows, predictor)
        lines.append({
            **key, "predictor": predictor, "pairs": len(rows), "spearman": "" if overall is None else f"{overall:.3f}",
            "low": f"{low:.3f}", "high": f"{high:.3f}", "within": f"{fmean(known):.3f}" if known else "",
        })  # fmt: skip
    return lines


def spearman(rows: Sequence[Row], predictor: str) -> float | None:
    return rank_correlation([float(row[predictor]) for row in rows], [float(row["loss"]) for row in rows])


def interval(rows: Sequence[Row], predictor: str, instructions: Sequence[str]) -> tuple[float, float]:
    """95 % by bootstrap over instructions, which the pairs share, rather than over pairs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = rng.choice(instructions, len(instructions))
        weight = {name: int((drawn == name).sum()) for name in instructions}
        sample = [row for row in rows for _ in range(weight[row["instruction"]] * weight[row["other"]])]
        value = spearman(sample, predictor) if len({row["instruction"] for row in sample}) > 2 else None
        if value is not None:
            found.append(value)
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def diagnosis(made: dict[str, Any], model: Any, tokens: Sequence[str], path: Path, key: Row) -> None:
    """What each patch touches, a line for each block and site."""
    rows = read_rows(path, key)
    for name in tqdm([name for name in made if name not in {row["instruction"] for row in rows}], desc="diagnosis"):
        written = written_tokens(made[name], model, tokens, count=5)
        for site in diagnose(made[name], model).sites.values():
            figures = site.features.summary()
            shown = {
                "rank": site.rank, "strength": site.strength, "write_gain": site.write_gain,
                "read_gain": site.read_gain, "dimensionality": figures["mean_absolute_dimensionality_change"],
                "largest_dimensionality": figures["largest_dimensionality_change"],
                "transport": figures["mean_transport"], "largest_transport": figures["largest_transport"],
            }  # fmt: skip
            rows.append({
                **key, "instruction": name, "block": site.layer, "site": site.site,
                **{figure: f"{value:.6g}" for figure, value in shown.items()},
                "most_transported": " ".join(map(str, figures["most_transported"])),
                "written": " ".join(f"{one.name}:{one.gain:.1f}" for one in written.get((site.layer, site.site), ())),
            })  # fmt: skip
        write_rows(path, key, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="NAME=FOLDER")
    parser.add_argument("--kind", choices=("instruction", "word"), default="instruction")
    parser.add_argument("--instructions", help="these alone")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--output", type=Path, default=RESULTS / "foretell.csv")
    parser.add_argument("--diagnosis", type=Path)
    settings = parser.parse_args()
    name, _, folder = settings.model.partition("=")
    key = {"model": name, "kind": settings.kind, "examples": str(settings.examples),
           "held_out": str(settings.inputs), "tokens": str(settings.tokens)}  # fmt: skip
    named = settings.instructions
    instructions = named.split(",") if named else task_names(settings.kind, reserved=False)
    rows = read_rows(settings.output, key)
    done = {(row["instruction"], row["other"]) for row in rows}
    wanted = [pair for pair in itertools.permutations(instructions, 2) if pair not in done]
    if wanted or settings.diagnosis:
        model, tokenizer = tk.load(folder)
        kept = settings.output.with_name(f"{settings.output.stem}_patches") / name
        made = patches(model, tokenizer, instructions, settings.examples, kept)
    asked: tuple[str, Asked] | None = None
    for ours, theirs in tqdm(wanted, desc="pairs"):
        if asked is None or asked[0] != ours:
            asked = (ours, Asked(model, tokenizer, ours, made, settings))
        found = asked[1].beside(theirs, made[theirs])
        rows.append({**key, "instruction": ours, "other": theirs, **{k: f"{v:.6g}" for k, v in found.items()}})
        write_rows(settings.output, key, rows)
    lines = correlations(key, rows)
    write_rows(settings.output.with_name(f"{settings.output.stem}_correlations.csv"), key, lines)
    for line in lines:
        print(*line.values(), sep=", ")
    if settings.diagnosis:
        tokens = tokenizer.convert_ids_to_tokens(range(model.get_input_embeddings().num_embeddings))
        diagnosis(made, model, [str(token) for token in tokens], settings.diagnosis, key)


if __name__ == "__main__":
    main()
