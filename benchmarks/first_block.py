"""Where copies of the examples help: how far the first attention patch is off on words that no example held.

    python benchmarks/first_block.py [--output FILE.csv]

For every development instruction and model, a patch of block 0's attention is fitted to 32 examples of one half of the
symbols, without copies, with copies of other words and with copies of random vectors, at one ridge. Its error is
Σ w ‖Δ a − δ‖² / Σ w ‖δ‖² over the rows of 64 inputs of the other half, none of whose words an example or copy held.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import thought_kernels as tk
from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, split_by_symbols
from thought_kernels.evaluate.files import write_csv
from thought_kernels.models import describe
from thought_kernels.models.load import load
from thought_kernels.transmute.fitting import Recipe, sums_of
from thought_kernels.transmute.prompt import encode
from thought_kernels.transmute.substitution import word_tokens

OUTPUT = Path(__file__).parent / "results" / "first_block.csv"
MODELS = {"shipped": CHECKPOINT} | {name: Path(__file__).parent / "models" / name for name in ("small", "longer")}
RIDGE = 0.01


def errors(model: Any, tokenizer: Any, task: Task) -> dict[str, float]:
    """The error outside, by what the copies hold."""
    rng = random.Random(f"first block {task.name}")
    near, far = (rng.sample(texts, count) for texts, count in zip(split_by_symbols(task), (32, 64), strict=True))
    others = word_tokens(tokenizer, without=[*far, *map(task.answer, far)])
    examples = [{"prompt": text, "completion": task.answer(text)} for text in near]
    recipe = Recipe(
        layers=frozenset({0}), sites=frozenset({"attention"}), pairing="two_pass", estimator="ridge",
        normalization="none", tokens="all", header_weight=0.0, batch_size=32,
    )  # fmt: skip
    encoded = [encode(tokenizer, task.instruction, {"prompt": text, "completion": task.answer(text)}) for text in far]
    sums = sums_of(describe(model), recipe, encoded).sums(0, "attention")
    assert sums is not None and sums.cross is not None and sums.gram is not None
    cross, gram, energy = sums.cross.double(), sums.gram.double(), float(sums.moments[2])
    found = {}
    for name, options in (
        ("nothing", {"substitutions": 0}),
        ("words", {"substitutions": 8, "substitutes": others}),
        ("random vectors", {"substitutions": 8}),
    ):
        patch = tk.transmute(
            model, tokenizer, task.instruction, examples, layers=[0], sites=("attention",), ridge=RIDGE, **options
        )
        matrix = patch.matrix(0, "attention").double()
        found[name] = (energy + float(((matrix @ gram - 2 * cross) * matrix).sum())) / energy
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    rows = []
    for shown, folder in MODELS.items():
        model, tokenizer = load(folder)
        for name, task in TASKS.items():
            if name not in RESERVED_FOR_FINAL_STUDY:
                for copies, error in errors(model, tokenizer, task).items():
                    rows.append({"model": shown, "task": name, "copies": copies, "error": round(error, 4)})
    write_csv(rows, args.output)
    print(*(",".join(map(str, row.values())) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
