"""One experiment under way: what the journal holds is not computed again, nor what only it would need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from thought_kernels.evaluation.experiments.curves import curve, default_line, paper_line
from thought_kernels.evaluation.experiments.pairs import Pair, Split
from thought_kernels.evaluation.experiments.published import CHOSEN, READINGS
from thought_kernels.evaluation.experiments.results import Answer, Line
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.evaluation.records.journal import Journal
from thought_kernels.evaluation.rivals.paper import PAPER_DIVISOR, best_c1, paper_patch, sweep_c1
from thought_kernels.patches.patch import ThoughtPatch

MAX_KEPT_LOGITS = 2**28  # of the prompted model at the validation inputs; see Trial


class Measured:
    """Measures the lines of an experiment.

    Args:
        model: unpatched.
        tokenizer: its tokenizer.
        data: to fit on, to choose c1 on, to measure on.
        journal: of what has been measured.
        settings: of the experiment: its instruction, c1, c2 and layers are read.
        options: match, format, max_new_tokens and batch_size.
        bar: of tqdm, a unit a point.
    """

    def __init__(
        self, model: Any, tokenizer: Any, data: Split, journal: Journal, settings: Mapping[str, Any],
        options: Mapping[str, Any], bar: Any,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._data, self._journal = model, tokenizer, data, journal
        self._settings, self._options, self._bar = settings, options, bar

    def lines(self, names: Sequence[str], steps: Mapping[str, Sequence[int]]) -> tuple[list[Line], list[Answer]]:
        """Measures what is missing of some lines, each at its steps; all answers to their best and last points too."""
        chosen = [name for name in names if name in CHOSEN]
        self._bar.reset(total=sum(len(steps[name]) for name in names) + len(chosen))
        self._sweep(chosen)
        for activation in dict.fromkeys(READINGS.values()):
            self._measure_paper([name for name in names if READINGS.get(name) == activation], steps, activation)
        if "default" in names:
            self._measure_default(steps["default"])
        found = [self._line(name, steps[name]) for name in names]
        return found, [answer for line in found for answer in self._answers(line)]

    @cached_property
    def levels(self) -> dict[str, Any]:
        """Accuracy, answers and the prompted ones' grades, with and without the instruction."""
        return self._journal.once("levels", lambda: {
            "prompted": self._trial.prompted, "base": self._trial.base, "prompted_texts": self._trial.prompted_texts,
            "base_texts": self._trial.base_texts, "prompted_grades": self._trial.prompted_grades,
            "base_grades": self._trial.base_grades,
        })  # fmt: skip

    @cached_property
    def _trial(self) -> Trial:
        return self._trial_of(self._data.fresh, divergences=False)

    def _trial_of(self, pairs: Sequence[Pair], *, divergences: bool) -> Trial:
        return Trial(
            self._model, self._tokenizer, self._settings["instruction"], [pair.question for pair in pairs],
            [pair.answer for pair in pairs], divergences=divergences, **self._options,
        )  # fmt: skip

    def _sweep(self, names: Sequence[str]) -> None:
        """Tries c1 for lines that choose theirs, where the effective c1 is c1, or at the last step before that."""
        missing = [name for name in names if f"sweep {name}" not in self._journal]
        self._bar.update(len(names) - len(missing))
        if not missing:
            return
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        room = max(1, MAX_KEPT_LOGITS // (vocabulary * int(self._options["max_new_tokens"])))
        trial = self._trial_of(self._data.validation[:room], divergences=True)
        c1, c2 = self._settings["c1"], self._settings["c2"]
        for name in missing:
            unit = paper_patch(
                self._model, self._tokenizer, self._settings["instruction"], self._dataset[:PAPER_DIVISOR], 1.0,
                c2 / c1 if c1 else 0.0, **self._paper_options(READINGS[name]),
            )  # fmt: skip
            tried = [
                [c, accuracy, recovered if math.isfinite(recovered) else None]
                for c, accuracy, recovered in sweep_c1(self._model, unit, trial, c1)
            ]
            self._journal.once(f"sweep {name}", partial(list, tried))
            self._bar.update()

    def _swept(self, name: str) -> list[tuple[float, float, float | None]]:
        tried: list[list[Any]] = self._journal[f"sweep {name}"] if name in CHOSEN else []
        return [(c1, accuracy, recovered) for c1, accuracy, recovered in tried]

    def _factor(self, name: str) -> float:
        """What a line multiplies the published c1 and c2 by."""
        swept, c1 = self._swept(name), self._settings["c1"]
        if not swept or not c1:
            return 1.0
        return best_c1([(c, a, -math.inf if r is None else r) for c, a, r in swept]) / c1

    @property
    def _dataset(self) -> list[dict[str, str]]:
        return [{"prompt": pair.question, "completion": pair.answer} for pair in self._data.fit]

    def _paper_options(self, activation: str) -> dict[str, Any]:
        return {
            "layers": self._settings["layers"], "mlp_activation": activation, "format": self._options["format"],
            "batch_size": self._options["batch_size"],
        }  # fmt: skip

    def _measure_paper(self, names: Sequence[str], steps: Mapping[str, Sequence[int]], activation: str) -> None:
        """Lines of one reading of a: Algorithm 1 is linear in its constants, and the examples are read once for all."""
        wanted = {
            count: [name for name in names if f"{name} {count}" not in self._journal]
            for name in names for count in steps[name]
        }  # fmt: skip
        self._bar.update(sum(len(names) - len(missing) for missing in wanted.values()))
        patches = paper_line(
            self._model, self._tokenizer, self._settings["instruction"], self._dataset,
            [count for count, missing in wanted.items() if missing], self._settings["c1"], self._settings["c2"],
            **self._paper_options(activation),
        )  # fmt: skip
        for count, patch in patches:
            for name in wanted[count]:
                self._answer(name, count, self._factor(name) * patch)

    def _measure_default(self, steps: Sequence[int]) -> None:
        missing = [count for count in steps if f"default {count}" not in self._journal]
        self._bar.update(len(steps) - len(missing))
        if not missing:
            return
        questions = [pair.question for pair in self._data.fit]
        options = {name: value for name, value in self._options.items() if name != "match"}
        told = self._settings["instruction"]
        for count, patch in default_line(self._model, self._tokenizer, told, questions, missing, **options):
            self._answer("default", count, patch)

    def _answer(self, name: str, count: int, patch: ThoughtPatch) -> None:
        def answered() -> dict[str, Any]:
            with patch.applied(self._model):
                texts = trial.answer_bare(self._model)
            return {"texts": texts, "grades": trial.grade(texts)}

        trial = self._trial  # of the bare model: made before the patch is applied
        self._journal.once(f"{name} {count}", answered)
        self._bar.update()

    def _point(self, name: str, count: int) -> tuple[list[str], list[float]]:
        """Answers and grades, which have been measured."""
        if count == 0:
            return self.levels["base_texts"], self.levels["base_grades"]
        row: dict[str, Any] = self._journal[f"{name} {count}"]
        return row["texts"], row["grades"]

    def _line(self, name: str, steps: Sequence[int]) -> Line:
        rows = [(count, *self._point(name, count)) for count in (0, *steps)]
        questions = [pair.question for pair in self._data.fresh]
        paper, factor = name != "default", self._factor(name)
        c1, c2 = (factor * self._settings[scale] if paper else None for scale in ("c1", "c2"))
        points, samples = curve(
            [(count, sum(grades) / len(grades), texts) for count, texts, grades in rows], questions,
            self.levels["prompted_texts"], c1,
        )  # fmt: skip
        layers = list(self._settings["layers"]) if paper else None
        return Line(name, c1, c2, layers, points, samples, self._swept(name))

    def _answers(self, line: Line) -> list[Answer]:
        levels, found = self.levels, []
        for count in sorted({line.best.steps, line.points[-1].steps}):
            texts, grades = self._point(line.name, count)
            for pair, *told, text, grade in zip(
                self._data.fresh, levels["prompted_texts"], levels["prompted_grades"], texts, grades, strict=True
            ):
                found.append(Answer(line.name, count, *pair, told[0], text, told[1], grade))
        return found
