"""The demonstration: every instruction of a model bare, prompted and patched, and the paper's curve beside ours."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from thought_kernels.demo.curves import CURVES, VALIDATION, Curve, Sweep, curve_points, draw_curve, sweep_c1
from thought_kernels.demo.tasks import RESERVED_FOR_FINAL_STUDY, TASKS, Task, held_out, inputs, split_by_symbols
from thought_kernels.evaluation.measures.trial import Trial
from thought_kernels.fitting.transmute import transmute
from thought_kernels.pairing.replay import replay
from thought_kernels.prompts.prompt import encode

# What a patch must reach to stand for its instruction: shares of the prompted accuracy, and the recovered effect.
PATCHED_SHARE, RECOVERED, OUTSIDE_SHARE = 0.97, 0.98, 0.85

# Up to this size a float64 copy of the model is made for the replay; beyond it the model's own dtype has to do.
MAX_FLOAT64_PARAMETERS = 50_000_000

# The shipped model was trained on chats alone, so it can go on with no list; and the figures outside the symbols of the
# examples must know each symbol that a patch has seen.
WRITTEN_INPUTS = 0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One instruction's figures; accuracies and recovered effects are fractions.

    Attributes:
        name, instruction: of the task.
        reserved: nothing was chosen on it (tasks.RESERVED_FOR_FINAL_STUDY).
        inputs: fresh inputs that base, prompted, patched and the effects were measured on.
        examples: inputs that the patch was fitted on; their completions are the prompted model's own.
        base, prompted, patched: accuracy without the instruction, with it, and without it under the patch.
        recovered: 1 − ΣKL(prompted‖patched)/ΣKL(prompted‖bare) over the tokens of the prompted model's greedy
            completions, end-of-turn tokens included.
        recovered_values: the same over the value tokens alone: in an answer with an equals sign those after the last
            "= ", otherwise the whole answer without its end-of-turn token. A ratio of two small sums where the bare
            model's copy opens with the same tokens ("first": all that differs is where the answer ends).
        outside_inputs: inputs none of whose numbers or words occurs in any example of a second patch.
        prompted_outside, patched_outside: accuracy on those.
        replay_error, replay_control: worst relative error over blocks and logits of the exact replay on one prompt,
            and the logits' error without patches.
        replay_dtype: the arithmetic of the replay.
        seconds: time taken.
    """

    name: str
    instruction: str
    reserved: bool
    inputs: int
    examples: int
    base: float
    prompted: float
    patched: float
    recovered: float
    recovered_values: float
    outside_inputs: int
    prompted_outside: float
    patched_outside: float
    replay_error: float
    replay_control: float
    replay_dtype: str
    seconds: float

    @property
    def patched_reaches(self) -> bool:
        """Whether the patched accuracy is at least PATCHED_SHARE of the prompted one."""
        return self.patched >= PATCHED_SHARE * self.prompted

    @property
    def recovered_reaches(self) -> bool:
        """Whether the recovered effect is at least RECOVERED; False where it is not defined."""
        return self.recovered >= RECOVERED

    @property
    def outside_reaches(self) -> bool:
        """Whether the patched accuracy outside the examples' symbols is at least OUTSIDE_SHARE of the prompted one."""
        return self.patched_outside >= OUTSIDE_SHARE * self.prompted_outside

    def shortfalls(self) -> list[str]:
        """Which of "patched", "recovered" and "outside" fall short; empty if none does."""
        reached = {
            "patched": self.patched_reaches,
            "recovered": self.recovered_reaches,
            "outside": self.outside_reaches,
        }
        return [name for name, reaches in reached.items() if not reaches]


@dataclass(frozen=True)
class DemoReport:
    """Everything the demonstration measured.

    Attributes:
        rows: one per instruction.
        curves: accuracy against examples for the instructions of curves.CURVES that were asked for.
        sweep: how the paper's c1 was chosen; None without curves.
        settings: the arguments.
        seconds: time taken.
    """

    rows: list[Row]
    curves: list[Curve]
    sweep: Sweep | None
    settings: dict[str, Any]
    seconds: float = field(default=0.0)

    def to_json(self) -> list[dict[str, Any]]:
        """One dict per instruction, with its curve where there is one; NaN becomes None."""
        curves = {curve.name: asdict(curve) for curve in self.curves}
        listed = []
        for row in self.rows:
            entry = {key: _json_number(value) for key, value in asdict(row).items()}
            entry["shortfalls"] = row.shortfalls()
            if row.name in curves:
                entry["curve"] = curves[row.name]
            listed.append(entry)
        return listed


def run_demo(
    model: Any,
    tokenizer: Any,
    *,
    instructions: Sequence[str] | None = None,
    examples: int = 32,
    inputs: int = 256,
    seed: int = 0,
    match: str = "exact",
    curves: bool = True,
    steps: int = 600,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> DemoReport:
    """Transmutes every instruction with default settings and measures what the patched model does without it.

    The patches are fitted on inputs that training may have seen and measured on inputs that it has not (demo/tasks.py,
    held_out), so no measured input is an example. The second patch of each instruction sees only numbers 0-4 (half of
    the lexicon) and is measured on numbers 5-9 (the other half), whether held out from training or not.

    Args:
        model: a transformers causal language model of a known family, unpatched.
        tokenizer: its tokenizer.
        instructions: names of demo.tasks.TASKS, None for all.
        examples: inputs that a patch is fitted on.
        inputs: fresh inputs to measure on; all there are if they are fewer.
        seed: of the choice of inputs and examples.
        match: "exact" or "contains" (a verbose model), see evaluation/measures/answers.py.
        curves: also draw accuracy against examples for sum and multiply.
        steps: examples at the end of the curves.
        batch_size: inputs at a time.
        progress: called with (done, total, what comes next).

    Returns:
        A DemoReport.

    Raises:
        ValueError: an unknown instruction or a number out of range.

    Source: "Transmuting prompts into weights", §4.2, Figure 1 and Table 1, for the curves.
    """
    tasks = read_tasks(instructions)
    for name, value in (("examples", examples), ("inputs", inputs), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"run_demo: {name} must be at least 1, got {value}")
    start = time.monotonic()
    drawn = [task for task in tasks if task.name in CURVES] if curves else []
    settings = {
        "examples": examples, "inputs": inputs, "seed": seed, "match": match, "steps": steps,
        "instructions": [task.name for task in tasks],
    }  # fmt: skip
    ticker = _Ticker(progress, len(tasks) + bool(drawn) + sum(len(curve_points(steps)) + 1 for _ in drawn))
    options = {"match": match, "batch_size": batch_size, "max_new_tokens": _room(tokenizer, match)}
    known: dict[str, list[int]] = {}
    exact_model = _float64(model)
    rows = []
    for task in tasks:
        ticker(task.instruction)
        rows.append(_measure(model, tokenizer, task, exact_model, examples, inputs, seed, known, options))
    sweep, found = None, []
    if drawn:
        ticker("c1 of the paper's recipe")
        fit, fresh = _split(TASKS[VALIDATION], steps, inputs, seed)
        sweep = sweep_c1(model, tokenizer, fit, fresh, steps, known, options)
        for task in drawn:
            fit, fresh = _split(task, steps, inputs, seed)
            found.append(draw_curve(model, tokenizer, task, fit, fresh, steps, sweep.c1, known, options, ticker))
    ticker("")
    return DemoReport(rows, found, sweep, settings, time.monotonic() - start)


def _measure(
    model: Any, tokenizer: Any, task: Task, exact_model: Any, examples: int, inputs: int, seed: int,
    known: dict[str, list[int]], options: dict[str, Any],
) -> Row:  # fmt: skip
    start = time.monotonic()
    fit, fresh = _split(task, examples, inputs, seed)
    trial = Trial(model, tokenizer, task.instruction, fresh, [task.answer(x) for x in fresh], known=known, **options)
    patch = transmute(model, tokenizer, task.instruction, fit, written_inputs=WRITTEN_INPUTS)
    with patch.applied(model):
        score = trial.score(model)

    near, far = split_by_symbols(task)
    near, far = _sample(near, examples, f"{seed} {task.name} near"), _sample(far, inputs, f"{seed} far")
    outside = Trial(
        model, tokenizer, task.instruction, far, [task.answer(x) for x in far], known=known,
        divergences=False, **options,
    )  # fmt: skip
    with transmute(model, tokenizer, task.instruction, near, written_inputs=WRITTEN_INPUTS).applied(model):
        patched_outside, _ = outside.answer(model)

    header, instruction, tokens, *_ = encode(
        tokenizer, task.instruction, {"prompt": fresh[0], "completion": trial.prompted_texts[0] or None}
    )
    ids = torch.tensor([*header, *instruction, *tokens])
    exact = replay(exact_model, ids, (len(header), len(header) + len(instruction)))
    return Row(
        name=task.name, instruction=task.instruction, reserved=task.name in RESERVED_FOR_FINAL_STUDY,
        inputs=len(fresh), examples=len(fit), base=trial.base, prompted=trial.prompted, patched=score.accuracy,
        recovered=score.effect.recovered, recovered_values=score.values.recovered, outside_inputs=len(far),
        prompted_outside=outside.prompted, patched_outside=patched_outside,
        replay_error=max(exact.logit_error, float(exact.block_error.max())), replay_control=exact.control_error,
        replay_dtype=str(exact_model.dtype).removeprefix("torch."), seconds=time.monotonic() - start,
    )  # fmt: skip


def read_tasks(names: Sequence[str] | None) -> list[Task]:
    """Tasks by their names, None for all; raises as run_demo does."""
    unknown = [name for name in names or () if name not in TASKS]
    if unknown or (names is not None and not names):
        raise ValueError(f"run_demo: instructions must be among {', '.join(TASKS)}, got {list(names or ())}")
    return [TASKS[name] for name in dict.fromkeys(names or TASKS)]


def _sample(texts: Sequence[str], count: int, seed: str) -> list[str]:
    return random.Random(seed).sample(texts, min(count, len(texts)))


def _split(task: Task, examples: int, fresh: int, seed: int) -> tuple[list[str], list[str]]:
    """(inputs to fit on, inputs to measure on); the latter are the same for every task on numbers."""
    every = inputs(task)
    fit = [text for text in every if not held_out(text)]
    held = [text for text in every if held_out(text)]
    return _sample(fit, examples, f"{seed} {task.name}"), _sample(held, fresh, f"{seed} fresh")


def _room(tokenizer: Any, match: str) -> int:
    """How many tokens completions may have: a little beyond the longest right answer, or as long as a verbose one.

    The same for every task, since trials share what the bare model wrote.
    """
    if match != "exact":
        return 64
    longest = [max(map(task.answer, inputs(task)), key=len) for task in TASKS.values()]
    return max(map(len, tokenizer(longest, add_special_tokens=False).input_ids)) + 2


def _float64(model: Any) -> Any:
    small = sum(parameter.numel() for parameter in model.parameters()) <= MAX_FLOAT64_PARAMETERS
    return copy.deepcopy(model).double() if small else model


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Ticker:
    """Counts what has been done and tells the progress callback what comes next."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, what: str) -> None:
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)
        self._done += 1
