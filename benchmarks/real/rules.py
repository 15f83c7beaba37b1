"""Rules of a system prompt as checkers of answers, and what share of them survives in a patch.

system_rules/ has a file for each prompt and in it a table for each rule. Patterns are Python's regular expressions;
case is ignored, a dot matches line ends too, and of a list one must be found.

    answer    must be found in an answer that keeps the rule: the fact itself, not a word of the question
    never     must not be found in it: the opposite of the fact
    asked     is found in the inputs that the rule applies to; without it the rule applies to all
    everyday  is found in the everyday requests that it applies to, where the prompt says what other things get
    aside     is taken out of the answer first
    whole     the end of the answer decides, so that nothing is said of one that was cut
    right     answers that keep the rule, and wrong: answers that do not, which the tests hold it to
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.measures.intervals import mean_interval, per_token_interval

RULES = Path(__file__).parent / "system_rules"
FLAGS = re.IGNORECASE | re.DOTALL
MODELS = ("bare", "prompted", "patched")
# Groups of rules; their names stand in the place of a rule's.
ALWAYS, SOME, ALL = "(rules for all inputs)", "(rules for some inputs)", "(all rules)"
# Full stops that end no sentence: 9 a.m. is followed by a capital where it does.
ABBREVIATION = re.compile(r"\b(?:[ap]\.m\.(?!\s+[A-Z]|\W*$)|(?:Mrs?|Ms|Dr|e\.g|i\.e)\.)")


@dataclass(frozen=True)
class Rule:
    """One rule of a prompt.

    Attributes:
        name: what it asks for.
        answer: what must be found in an answer that keeps it.
        never: what must not be found there.
        asked: what must be found in an input that it applies to; None for all.
        everyday: the same of everyday requests; None for none of them, unless it applies to all.
        aside: what is taken out of an answer first.
        whole: whether the end of an answer decides.
    """

    name: str
    answer: re.Pattern[str]
    never: re.Pattern[str] | None = None
    asked: re.Pattern[str] | None = None
    everyday: re.Pattern[str] | None = None
    aside: re.Pattern[str] | None = None
    whole: bool = False

    def applies(self, question: str, *, everyday: bool = False) -> bool:
        """Whether it says something about the answer to an input, or to an everyday request."""
        if self.asked is None:
            return True
        pattern = self.everyday if everyday else self.asked
        return pattern is not None and pattern.search(question) is not None

    def kept(self, answer: str, *, cut: bool = False) -> bool | None:
        """Whether an answer keeps it; None where the answer was cut and its end decides."""
        if cut and self.whole:
            return None
        text = ABBREVIATION.sub(lambda found: found[0].replace(".", ""), answer.strip())
        if not text or (self.never is not None and self.never.search(text)):
            return False
        return self.answer.search(text if self.aside is None else self.aside.sub("", text)) is not None


def rules(prompt: str) -> list[Rule]:
    """The rules of a system prompt; none where nobody has written any."""
    return [_rule(name, entry) for name, entry in entries(prompt).items()]


def entries(prompt: str) -> dict[str, dict[str, Any]]:
    """What is written of each rule of a prompt."""
    path = RULES / f"{prompt}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def survival(found: Sequence[Rule], answers: Sequence[dict[str, str]], *, everyday: bool = False) -> Iterator[dict]:
    """How each rule fares, and how rules do together: those for all inputs, those for some, all of them.

    Args:
        found: the rules.
        answers: of each input the keys question; bare, prompted and patched: texts; and the same with _cut: "True"
            for an answer that was cut.
        everyday: whether the inputs are everyday requests.

    Yields:
        rule, or the name of a group; rules, how many are asked of any input, and not_asked, how many are not; asked,
        to how many inputs they apply, an input counting once a rule; bare_cut, prompted_cut and patched_cut, how many
        of these answers were cut where the end decides, and are left out; bare, prompted and patched, the shares of
        the others that keep the rule; kept, on how many inputs both the prompted and the patched answer say something
        and the prompted one keeps it; survival, on what share of those the patched one does too, with its bootstrap
        interval over inputs, low to high; gained and gained_survival, gained_low, gained_high: the same where the bare
        answer breaks it. Shares of nothing are empty.
    """
    for rule in found:
        yield _fares(rule.name, [rule], answers, everyday)
    for name, group in (
        (ALWAYS, [rule for rule in found if rule.asked is None]),
        (SOME, [rule for rule in found if rule.asked is not None]),
        (ALL, list(found)),
    ):
        if group:
            yield _fares(name, group, answers, everyday)


def _rule(name: str, entry: dict[str, Any]) -> Rule:
    patterns = {key: entry.get(key) for key in ("answer", "never", "asked", "everyday", "aside")}
    made = {
        key: re.compile("|".join([value] if isinstance(value, str) else value), FLAGS)
        for key, value in patterns.items()
        if value is not None
    }
    return Rule(name, whole=entry.get("whole", False), **made)


def _fares(name: str, group: Sequence[Rule], answers: Sequence[dict[str, str]], everyday: bool) -> dict[str, Any]:
    """The row of a rule or of several."""
    verdicts = [
        [
            {of: rule.kept(row[of], cut=row.get(f"{of}_cut") == "True") for of in MODELS}
            for rule in group
            if rule.applies(row["question"], everyday=everyday)
        ]
        for row in answers
    ]
    flat = [verdict for of_input in verdicts for verdict in of_input]
    rules_asked = sum(any(rule.applies(row["question"], everyday=everyday) for row in answers) for rule in group)
    row = {"rule": name, "rules": rules_asked, "not_asked": len(group) - rules_asked, "asked": len(flat)}
    for of in MODELS:
        said = [verdict[of] for verdict in flat if verdict[of] is not None]
        row |= {f"{of}_cut": len(flat) - len(said), of: round(sum(said) / len(said), 4) if said else ""}
    kept, survived = _survived([[one for one in of if one["prompted"]] for of in verdicts])
    gained, won = _survived([[one for one in of if one["prompted"] and one["bare"] is False] for of in verdicts])
    names = ("survival", "low", "high", "gained_survival", "gained_low", "gained_high")
    return {**row, "kept": kept, "gained": gained, **dict(zip(names, [*survived, *won], strict=True))}


def _survived(verdicts: Sequence[Sequence[dict[str, bool | None]]]) -> tuple[int, list[Any]]:
    """Of how many verdicts, listed by input, the patched answer says something; the share kept, with its interval."""
    said = [[bool(one["patched"]) for one in of if one["patched"] is not None] for of in verdicts]
    said = [of for of in said if of]
    if not said:
        return 0, ["", "", ""]
    shares = [sum(of) / len(of) for of in said]
    # Where all agree a bootstrap would claim certainty, and mean_interval does not.
    agree = set(shares) in ({0.0}, {1.0})
    counts = list(map(len, said))
    interval = mean_interval(shares, seed=0) if agree else per_token_interval(list(map(sum, said)), counts, seed=0)
    return sum(counts), [round(figure, 4) for figure in interval]
