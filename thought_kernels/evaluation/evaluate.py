"""`evaluate`: a patch, or an instruction to transmute, measured from every side, as one report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.arguments import Data, Limits, read_subject
from thought_kernels.evaluation.budget.plan import Plan, plan
from thought_kernels.evaluation.figures.headings import HEADINGS, chosen_sections
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.figures.verdict import verdict
from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.pages.page import check_page
from thought_kernels.evaluation.report import Evaluation, output_folder
from thought_kernels.evaluation.resume import Progress, fingerprint, load_plan, save_plan
from thought_kernels.evaluation.sections.sections import SECTIONS
from thought_kernels.evaluation.sections.subject import NotGivenError, Subject
from thought_kernels.evaluation.settings import settings_of, warnings_of, warnings_of_plan
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.prompt import Instruction


def evaluate(
    model: Any,
    tokenizer: Any,
    patch_or_instruction: ThoughtPatch | Instruction,
    examples: Any = None,
    *,
    held_out: Any,
    answers: Sequence[str] | None = None,
    instruction: Instruction | None = None,
    scorer: Any = "exact",
    outside: Any = None,
    longer: Any = None,
    paraphrases: Sequence[str] = (),
    others: Mapping[str, Any] | Sequence[str] = (),
    unrelated: Any = None,
    pool: Any = None,
    sections: str | Iterable[str] = "all",
    output: str | os.PathLike[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    inputs: int = 256,
    sweep_inputs: int = 96,
    lora_steps: int = 100,
    separator: str | None = None,
    without: Any = None,
    format: str | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 64,
    seed: int = 0,
    minutes: float | None = None,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Measures whether a thought patch can be trusted: effect, controls, baselines, side effects, what carries over.

        recovered effect = 1 − Σ KL(prompted ‖ patched) / Σ KL(prompted ‖ bare)

    over the tokens of the prompted model's own greedy answers to held-out inputs; 1 is the prompted model, 0 the bare
    one. Accuracies are mean grades. Intervals are 95 % bootstrap intervals over inputs.

    A section that fails is reported as a sentence, and the others go on. With `output`, each section's result is kept
    on disk as it is finished, and a second call with the same arguments takes up where the first stopped.

    Args:
        model: a transformers causal language model of a described family, unpatched. It is as it was afterwards.
        tokenizer: its fast tokenizer, with a chat template.
        patch_or_instruction: a ThoughtPatch, or the instruction that is to become one on `examples`.
        examples: what the patch was, or will be, fitted on, as transmute takes them; the baselines get the same. May be
            None with a patch: what needs them is then left out, which the report says.
        held_out: inputs to measure on, as transmute takes examples; a completion is the input's right answer. None of
            them should be among the examples.
        answers: the right answers, where held_out has none. Without either, an answer is right where it agrees with the
            prompted model's.
        instruction: what a patch stands for; its own provenance says so if not given.
        scorer: "exact", "contains", "regex:PATTERN", "module:function", a function (text, answer, question) -> bool or
            number, or a Judge(model, tokenizer); see scorers.as_scorer.
        outside: inputs unlike the examples (other symbols or words), or {"examples": ..., "held_out": ...} for a second
            patch of the same instruction that is fitted on other examples and measured on those inputs.
        longer: longer inputs than the examples.
        paraphrases: other wordings of the instruction.
        others: other instructions, {name: instruction} or {name: {"instruction": ..., "held_out": ...}}, or a list of
            instructions. Where they have no inputs they are asked the held-out ones, judged by agreement.
        unrelated: prompts that the patch should leave alone; a few ordinary questions if not given.
        pool: more examples for the data-efficiency curve, which goes to 512; `examples` are put first.
        sections: "all", or names of figures.headings.HEADINGS.
        output: folder for the report, its sections as they finish, and the patch.
        recipe: of every fit, a Recipe or a dict of its options; a given patch's own if not given.
        inputs: held-out inputs used at most.
        sweep_inputs: of these, how many the controls, baselines and sweeps use.
        lora_steps: optimiser steps of the LoRA baseline.
        separator: between instruction and input, "\\n" if not given and the patch does not say.
        without, format: of the prompts, as transmute's; the patch's own if not given.
        batch_size: inputs at a time.
        max_new_tokens: longest answer.
        seed: of resampling and of everything random.
        minutes: that the whole may take, on this machine as it is now. Fewer held-out inputs are then used, and sweeps
            and baselines are made shorter, until what a few measured forwards foretell fits; the patch is made from all
            examples all the same. A second call with the same `output` takes the amounts that the first had chosen.
        announce: called with the Plan before anything else is measured: the expected seconds of each section, and
            memory.
        progress: called with (sections done, sections in all, the next one's title).

    Returns:
        An Evaluation; with `output`, its JSON, CSV and page are in that folder too.

    Raises:
        ValueError: data that cannot be used (empty, a single input, longer than the context, prompts that do not
            align), an unknown section, scorer or recipe option, an output that is no folder, or one without the
                packages that a page is made with.
        TypeError: arguments of another type.

    Source: the recovered effect and the list of controls are ours; the setting is "Transmuting prompts into weights",
        §4.
    """
    started, names = time.monotonic(), chosen_sections(sections)
    if output is not None:
        check_page()
    data = Data(
        examples=examples, held_out=held_out, answers=answers, outside=outside, longer=longer, paraphrases=paraphrases,
        others=others, unrelated=unrelated, pool=pool,
    )  # fmt: skip
    limits = Limits(
        inputs=inputs, sweep_inputs=sweep_inputs, lora_steps=lora_steps, batch_size=batch_size,
        max_new_tokens=max_new_tokens, seed=seed, minutes=minutes,
    )  # fmt: skip
    subject = read_subject(
        model, tokenizer, patch_or_instruction, instruction, data, limits, scorer=scorer, recipe=recipe,
        separator=separator, without=without, format=format,
    )  # fmt: skip
    folder: Path | None = None if output is None else output_folder(output)
    key = fingerprint(subject, settings_of(subject)) if folder is not None else ""
    planned = None
    if minutes is not None or announce is not None:
        planned = load_plan(folder, key, names, minutes) or plan(subject, names, minutes)
        save_plan(folder, key, names, minutes, planned)
        subject = planned.reduce(subject)
    if announce is not None and planned is not None:
        announce(planned)
    settings = settings_of(subject)
    if planned is not None and (planned.share < 1 or planned.left_out):
        key = f"{key} {planned.share} {planned.left_out}"
    kept = Progress(folder, key)
    done: dict[str, Section] = {}
    for index, name in enumerate(names):
        if progress is not None:
            progress(index, len(names), HEADINGS[name].title)
        found = kept.load(name, subject)
        done[name] = found if found is not None else run_section(subject, name)
        done[name].expected_seconds = None if planned is None else planned.seconds[name]
        if found is None:
            kept.save(done[name], subject)
    if progress is not None:
        progress(len(names), len(names), "")
    evaluation = Evaluation(
        settings={**settings, "sections": names}, sections=done, verdict=verdict(done), warnings=warnings_of(subject),
        seconds=math.fsum(section.seconds for section in done.values()),
    )  # fmt: skip
    evaluation.settings["wall_clock_of_this_run"] = time.monotonic() - started
    if planned is not None:
        evaluation.settings |= {"minutes": minutes, "expected_seconds": planned.total}
        evaluation.settings["expected_memory_mib"] = planned.memory_mib
        evaluation.warnings += warnings_of_plan(planned, minutes)
    if folder is not None:
        evaluation.save(folder)
    return evaluation


def run_section(subject: Subject, name: str) -> Section:
    """One section, timed; what it raises becomes its error and status."""
    section = Section(name, HEADINGS[name].title)
    before = len(subject.scorer.failures)
    started = time.monotonic()
    with MemoryPeak(subject.decoder.device) as peak:
        try:
            SECTIONS[name](subject, section)
        except Exception as error:  # a section must not take the others with it, whatever went wrong
            text = str(error).strip()
            section.status = "left out" if isinstance(error, NotGivenError) else "failed"
            section.error = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
    section.seconds = time.monotonic() - started
    section.peak_memory_mib, section.device_memory_mib = peak.host_mib, peak.device_mib
    failures = subject.scorer.failures[before:]
    if failures:
        section.note(f"No accuracy where the scorer failed, {len(failures)} times: {failures[0]}")
    return section
