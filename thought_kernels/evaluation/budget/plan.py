"""How much of everything fits into given minutes, and what it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thought_kernels.evaluation.budget.rates import Rates
from thought_kernels.evaluation.budget.rivals import rival_works
from thought_kernels.evaluation.budget.work import rows_of, works
from thought_kernels.evaluation.measures.drift import MEMORY_BUDGET as TEXT_MEMORY
from thought_kernels.evaluation.measures.memory import MemoryPeak
from thought_kernels.evaluation.measures.trial import MEMORY_BUDGET
from thought_kernels.evaluation.sections.amounts import Amounts
from thought_kernels.evaluation.sections.subject import Inputs, Subject

STEPS = 14  # that amounts are made smaller by
_STEP = 0.75
LARGEST_BASELINE = 1 / 6  # of the minutes; one that takes more, its settings' choice included, is not made


@dataclass(frozen=True)
class Plan:
    """What a report is expected to take.

    Attributes:
        share: how much is measured of what was asked for, 1 for all; see reduced.
        left_out: baselines that are not made.
        seconds: of each section; those that the plan itself took are not in it.
        memory_mib: largest resident memory of the process, MiB.
        inputs, swept: held-out inputs, and those of them that sweeps, controls and baselines use.
        fits: whether it all fits into the minutes that were given.
    """

    share: float
    left_out: tuple[str, ...]
    seconds: Mapping[str, float]
    memory_mib: float
    inputs: int
    swept: int
    fits: bool

    @property
    def total(self) -> float:
        """Seconds of the whole report."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "seconds": dict(self.seconds), "left_out": list(self.left_out)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """What to_dict made."""
        return cls(**{**content, "left_out": tuple(content["left_out"])})

    def reduce(self, subject: Subject) -> Subject:
        """What is measured of a subject."""
        return reduced(subject, self.share, self.left_out)


def plan(subject: Subject, names: Sequence[str], minutes: float | None) -> Plan:
    """Measures a few forwards at the run's own shapes, and takes the largest amounts that fit.

    Args:
        subject: as it was asked for.
        names: sections.
        minutes: to fit into, None for however long it takes.

    Returns:
        The Plan; its `reduce` makes the subject that it is of.
    """
    started = time.monotonic()
    rates = Rates(subject)
    with MemoryPeak(subject.decoder.device) as peak:
        found = _seconds(subject, names, rates)  # measures, too
    left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
    share, less = 1.0, subject
    left_out: tuple[str, ...] = ()
    for step in range(STEPS + 1):
        if left is None or sum(found.values()) <= left:
            break
        share = _STEP**step
        less = reduced(subject, share)
        left_out = _slow(rates, less, LARGEST_BASELINE * left)
        less = reduced(subject, share, left_out)
        found = _seconds(less, names, rates)
    fits = left is None or sum(found.values()) <= left
    swept = min(less.sweep_inputs, len(less.held_out.questions))
    memory = peak.host_mib + _kept_mib(less, names, rates)
    return Plan(share, left_out, found, memory, len(less.held_out.questions), swept, fits)


def _slow(rates: Rates, subject: Subject, most: float) -> tuple[str, ...]:
    """Baselines that take more than so many seconds; never the quickest, so that there is one to compare with."""
    seconds = {name: rates.seconds(work) for name, work in rival_works(subject).items()}
    return tuple(name for name, taken in seconds.items() if taken > max(most, min(seconds.values())))


def reduced(subject: Subject, share: float, left_out: Sequence[str] = ()) -> Subject:
    """The subject with fewer inputs, shorter sweeps and fewer fits; nothing is ever made of other examples.

    Held-out inputs fall with the share's root: they are measured once, and what is swept many times.

    Args:
        subject: as it was asked for.
        share: 1 for all, smaller for less.
        left_out: baselines that are not made.
    """
    amounts = _amounts(subject, share)
    if left_out:
        amounts = replace(amounts, baselines=tuple(name for name in rival_works(subject) if name not in left_out))
    if share == 1:
        return replace(subject, amounts=amounts)
    held_out = subject.held_out.first(_part(len(subject.held_out.questions), share**0.5, 8))
    swept = min(subject.sweep_inputs, len(subject.held_out.questions))
    unrelated = subject.unrelated[: _part(len(subject.unrelated), share**0.5, 4)]
    outside = subject.outside
    return replace(
        subject, held_out=held_out, sweep_inputs=_part(swept, share, 4), unrelated=unrelated,
        lora_steps=_part(subject.lora_steps, share, 10), amounts=amounts,
        outside=outside and replace(outside, inputs=_fewer(outside.inputs, share)),
        longer=subject.longer and _fewer(subject.longer, share),
    )  # fmt: skip


def _fewer(inputs: Inputs, share: float) -> Inputs:
    return inputs.first(_part(len(inputs.questions), share, 4))


def _part(count: int, share: float, least: int) -> int:
    return min(count, max(least, round(share * count)))


def _amounts(subject: Subject, share: float) -> Amounts:
    """Sweeps and fits, in three steps: a fit costs as much as hundreds of answers."""
    whole, made = subject.amounts, len(subject.examples)
    counts = [count for count in whole.counts if count <= len(subject.pool)]
    if share > 0.5:
        return whole
    if share > 0.2:
        most = [count for count in counts if count <= 4 * made]
        few = sorted({*most[:1], *most[len(most) // 2 :: 2], *(c for c in most if c == made)})
        return Amounts((0.25, 0.5, 0.75, 1.0, 1.25, 1.5), tuple(few), 2, 2, 2, 1)
    return Amounts((0.5, 0.75, 1.0, 1.25), tuple(c for c in counts if c <= made)[-2:], 1, 1, 1, 0)


def _seconds(subject: Subject, names: Sequence[str], rates: Rates) -> dict[str, float]:
    return {name: rates.seconds(work) for name, work in works(subject, names).items()}


def _kept_mib(subject: Subject, names: Sequence[str], rates: Rates) -> float:
    """Log-probabilities of the prompted model that are kept: of the held-out inputs, of the examples, of the text."""
    token = 4 * len(subject.model.get_input_embeddings().weight) * rates.answer_tokens
    kept = min(MEMORY_BUDGET, token * len(subject.held_out.questions))
    if "baselines" in names:
        kept += min(MEMORY_BUDGET, token * rows_of(subject))
    return (kept + TEXT_MEMORY) / 2**20
