"""The paper's experiments on any model: addition, multiplication, translation, as curves over the number of examples.

Three lines on the same axes:

    paper      Algorithm 1 with the published c1 and c2, the constant divisor 300, rows divided by ‖a‖, on the
               dataset's own answers
    tuned      the same with c1 chosen for this model on inputs that nothing else is measured on (c2 in proportion)
    default    transmute as it is called without options, on inputs alone: the prompted model writes the answers

The paper's blocks 10..19 of 26 become the same share of another model's depth (curves.paper_layers). A step is an
example, as in Algorithm 1. Every point is measured on the same inputs, where the paper drew ten anew at each step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thought_kernels.evaluation.experiments.curves import (
    answered,
    curve,
    default_line,
    default_steps,
    own_examples,
    paper_line,
    paper_steps,
)
from thought_kernels.evaluation.experiments.pairs import Pair, Split, check_context
from thought_kernels.evaluation.experiments.published import LINES, PUBLISHED, check_lines
from thought_kernels.evaluation.experiments.results import ExperimentReport, Line, write_results
from thought_kernels.evaluation.measures.scorers import as_scorer
from thought_kernels.evaluation.measures.trial import Trial, prompted_texts
from thought_kernels.evaluation.records.digests import data_hash, fingerprint
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.evaluation.rivals.paper import PAPER_DIVISOR, best_c1, paper_layers, paper_patch, sweep_c1
from thought_kernels.fitting.transmute import transmute
from thought_kernels.models import describe
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.version import __version__

MAX_KEPT_LOGITS = 2**28  # of the prompted model at the validation inputs; see Trial


def run_experiment(
    model: Any,
    tokenizer: Any,
    name: str,
    data: Split,
    output: Path,
    *,
    instruction: str | None = None,
    c1: float | None = None,
    c2: float | None = None,
    layers: Iterable[int] | None = None,
    lines: Sequence[str] = LINES,
    match: Any = "exact",
    max_new_tokens: int = 64,
    batch_size: int = 128,
    progress: bool = False,
) -> ExperimentReport:
    """Runs one of the paper's experiments and writes results.json, points.csv and samples.csv.

    A run that was stopped goes on from journal.jsonl in the same folder.

    Args:
        model: a transformers causal language model, unpatched.
        tokenizer: its tokenizer.
        name: of PUBLISHED.
        data: pairs; as many steps as there are pairs to fit on.
        output: folder of the results.
        instruction, c1, c2: None for the published ones.
        layers: 0-based blocks of the paper's recipe, None for paper_layers.
        lines: which of LINES to measure.
        match: what as_scorer takes.
        max_new_tokens: where answers are cut.
        batch_size: inputs at a time.
        progress: show a bar on stderr.

    Returns:
        An ExperimentReport.

    Raises:
        ValueError: an unknown name or line, constants or blocks that the paper's recipe cannot have, a pair longer than
            the model's context, or a folder with results of other settings.

    Source: "Transmuting prompts into weights", §4.1 to §4.3, Figures 1 and 2, Tables 1 to 3.
    """
    if name not in PUBLISHED:
        raise ValueError(f"experiment: name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    check_lines(lines)
    published = PUBLISHED[name]
    told = published.instruction if instruction is None else instruction
    decoder = describe(model)
    model, blocks = decoder.model, len(decoder.blocks)  # a compiled one would be compiled anew for each patch
    chosen = sorted(paper_layers(blocks) if layers is None else layers)
    if set(lines) - {"default"}:  # nothing is measured for numbers or blocks that the recipe would refuse
        published.recipe(c1, c2, chosen).for_model(decoder)
    c1, c2 = published.constants(c1, c2)
    check_context(model, tokenizer, told, [*data.fit, *data.validation, *data.fresh])
    settings = {
        "experiment": name, "instruction": told, "c1": c1, "c2": c2, "divisor": PAPER_DIVISOR,
        "layers": chosen, "blocks": blocks, "steps": len(data.fit), "validation": len(data.validation),
        "inputs": len(data.fresh), "data": data_hash(data), "match": as_scorer(match).name,
        "max_new_tokens": max_new_tokens, "model": _model_name(model), "weights": fingerprint(model),
        "transmute_defaults": transmute_defaults(), "version": __version__,
    }  # fmt: skip
    journal = Journal(output / "journal.jsonl", settings)
    options = {"match": match, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    total = sum(len(_steps(line, len(data.fit))) for line in lines) + ("tuned" in lines)
    with tqdm(total=total, desc=name, unit="point", disable=not progress, leave=False) as bar:
        run = _Run(model, tokenizer, told, data, journal, settings, options, bar)
        found = [run.line(line) for line in LINES if line in lines]
        sweep = [(c, a, r) for c, a, r in run.sweep] if "tuned" in lines else []
        report = ExperimentReport(
            name, published.source, run.levels["prompted"], run.levels["base"], len(data.fresh), found, sweep,
            published.sampled, settings,
        )  # fmt: skip
    write_results(report, output)
    return report


def _model_name(model: Any) -> str:
    """A hub id, or the name of a folder without where it lies, so that results can be handed on."""
    name = str(getattr(model.config, "_name_or_path", ""))
    return Path(name).name if Path(name).is_dir() else name


def transmute_defaults() -> dict[str, Any]:
    """The defaults of transmute's options, the recipe's and the others, as JSON values: what results depend on.

    Rows on disk are told apart by these. `mlp_activation` is left out, since none of the default sites has it.
    """
    return {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in inspect.signature(transmute).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in ("mlp_activation", "progress")
    }


def _steps(line: str, count: int) -> list[int]:
    return default_steps(count) if line == "default" else paper_steps(count)


class _Run:
    """One experiment under way; what the journal holds is not computed again, nor what only it would need."""

    def __init__(
        self, model: Any, tokenizer: Any, instruction: str, data: Split, journal: Journal, settings: dict[str, Any],
        options: dict[str, Any], bar: Any,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._instruction = model, tokenizer, instruction
        self._data, self._journal, self._settings, self._options, self._bar = data, journal, settings, options, bar

    @cached_property
    def _trial(self) -> Trial:
        return self._trial_of(self._data.fresh, divergences=False)

    def _trial_of(self, pairs: Sequence[Pair], *, divergences: bool) -> Trial:
        return Trial(
            self._model, self._tokenizer, self._instruction, [pair.question for pair in pairs],
            [pair.answer for pair in pairs], divergences=divergences, **self._options,
        )  # fmt: skip

    @cached_property
    def levels(self) -> dict[str, Any]:
        """Accuracy and answers with and without the instruction."""
        return self._journal.once("levels", lambda: {
            "prompted": self._trial.prompted, "base": self._trial.base,
            "prompted_texts": self._trial.prompted_texts, "base_texts": self._trial.base_texts,
        })  # fmt: skip

    @cached_property
    def _own_examples(self) -> list[dict[str, Any]]:
        """The inputs with what the prompted model writes to them, for the default recipe."""
        questions = [pair.question for pair in self._data.fit]
        generation = {name: value for name, value in self._options.items() if name != "match"}
        written = self._journal.once(
            "completions",
            lambda: prompted_texts(self._model, self._tokenizer, self._instruction, questions, **generation),
        )
        return own_examples(questions, written)

    @property
    def _dataset(self) -> list[dict[str, str]]:
        return [{"prompt": pair.question, "completion": pair.answer} for pair in self._data.fit]

    @cached_property
    def sweep(self) -> list[list[Any]]:
        """What c1 was chosen from."""
        return self._journal.once("sweep", self._swept)

    def _swept(self) -> list[list[Any]]:
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        room = max(1, MAX_KEPT_LOGITS // (vocabulary * int(self._options["max_new_tokens"])))
        trial = self._trial_of(self._data.validation[:room], divergences=True)
        c1, c2 = self._settings["c1"], self._settings["c2"]
        examples = self._dataset[:PAPER_DIVISOR]
        unit = self._paper_patch(examples, 1.0, c2 / c1 if c1 else 0.0)
        tried = sweep_c1(self._model, unit, trial, c1)
        return [[c, accuracy, recovered if math.isfinite(recovered) else None] for c, accuracy, recovered in tried]

    def _paper_patch(self, examples: Sequence[Any], c1: float, c2: float) -> ThoughtPatch:
        return paper_patch(
            self._model, self._tokenizer, self._instruction, examples, c1, c2, layers=self._settings["layers"],
            batch_size=self._options["batch_size"],
        )  # fmt: skip

    def line(self, name: str) -> Line:
        """Measures one line."""
        c1, c2 = self._settings["c1"], self._settings["c2"]
        if name == "tuned":
            factor = best_c1([(c, a, -math.inf if r is None else r) for c, a, r in self.sweep]) / c1 if c1 else 1.0
            c1, c2 = factor * c1, factor * c2
            self._bar.update()
        paper = name != "default"
        steps = _steps(name, len(self._data.fit))
        missing = [count for count in steps if f"{name} {count}" not in self._journal]
        self._bar.update(len(steps) - len(missing))
        patches: Iterator[tuple[int, ThoughtPatch]] = iter(())
        if missing and paper:
            patches = paper_line(
                self._model, self._tokenizer, self._instruction, self._dataset, missing, c1, c2,
                layers=self._settings["layers"], batch_size=self._options["batch_size"],
            )  # fmt: skip
        elif missing:
            patches = default_line(self._model, self._tokenizer, self._instruction, self._own_examples, missing)
        for count, accuracy, texts in answered(self._model, self._trial, patches) if missing else ():
            self._journal.once(f"{name} {count}", partial(dict, accuracy=accuracy, texts=texts))
            self._bar.update()
        levels = self.levels
        rows = [(0, levels["base"], levels["base_texts"])]
        for count in steps:
            row: dict[str, Any] = self._journal.once(f"{name} {count}", dict)  # measured above
            rows.append((count, row["accuracy"], row["texts"]))
        questions = [pair.question for pair in self._data.fresh]
        points, samples = curve(rows, questions, levels["prompted_texts"], c1 if paper else None)
        layers = list(self._settings["layers"]) if paper else None
        return Line(name, c1 if paper else None, c2 if paper else None, layers, points, samples)
