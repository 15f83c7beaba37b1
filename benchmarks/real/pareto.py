"""What a patch's effect costs in drift on ordinary text, by three knobs: its scale, its ridge, a term for such text.

    python benchmarks/real/pareto.py --models gemma=DIR smol=DIR [--inputs 32 --written 64]

The term: rows of ordinary text join the ridge metric with δ = 0, Z + γ Z_text, so that a patch is charged for what it
would do to them. Half of the package's passages are in the term, the drift is that on the other half. Each point is a
row of ../results/pareto.csv, written at once; rows that are there are kept.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import BATCH_SIZE, MATCHES, MAX_NEW_TOKENS
from tasks import WORD_FORMAT, Task, task
from torch import Tensor

from thought_kernels.estimation.accumulator import ThoughtAccumulator
from thought_kernels.evaluation.arguments import Data, Limits, read_subject
from thought_kernels.evaluation.measures.drift import Drift
from thought_kernels.evaluation.measures.prose import PROSE
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.models.load import load
from thought_kernels.patches.patch import ThoughtPatch

OUTPUT = Path(__file__).parents[1] / "results" / "pareto.csv"
TASKS = {"gemma": "antonym", "smol": "french"}
KNOBS: dict[str, tuple[float, ...]] = {
    "scale": (0.6, 0.7, 0.8, 0.9, 1.0), "ridge": (0.1, 0.3, 1.0, 3.0, 10.0), "text": (0.1, 0.3, 1.0, 3.0, 10.0),
}  # fmt: skip
KEY = ("model", "task", "inputs", "written", "knob", "value")
COLUMNS = (*KEY, "recovered", "text_kl", "text_perplexity", "bare_perplexity", "text_tokens", "torch", "date")
KINDS = list(PROSE)
IN_THE_TERM, MEASURED = ({kind: PROSE[kind] for kind in KINDS[first::2]} for first in (0, 1))


class WithText(ThoughtAccumulator):
    """Sums of a fit that are joined by rows of ordinary text, with δ = 0 and a weight together.

    Args:
        rows: what enters the output projections of each block and site at each token of the text, [n, d_in].
        weight: of all text rows together.
    """

    def __init__(self, rows: dict[tuple[int, str], Tensor], weight: float) -> None:
        super().__init__()
        self._rows, self._weight = rows, weight

    def update(
        self, layer: int, site: str, delta: Tensor, activation: Tensor | None, weights: Tensor | None = None
    ) -> None:
        """As ThoughtAccumulator.update; the text's rows come with the first rows of a block and site."""
        if (layer, site) not in self._sums:
            text = self._rows[layer, site]
            each = torch.full(text.shape[:1], self._weight / len(text))
            super().update(layer, site, torch.zeros(len(text), delta.shape[-1]), text, each)
        super().update(layer, site, delta, activation, weights)


def text_rows(subject: Subject) -> dict[tuple[int, str], Tensor]:
    """The inputs of o_proj and down_proj of every block, over the passages of the term."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for block in subject.decoder.blocks:
        for site, module in (("attention", block.o_proj), ("down", block.down_proj)):
            rows = found.setdefault((block.index, site), [])
            handles.append(module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0])))
    try:
        with torch.no_grad():
            for text in IN_THE_TERM.values():
                subject.model(input_ids=torch.tensor([subject.tokenizer(text)["input_ids"]]), logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(rows) for key, rows in found.items()}


def subject_of(model: Any, tokenizer: Any, of: Task, options: argparse.Namespace) -> Subject:
    labelled = [text if answer is None else {"prompt": text, "completion": answer} for text, answer in of.held_out]
    data = Data(
        examples=[text for text, _ in of.inputs], held_out=labelled, answers=None, outside=None, longer=None,
        paraphrases=(), others=(), unrelated=None, pool=None,
    )  # fmt: skip
    limits = Limits(
        inputs=options.held_out, sweep_inputs=options.held_out, lora_steps=1, batch_size=BATCH_SIZE,
        max_new_tokens=MAX_NEW_TOKENS[of.kind], seed=0,
    )  # fmt: skip
    return read_subject(
        model, tokenizer, of.instruction, None, data, limits, scorer=MATCHES.get(of.kind, "exact"),
        recipe={"written_inputs": options.written}, separator=None, without=None,
        format=WORD_FORMAT if of.kind == "word" else None,
    )  # fmt: skip


def patches(subject: Subject, wanted: list[tuple[str, float]]) -> Iterator[tuple[str, float, ThoughtPatch]]:
    """The patch at each setting of a knob, the other knobs at the recipe's own."""
    rows = text_rows(subject) if any(knob == "text" for knob, _ in wanted) else {}
    for knob, value in wanted:
        if knob == "scale":
            yield knob, value, value * subject.patch
        elif knob == "ridge":
            yield knob, value, subject.refit(type(subject.recipe)(**{**subject.recipe, "ridge": value}))
        else:
            total = value * len({row.number for row in subject.encoded})
            yield knob, value, subject.refit(subject.recipe, accumulator=WithText(rows, total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--written", type=int, default=64, help="inputs that the model writes beside")
    parser.add_argument("--knobs", nargs="+", choices=KNOBS, default=list(KNOBS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    held: set[tuple[str, ...]] = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            held = {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}
    for name, _, path in (given.partition("=") for given in options.models):
        first = {"model": name, "task": TASKS[name], "inputs": options.inputs, "written": options.written}
        wanted = [
            (knob, value)
            for knob in options.knobs
            for value in KNOBS[knob]
            if tuple(str(cell) for cell in (*first.values(), knob, value)) not in held
        ]
        if wanted:
            measure(options, first, path, wanted)


def measure(options: argparse.Namespace, first: dict[str, Any], path: str, wanted: list[tuple[str, float]]) -> None:
    model, tokenizer = load(path)
    subject = subject_of(model, tokenizer, task(first["task"], seed=0, inputs=options.inputs), options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "transmute: .* completions did not end")
        drift, trial = Drift(model, tokenizer, MEASURED), subject.trial  # of the bare model
        for knob, value, patch in patches(subject, wanted):
            with patch.applied(model):
                score, reading = trial.score(model), drift.read(model)
            row = {
                **first, "knob": knob, "value": value, "recovered": round(score.effect.recovered, 5),
                "text_kl": round(reading.divergence, 6), "text_perplexity": round(reading.perplexity, 4),
                "bare_perplexity": round(drift.bare.perplexity, 4), "text_tokens": sum(reading.tokens),
                "torch": torch.__version__, "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            new = not options.output.exists()
            with options.output.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(*(row[name] for name in ("model", "knob", "value", "recovered", "text_kl", "text_perplexity")))


if __name__ == "__main__":
    main()
