"""The paper's experiments on real models, into ../results/experiments/real/MODEL/EXPERIMENT.

    python benchmarks/real/published.py --models gemma=DIR smol=DIR qwen=DIR [--only qwen/addition]
    python benchmarks/real/published.py --models ... --estimate       says how long each takes here, and stops

A model is a folder or a .gguf file; those not given are skipped. The paper's 600 steps and divisor 300, with fewer
points a line on Qwen, where each takes half a minute. An experiment that was stopped goes on from its journal, which is
removed when it is finished; what is finished is not measured again, and refused where its settings were others: delete
its folder for that. judged.py then has a model grade the translations, and write_tables.py makes the tables of
docs/experiments_real.md anew.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import BATCH_SIZE, MAX_NEW_TOKENS, first_line
from tasks import WORD_FORMAT
from translations import sentence_split, word_split, words_in_common
from triples import last_value, triple_split

import thought_kernels as tk
from thought_kernels.evaluation.experiments.experiments import run_experiment
from thought_kernels.evaluation.experiments.pairs import Pair, Split
from thought_kernels.evaluation.experiments.published import CHOSEN, PUBLISHED, READINGS
from thought_kernels.evaluation.measures.trial import prompted_texts
from thought_kernels.evaluation.pictures.curves import draw_experiment
from thought_kernels.evaluation.records.digests import data_hash
from thought_kernels.evaluation.rivals.paper import C1_FACTORS, PAPER_DIVISOR, paper_patch
from thought_kernels.models.load import load
from thought_kernels.prompts.prompt import Instruction

OUTPUT = Path(__file__).parents[1] / "results" / "experiments" / "real"
ARITHMETIC_TOKENS = 64  # a model that explains what it does names the result late
PROBED = 8  # inputs that are answered, and read, for the estimate


@dataclass(frozen=True)
class Setting:
    """An experiment on a model: what is told, the pairs, and what counts as right."""

    instruction: Instruction
    data: Split
    match: Callable[[str, str, str], float]
    max_new_tokens: int
    format: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "format": self.format, "batch_size": BATCH_SIZE}


def _numbers(name: str, steps: int, inputs: int) -> Setting:
    data = triple_split(name, steps, inputs)
    return Setting(PUBLISHED[name].instruction, data, last_value, ARITHMETIC_TOKENS)


def _sentences(name: str, steps: int, inputs: int) -> Setting:
    data = sentence_split(steps, inputs)
    return Setting(PUBLISHED[name].instruction, data, words_in_common, MAX_NEW_TOKENS["instruction"])


def _words(name: str, steps: int, inputs: int) -> Setting:
    demonstrations, data = word_split(steps, inputs)
    return Setting(demonstrations, data, first_line, MAX_NEW_TOKENS["word"], WORD_FORMAT)


EXPERIMENTS: dict[str, dict[str, Callable[[str, int, int], Setting]]] = {
    "qwen": {"addition": _numbers, "multiplication": _numbers, "translation": _sentences},
    "smol": {"translation": _sentences},
    "gemma": {"translation": _words},
}
STRIDES = {"qwen": 4, "smol": 10, "gemma": 10}  # of the paper's lines
DEFAULT_POINTS = {"qwen": (32,), "smol": (4, 8, 16, 32), "gemma": (4, 8, 16, 32)}


def points(model: str, fit: Sequence[Pair]) -> dict[str, list[int]]:
    """Steps at which the lines are measured; the default line takes each pair once."""
    steps, distinct, strides = len(fit), len(set(fit)), STRIDES[model]
    return {
        "points": sorted({max(1, steps * k // strides) for k in range(1, strides + 1)}),
        "default_points": sorted({min(count, distinct) for count in DEFAULT_POINTS[model]}),
    }


def estimate(model: Any, tokenizer: Any, setting: Setting, at: dict[str, list[int]]) -> tuple[float, float]:
    """Minutes that an experiment takes: where answers end as prompted ones do, and where none ends by itself."""
    told, data, recipe = setting.instruction, setting.data, tk.Recipe()
    questions = [pair.question for pair in data.fresh[:PROBED]]
    examples = [{"prompt": pair.question, "completion": pair.answer} for pair in data.fit[:PROBED]]
    started = time.monotonic()
    texts = prompted_texts(model, tokenizer, told, questions, **setting.options)
    answer = (time.monotonic() - started) / len(questions)
    started = time.monotonic()
    paper_patch(model, tokenizer, told, examples, 1.0, format=setting.format, batch_size=BATCH_SIZE)
    example = (time.monotonic() - started) / len(examples)
    started = time.monotonic()
    tk.transmute(model, tokenizer, told, examples, written_inputs=0, **setting.options)
    row = (time.monotonic() - started) / len(examples)

    readings = set(READINGS.values())
    read = len(readings) * (len(data.fit) + min(PAPER_DIVISOR, len(data.fit)))
    asked = (len(READINGS) * len(at["points"]) + len(at["default_points"]) + 2) * len(data.fresh)
    tried = 2 * len(CHOSEN) * len(C1_FACTORS) * len(data.validation)  # a read answer and a written one each
    # A default patch is of the examples' completions and of one to each input, a line, that the model writes itself.
    rows = sum(count * recipe.completions + recipe.written_inputs for count in at["default_points"])
    answers = asked + tried + rows + recipe.written_inputs * len(at["default_points"])
    longest = max(1, max(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids))
    few = answer * answers + example * read + row * rows
    return few / 60, (few + answer * (asked + tried / 2) * max(0.0, setting.max_new_tokens / longest - 1)) / 60


def is_finished(folder: Path, setting: Setting) -> bool:
    """Whether the folder holds the experiment's results and no journal of a run that was stopped.

    Raises:
        ValueError: results of other settings, such as those of a trial with fewer steps.
    """
    if not (folder / "results.json").is_file() or (folder / "journal.jsonl").is_file():
        return False
    held = json.loads((folder / "results.json").read_text(encoding="utf-8"))["settings"]
    here = {
        "steps": len(setting.data.fit), "inputs": len(setting.data.fresh), "match": setting.match.__qualname__,
        "max_new_tokens": setting.max_new_tokens, "data": data_hash(setting.data),
    }  # fmt: skip
    other = [
        f"{key} {held.get(key)!r} there and {value!r} here" for key, value in here.items() if held.get(key) != value
    ]
    if other:
        raise ValueError(
            f"published: {folder} must hold results of the same settings, got {', '.join(other)}; remove it or give "
            "another --output"
        )
    return True


def missing(options: argparse.Namespace, name: str) -> list[tuple[str, Path, Setting]]:
    """Experiments of a model that are still to be measured; all of them where only their time is asked for."""
    found = []
    for experiment, of in EXPERIMENTS[name].items():
        folder, setting = options.output / name / experiment, of(experiment, options.steps, options.inputs)
        if options.only in (None, f"{name}/{experiment}") and (options.estimate or not is_finished(folder, setting)):
            found.append((experiment, folder, setting))
    return found


def run(options: argparse.Namespace, name: str, path: str) -> None:
    """Measures, or estimates, what is missing of one model."""
    wanted = missing(options, name)
    if not wanted:
        return
    model, tokenizer = load(path)
    for experiment, folder, setting in wanted:
        at, started = points(name, setting.data.fit), time.monotonic()
        least, most = estimate(model, tokenizer, setting, at)
        print(f"{name} {experiment}: {least:.0f} to {most:.0f} minutes from its beginning", flush=True)
        if options.estimate:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        report = run_experiment(
            model, tokenizer, experiment, setting.data, folder, instruction=setting.instruction, match=setting.match,
            progress=True, **setting.options, **at,
        )  # fmt: skip
        draw_experiment(report, folder / "figure.png")
        (folder / "journal.jsonl").unlink()
        print(f"{name} {experiment}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--only", metavar="MODEL/EXPERIMENT", help="such as qwen/addition")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--inputs", type=int, default=32, help="that each point is measured on")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    for entry in options.models:
        if entry.partition("=")[0] not in EXPERIMENTS or not entry.partition("=")[2]:
            parser.error(f"models must be NAME=PATH with a name of {', '.join(EXPERIMENTS)}, got {entry!r}")
    known = [f"{name}/{experiment}" for name, experiments in EXPERIMENTS.items() for experiment in experiments]
    if options.only not in (None, *known):
        parser.error(f"only must be one of {', '.join(known)}, got {options.only!r}")
    try:
        for entry in options.models:  # before hours are spent on the first of them
            missing(options, entry.partition("=")[0])
    except ValueError as error:
        parser.error(str(error))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "transmute: .* completions did not end")  # and were cut, as all answers are
        for entry in options.models:
            run(options, *entry.split("=", 1))


if __name__ == "__main__":
    main()
