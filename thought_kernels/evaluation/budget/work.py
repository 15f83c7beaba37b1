"""What each section has the model do, counted before it is done.

A count is an upper bound where a section may do less: a patched model writes an answer of its own only where it would
not write the prompted one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from thought_kernels.evaluation.budget.rivals import rival_works
from thought_kernels.evaluation.budget.units import Work, rows_of
from thought_kernels.evaluation.rivals.choice import CHOICE_ROWS
from thought_kernels.evaluation.sections.bystanders import OTHER_INPUTS
from thought_kernels.evaluation.sections.controls import DRAWS
from thought_kernels.evaluation.sections.effect import REPLAYED
from thought_kernels.evaluation.sections.generalisation import CHAT_INPUTS
from thought_kernels.evaluation.sections.subject import Subject


def works(subject: Subject, names: Iterable[str]) -> dict[str, Work]:
    """The work of each section, what several share being the first one's.

    Args:
        subject: what is evaluated.
        names: sections, in the order they are run.
    """
    found, shared = {}, _Shared(subject)
    for name in names:
        found[name] = _WORKS[name](subject, shared)
    return found


class _Shared:
    """What is done once, for the first section that needs it."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._done: set[str] = set()

    def once(self, what: str, work: Work) -> Work:
        """The work, or none where it was done before."""
        first = what not in self._done
        self._done.add(what)
        return work if first else Work()

    def patch(self) -> Work:
        subject = self._subject
        return Work() if subject.given_patch is not None else self.once("patch", Work(fits=(len(subject.examples),)))

    def trial(self) -> Work:
        """The held-out inputs, prompted and bare, and the patch."""
        return self.patch() + self.once("trial", _trial(len(self._subject.held_out.questions)))

    def bystander(self) -> Work:
        count = len(self._subject.unrelated)
        return self.once("bystander", Work(reads=count, writes=count))

    def text(self) -> Work:
        return self.once("text", Work(texts=1))

    def encoded(self) -> Work:
        """The completions that a given patch was fitted on, written again."""
        subject = self._subject
        written = subject.given_patch is not None and subject.examples[0].completion is None
        count = rows_of(subject) if written else 0
        return self.once("encoded", Work(writes=count))

    def other(self, name: str) -> Work:
        return self.once(f"patch of {name}", Work(fits=(len(self._subject.examples),)))

    def told(self, name: str) -> Work:
        """Answers to another instruction, told, with the patch and without."""
        other, subject = self._subject.others[name], self._subject
        inputs = other.inputs or subject.held_out
        count = min(OTHER_INPUTS, subject.sweep_inputs, len(inputs.questions))
        return self.once(f"told {name}", Work(writes=3 * count))


def _trial(count: int) -> Work:
    return Work(reads=2 * count, writes=2 * count)


def _score(count: int) -> Work:
    return Work(reads=count, writes=count)


def _swept(subject: Subject) -> int:
    return min(subject.sweep_inputs, len(subject.held_out.questions))


def _patch(subject: Subject, shared: _Shared) -> Work:
    return shared.patch()


def _effect(subject: Subject, shared: _Shared) -> Work:
    return shared.trial() + _score(len(subject.held_out.questions))


def _controls(subject: Subject, shared: _Shared) -> Work:
    work = shared.trial() + Work(drawn=DRAWS) + _score(_swept(subject)) * (1 + DRAWS)
    if len(subject.examples) >= 2:
        work += shared.encoded() + Work(refits=1) + _score(_swept(subject))
        for name in list(subject.others)[: subject.amounts.others]:
            work += shared.other(name) + _score(_swept(subject))
    return work


def _parts(subject: Subject, shared: _Shared) -> Work:
    sites = len(subject.recipe.for_model(subject.decoder).sites)
    work = shared.trial() + _score(_swept(subject)) * (1 + sites)
    if len(subject.examples) >= 2:
        work += shared.encoded() + Work(refits=1) + _score(_swept(subject))
    return work


def _baselines(subject: Subject, shared: _Shared) -> Work:
    count, rows, kept = len(subject.examples), rows_of(subject), subject.amounts.baselines
    if count < 2:
        return Work()
    made = [work for name, work in rival_works(subject).items() if kept is None or name in kept]
    each = _score(_swept(subject)) + Work(reads=len(subject.unrelated), texts=1)
    work = shared.trial() + shared.bystander() + shared.text() + shared.encoded()
    again = () if subject.given_patch is None else (count,)  # one that was given is made once more, to be timed
    return sum(made, work + Work(fits=again, reads=min(CHOICE_ROWS, rows)) + each * (1 + len(made)))


def _side_effects(subject: Subject, shared: _Shared) -> Work:
    work = shared.patch() + shared.bystander() + shared.text() + Work(reads=2 * len(subject.unrelated), texts=1)
    for name in subject.others:
        work += shared.told(name)
    return work


def _combination(subject: Subject, shared: _Shared) -> Work:
    count = _swept(subject)
    work = shared.trial() + _score(count) + Work(reads=4 * count, writes=2 * count)  # the patch, and negated
    if len(subject.examples) < 2:
        return work
    for name in list(subject.others)[: subject.amounts.others]:
        inputs = subject.others[name].inputs or subject.held_out
        own = min(subject.sweep_inputs, len(inputs.questions))
        added = _score(count) * 2 + _score(own) + Work(reads=6 * count + 3 * own)  # on this, on both told, on the other
        work += shared.other(name) + _trial(own) + _score(own) + _trial(count) + added
    return work


def _diagnosis(subject: Subject, shared: _Shared) -> Work:
    work = shared.patch() + Work(diagnosed=1)
    if len(subject.examples) >= 2:
        for name in list(subject.others)[: subject.amounts.diagnosed]:
            work += shared.other(name) + shared.told(name) + Work(diagnosed=1)
    return work


def _scale(subject: Subject, shared: _Shared) -> Work:
    each = _score(_swept(subject)) + Work(reads=len(subject.unrelated), texts=1)
    return shared.trial() + shared.bystander() + shared.text() + each * len(subject.amounts.scales)


def _data(subject: Subject, shared: _Shared) -> Work:
    work = shared.trial()
    for count in subject.amounts.counts:
        if count <= len(subject.pool):
            made = count == len(subject.examples) and subject.given_patch is None
            work += _score(_swept(subject)) + Work(fits=() if made else (count,))
    return work


def _generalisation(subject: Subject, shared: _Shared) -> Work:
    count, amounts = _swept(subject), subject.amounts
    work = shared.trial() + _score(count)
    if subject.outside is not None:
        own, made = len(subject.outside.inputs.questions), subject.outside.examples
        work += _trial(own) + _score(own) + Work(fits=() if made is None else (len(made),))
    for index in range(min(amounts.paraphrases, len(subject.paraphrases))):
        work += _trial(count) + _score(count)
        if index < amounts.paraphrase_patches and len(subject.examples) >= 2:
            work += _score(count) + Work(fits=(len(subject.examples),))
    if subject.longer is not None:
        own = min(subject.sweep_inputs, len(subject.longer.questions))
        work += _trial(own) + _score(own)
    chats = min(CHAT_INPUTS, count)
    return work + _trial(chats) + _score(chats)


def _replay(subject: Subject, shared: _Shared) -> Work:
    return shared.trial() + Work(replayed=min(REPLAYED, len(subject.held_out.questions)))


_WORKS: dict[str, Callable[[Subject, _Shared], Work]] = {
    "patch": _patch, "effect": _effect, "controls": _controls, "parts": _parts, "baselines": _baselines,
    "side_effects": _side_effects, "combination": _combination, "diagnosis": _diagnosis, "scale": _scale,
    "data": _data, "generalisation": _generalisation, "replay": _replay,
}  # fmt: skip
