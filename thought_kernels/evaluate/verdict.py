"""Can this patch be trusted? Five lines computed from the figures, with the thresholds they were judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping

from thought_kernels.evaluate.report import Figure, Line, Section

# Shares of the prompted accuracy, and recovered effects: at least the first is a yes, at least the second partly.
KEPT = (0.95, 0.75)
RECOVERED = (0.95, 0.75)
# A control may recover this share of the patch's effect, and reach this share of its accuracy.
CONTROL = (0.2, 0.5)
# KL on unrelated prompts, nats a token, and the loss of accuracy on other instructions.
UNRELATED = (0.01, 0.1)
OTHERS_LOST = (0.05, 0.25)

RULES = (
    f"Works: patched accuracy at least {KEPT[0]:.0%} of prompted and recovered effect at least {RECOVERED[0]:g} "
    f"(partly: {KEPT[1]:.0%} and {RECOVERED[1]:g}). Cause: no control recovers more than {CONTROL[0]:.0%} of the "
    f"patch's effect (partly: {CONTROL[1]:.0%}); parts of the patch itself are not counted. Better: no baseline "
    f"recovers more (partly: intervals overlap). Gentle: at most {UNRELATED[0]:g} nats a token on unrelated prompts "
    f"and at most {100 * OTHERS_LOST[0]:g} points of accuracy lost on average on other instructions (partly: "
    f"{UNRELATED[1]:g} and {100 * OTHERS_LOST[1]:g}). Carries over: every case keeps at least {KEPT[0]:.0%} of the "
    f"prompted accuracy (partly: {KEPT[1]:.0%} on average)."
)

_RANK = {"yes": 0, "partly": 1, "no": 2, "unknown": 3}
_PARTS = ("only", "bare", "prompted", "patched")


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
    rivals = [f for f in _all(section, "recovered") if not any(part in f.subject for part in _PARTS)]
    if not ours or not rivals or not ours.value > 0:
        return _unknown(question, section)
    worst = max(rivals, key=lambda figure: figure.value)
    status = _at_most(worst.value / ours.value, CONTROL)
    return Line(
        question, status,
        f"The strongest of {len(rivals)} controls, {worst.subject}, recovers {_interval(worst)}; the patch "
        f"{ours.value:.3f} on the same inputs.",
    )  # fmt: skip


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
        f"The best of {len(rivals)} baselines, {best.subject}, recovers {_interval(best)}; the patch "
        f"{_interval(ours)}{shown}.",
    )  # fmt: skip


def _gentle(section: Section | None) -> Line:
    question = "Gentle: does it leave the rest alone?"
    changed = section and section.get("patched", "unrelated KL")
    if not section or not changed or math.isnan(changed.value):
        return _unknown(question, section)
    statuses = [_at_most(changed.value, UNRELATED)]
    text = f"KL on unrelated prompts {_interval(changed)} nats a token"
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
            f"; told one of {len(lost)} other instructions, the patched model loses {100 * mean:.1f} points of "
            f"accuracy on average, {100 * max(lost):.1f} at worst"
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
    left_out = f"; {len(cases) - len(shares)} cases where the prompted model fails too are not counted" * (
        len(shares) < len(cases)
    )
    return Line(
        question, status,
        f"In {len(shares)} cases it keeps {mean:.0%} of the prompted accuracy on average and {shares[worst]:.0%} at "
        f"worst, {worst}{left_out}.",
    )  # fmt: skip


def _all(section: Section | None, quantity: str) -> list[Figure]:
    return [f for f in section.figures if f.quantity == quantity and f.x is None] if section else []


def _unknown(question: str, section: Section | None) -> Line:
    why = "its section was not asked for" if section is None else section.error or "its figures are not defined here"
    return Line(question, "unknown", f"Not measured: {why}.".replace("..", "."))


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
