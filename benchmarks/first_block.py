"""Where copies of the examples help: how far the first attention patch is off on words that no example held.

    python benchmarks/first_block.py [--output FILE.csv]

For every development instruction and model, a patch of block 0's attention is fitted to 32 examples of one half of the
symbols, without copies, with copies of other words and with copies of random vectors, at the ridge for copies. Its
error is Σ w ‖Δ a − δ‖² / Σ w ‖δ‖² over the rows of 64 inputs of the other half, none of whose words an example or copy
held. The second figure is Σ w (u·a − 1)² / Σ w over the same rows, u fitted to u·a = 1 in the same way: what a matrix
has in place of a vector.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from thought_kernels.demo import CHECKPOINT
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, split_by_symbols
from thought_kernels.evaluate.files import write_csv
from thought_kernels.models import describe
from thought_kernels.models.load import load
from thought_kernels.transmute.estimators import Sums, ridge_solve
from thought_kernels.transmute.fitting import Recipe, sums_of
from thought_kernels.transmute.prompt import encode
from thought_kernels.transmute.substitution import without_words_of, word_tokens
from thought_kernels.transmute.transmute import RIDGE_WITH_SUBSTITUTIONS

OUTPUT = Path(__file__).parent / "results" / "first_block.csv"
MODELS = {"shipped": CHECKPOINT} | {name: Path(__file__).parent / "models" / name for name in ("small", "longer")}
RIDGE = RIDGE_WITH_SUBSTITUTIONS


def errors(model: Any, tokenizer: Any, task: Task) -> dict[str, tuple[float, float]]:
    """Outside, by what the copies hold: the patch's error, and that of the direction fitted to u·a = 1."""
    rng = random.Random(f"first block {task.name}")
    near, far = (rng.sample(texts, count) for texts, count in zip(split_by_symbols(task), (32, 64), strict=True))
    others = without_words_of(tokenizer, word_tokens(tokenizer), [*far, *map(task.answer, far)])
    decoder = describe(model)

    def sums(texts: list[str], **copies: Any) -> Sums:
        recipe = Recipe(
            layers=frozenset({0}), sites=frozenset({"attention"}), pairing="two_pass", estimator="ridge",
            normalization="none", tokens="all", header_weight=0.0, batch_size=32, **copies,
        )  # fmt: skip
        examples = [{"prompt": text, "completion": task.answer(text)} for text in texts]
        encoded = [encode(tokenizer, task.instruction, example) for example in examples]
        found = sums_of(decoder, recipe, encoded).sums(0, "attention")
        assert found is not None
        return Sums(*(tensor.double() for tensor in found))

    outside = sums(far)
    total, _, energy, _ = outside.moments.tolist()
    found = {}
    for name, copies in (
        ("nothing", {}),
        ("words", {"substitutions": 8, "substitutes": others}),
        ("random vectors", {"substitutions": 8}),
    ):
        fitted = sums(near, **copies)
        matrix = ridge_solve(fitted.cross, fitted.gram, RIDGE)
        error = energy + float(((matrix @ outside.gram - 2 * outside.cross) * matrix).sum())
        u = ridge_solve(fitted.activation_sum[None], fitted.gram, RIDGE)[0]
        constant = total + float(u @ outside.gram @ u - 2 * u @ outside.activation_sum)
        found[name] = (error / energy, constant / total)
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
                for copies, (error, constant) in errors(model, tokenizer, task).items():
                    rows.append(
                        {"model": shown, "task": name, "copies": copies, "error": round(error, 3),
                         "constant_error": round(constant, 3)}
                    )  # fmt: skip
    write_csv(rows, args.output)
    print(*(",".join(map(str, row.values())) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
