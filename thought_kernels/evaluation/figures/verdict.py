"""Can this patch be trusted? Five lines computed from the figures, with the thresholds they were judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping

from thought_kernels.evaluation.figures.report import Line
from thought_kernels.evaluation.figures.section import Figure, Section

# Shares of the prompted accuracy, and recovered effects: at least the first is a yes, at least the second partly.
KEPT = (0.95, 0.75)
RECOVERED = (0.95, 0.75)
# What a control may reach of the patch's gain in accuracy, and of its recovered effect the second.
CONTROL = (0.2, 0.5)
# KL on unrelated prompts, nats a token, and the loss of accuracy on other instructions.
UNRELATED = (0.01, 0.1)
OTHERS_LOST = (0.05, 0.25)
# Perplexity of ordinary text below which a model knows such text, so that drift there is harm.
KNOWN = 1000.0

RULES = (
    f"Works: patched accuracy at least {KEPT[0]:.0%} of prompted and recovered effect at least {RECOVERED[0]:g} "
    f"(partly: {KEPT[1]:.0%} and {RECOVERED[1]:g}).",
    f"Cause: no control gains more than {CONTROL[0]:.0%} of the accuracy that the patch gains over bare, nor more than "
    f"{CONTROL[1]:.0%} of its recovered effect (partly: {CONTROL[1]:.0%} of the accuracy).",
    "Better: no baseline recovers more (partly: the intervals overlap).",
    f"Gentle: on unrelated prompts at most {UNRELATED[0]:g} nats a token from bare, or no further than the model that "
    f"is told the instruction; at most {UNRELATED[0]:g} on ordinary text, where the bare model's perplexity there is "
    f"below {KNOWN:g}; at most {100 * OTHERS_LOST[0]:g} points of accuracy lost on average on other instructions "
    f"(partly: {UNRELATED[1]:g}, {UNRELATED[1]:g} and {100 * OTHERS_LOST[1]:g}).",
    f"Carries over: every case keeps at least {KEPT[0]:.0%} of the prompted accuracy (partly: {KEPT[1]:.0%} on "
    "average); cases that the prompted model gets right less than half of the time are left out.",
)

_RANK = {"yes": 0, "partly": 1, "no": 2, "unknown": 3}


def verdict(sections: Mapping[str, Section]) -> list[Line]:
    """The five lines; "unknown" where the figures are missing."""
    return [
        _works(sections.get("effect")),
        _cause(sections.get("controls")),
        _better(sections.get("baselines")),
        _gentle(sections.get("side_effects")),
        _carries(sections.get("generalisation")),
    ]


def summary(lines: list[Line]) -> str:
    """The headline: one sentence from the five."""
    works, cause, better, gentle, carries = (line.status for line in lines)
    if works == "unknown":
        return "Unknown: the effect was not measured."
    if works == "no":
        return "No: the patched model does not follow the instruction."
    if cause == "no":
        return "No: a control does what the patch does."
    statuses = {"works": works, "cause": cause, "better": better, "gentle": gentle, "carries over": carries}
    doubts = [name for name, status in statuses.items() if status in ("partly", "no")]
    unmeasured = [name for name, status in statuses.items() if status == "unknown"]
    tail = f" Not measured: {', '.join(unmeasured)}." if unmeasured else ""
    if not doubts:
        return "Yes, as far as was measured." + tail if unmeasured else "Yes, in every respect measured here."
    within = "Yes for inputs like its examples" if works == "yes" else "In part"
    return f"{within}; look at: {', '.join(doubts)}." + tail


def _works(section: Section | None) -> Line:
    question = "Works: does it do what the instruction does?"
    patched, prompted, bare, recovered = (
        section and section.get(subject, quantity)
        for subject, quantity in (
            ("patched", "accuracy"), ("prompted", "accuracy"), ("bare", "accuracy"), ("patched", "recovered"),
        )
    )  # fmt: skip
    if not recovered or math.isnan(recovered.value):
        return _unknown(question, section)
    statuses = [_at_least(recovered.value, RECOVERED)]
    text = f"Recovered effect {_interval(recovered)}"
    if patched and prompted and bare and not math.isnan(patched.value):
        if prompted.value > 0:
            statuses.append(_at_least(patched.value / prompted.value, KEPT))
        text = (
            f"Accuracy {_interval(patched, percent=True)} patched, {prompted.value:.1%} prompted, "
            f"{bare.value:.1%} bare; recovered effect {_interval(recovered)}"
        )
    return Line(question, max(statuses, key=_RANK.__getitem__), f"{text}, on {recovered.inputs} held-out inputs.")


def _cause(section: Section | None) -> Line:
    question = "Cause: is it the instruction's own doing?"
    ours = section and section.get("patched", "recovered")
    names = [name for name in (section.subjects("recovered") if section else []) if name != "patched"]
    if not section or not ours or not names or not ours.value > 0:
        return _unknown(question, section)
    shares = {name: _share_of_ours(section, name) for name in names}
    worst = max(names, key=lambda name: max(shares[name]))
    gained, recovered = shares[worst]
    # A control may push towards the instruction's form without doing what it says: that alone is no more than partly.
    status = max(_at_most(gained, CONTROL), "partly" if recovered > CONTROL[1] else "yes", key=_RANK.__getitem__)
    accuracy, effect = section.get(worst, "accuracy"), section.get(worst, "recovered")
    shown = f"accuracy {_interval(accuracy, percent=True)} and " if accuracy and not math.isnan(accuracy.value) else ""
    assert effect is not None
    return Line(
        question, status,
        f"The strongest of {_counted(len(names), 'control')}, {worst}, has {shown}recovered effect "
        f"{_interval(effect)}; the patch recovers {ours.value:.3f} on the same inputs.",
    )  # fmt: skip


def _share_of_ours(section: Section, name: str) -> tuple[float, float]:
    """A control's gain in accuracy over the bare model, and its recovered effect, as shares of the patch's.

    Where there are no accuracies the first is the second.
    """
    recovered = [section.get(who, "recovered") for who in (name, "patched")]
    effect = recovered[0].value / recovered[1].value if recovered[0] and recovered[1] else math.nan
    accuracies = [section.get(who, "accuracy") for who in (name, "patched", "bare")]
    control, ours, bare = (figure.value if figure else math.nan for figure in accuracies)
    gained = (control - bare) / (ours - bare) if ours > bare else math.nan
    return effect if math.isnan(gained) else gained, effect


def _better(section: Section | None) -> Line:
    question = "Better: is it better than simpler edits from the same data?"
    ours = section and section.get("patched", "recovered")
    rivals = [f for f in _all(section, "recovered") if f.subject != "patched" and not math.isnan(f.value)]
    if not section or not ours or not rivals:
        return _unknown(question, section)
    best = max(rivals, key=lambda figure: figure.value)
    status = "yes" if ours.value >= best.value else "partly" if ours.high >= best.low else "no"
    accuracies = [section.get(name, "accuracy") for name in (best.subject, "patched")]
    shown = (
        f" (accuracy {accuracies[0].value:.1%} against {accuracies[1].value:.1%})"
        if accuracies[0] and accuracies[1] and not math.isnan(accuracies[0].value)
        else ""
    )
    return Line(
        question, status,
        f"The best of {_counted(len(rivals), 'baseline')}, {best.subject}, recovers {_interval(best)}; the patch "
        f"{_interval(ours)}{shown}.",
    )  # fmt: skip


def _gentle(section: Section | None) -> Line:
    question = "Gentle: does it leave the rest alone?"
    changed = section and section.get("patched", "unrelated KL")
    if not section or not changed or math.isnan(changed.value):
        return _unknown(question, section)
    told = section.get("prompted", "unrelated KL")
    # What being told the instruction does to these prompts is no side effect of the patch.
    allowed = max(UNRELATED[0], told.value) if told and not math.isnan(told.value) else UNRELATED[0]
    statuses = [_at_most(changed.value, (allowed, max(UNRELATED[1], allowed)))]
    text = f"KL on unrelated prompts {_interval(changed)} nats a token"
    if told and not math.isnan(told.value):
        text += f", {_interval(told)} where the model is told the instruction"
    text_drift = section.get("patched", "text KL")
    known = section.get("bare", "text perplexity")
    if text_drift and known and known.value < KNOWN:
        statuses.append(_at_most(text_drift.value, UNRELATED))
        text += f"; on ordinary text {_interval(text_drift)}"
    lost = [
        off.value - on.value
        for off, on in zip(
            _all(section, "accuracy, patch off"), _all(section, "accuracy, patch on"), strict=False
        )
    ]  # fmt: skip
    if lost and not math.isnan(sum(lost)):
        mean = sum(lost) / len(lost)
        statuses.append(_at_most(mean, OTHERS_LOST))
        text += (
            f"; told one of {_counted(len(lost), 'other instruction')}, the patched model loses "
            f"{100 * mean:.1f} points of accuracy on average, {100 * max(lost):.1f} at worst"
        )
    return Line(question, max(statuses, key=_RANK.__getitem__), text + ".")


def _carries(section: Section | None) -> Line:
    question = "Carries over: does it hold beyond its examples?"
    cases = [name for name in (section.subjects("prompted") if section else []) if name != "like the examples"]
    shares: dict[str, float] = {}
    for name in cases:
        assert section is not None
        prompted, patched = section.get(name, "prompted"), section.get(name, "accuracy")
        # Where the instruction itself fails, nothing can be said about the patch.
        if prompted and patched and prompted.value >= 0.5 and not math.isnan(patched.value):
            shares[name] = patched.value / prompted.value
    if not shares:
        return _unknown(question, section)
    worst = min(shares, key=shares.__getitem__)
    mean = sum(shares.values()) / len(shares)
    status = "yes" if shares[worst] >= KEPT[0] else "partly" if mean >= KEPT[1] else "no"
    missing = len(cases) - len(shares)
    left_out = f"; {_counted(missing, 'case')} left out, where the prompted model fails too" if missing else ""
    return Line(
        question, status,
        f"In {_counted(len(shares), 'case')} it keeps {mean:.0%} of the prompted accuracy on average and "
        f"{shares[worst]:.0%} at worst, {worst}{left_out}.",
    )  # fmt: skip


def _all(section: Section | None, quantity: str) -> list[Figure]:
    return [f for f in section.figures if f.quantity == quantity and f.x is None] if section else []


def _unknown(question: str, section: Section | None) -> Line:
    why = "its section was not asked for" if section is None else section.error or "its figures are not defined here"
    return Line(question, "unknown", f"Not measured: {why}.".replace("..", "."))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _at_least(value: float, thresholds: tuple[float, float]) -> str:
    return "yes" if value >= thresholds[0] else "partly" if value >= thresholds[1] else "no"


def _at_most(value: float, thresholds: tuple[float, float]) -> str:
    return "yes" if value <= thresholds[0] else "partly" if value <= thresholds[1] else "no"


def _interval(figure: Figure, *, percent: bool = False) -> str:
    """ "0.996 (0.993 to 0.998)"."""

    def shown(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"

    if math.isnan(figure.low):
        return shown(figure.value)
    return f"{shown(figure.value)} ({shown(figure.low)} to {shown(figure.high)})"
