"""Rules of a system prompt as checkers of answers, and what share of them survives in a patch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.measures.intervals import mean_interval

RULES = Path(__file__).parent / "system_rules.toml"
FLAGS = re.IGNORECASE | re.DOTALL
MODELS = ("bare", "prompted", "patched")


@dataclass(frozen=True)
class Rule:
    """One rule of a prompt.

    Attributes:
        name: what it asks for.
        answer: what must be found in an answer that keeps it.
        asked: what must be found in an input that it applies to; None for all.
    """

    name: str
    answer: re.Pattern[str]
    asked: re.Pattern[str] | None = None

    def applies(self, question: str) -> bool:
        return self.asked is None or self.asked.search(question) is not None

    def kept(self, answer: str) -> bool:
        return self.answer.search(answer.strip()) is not None


def rules(prompt: str) -> list[Rule]:
    """The rules of a system prompt; none where nobody has written any."""
    table = tomllib.loads(RULES.read_text(encoding="utf-8")).get(prompt, {})
    return [
        Rule(name, re.compile(rule["answer"], FLAGS), re.compile(rule["asked"], FLAGS) if "asked" in rule else None)
        for name, rule in table.items()
    ]


def survival(found: Sequence[Rule], answers: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """How each rule that applies to any of the inputs fares.

    Args:
        found: the rules.
        answers: of each input the keys question, bare, prompted and patched: texts.

    Yields:
        rule; asked, how many inputs it applies to; bare, prompted and patched, the shares of their answers that keep
        it; kept, on how many inputs the prompted one does; survival, on what share of those the patched one does too,
        with its bootstrap interval low to high; gained, on how many of them the bare one does not; gained_survival, on
        what share of these the patched one does. Shares of nothing are empty.
    """
    for rule in found:
        asked = [row for row in answers if rule.applies(row["question"])]
        if not asked:
            continue
        shares = {name: sum(rule.kept(row[name]) for row in asked) / len(asked) for name in MODELS}
        kept = [row for row in asked if rule.kept(row["prompted"])]
        gained = [row for row in kept if not rule.kept(row["bare"])]
        survived, won = ([float(rule.kept(row["patched"])) for row in rows] for rows in (kept, gained))
        interval = [round(figure, 4) for figure in mean_interval(survived, seed=0)] if survived else [""] * 3
        yield {
            "rule": rule.name, "asked": len(asked), **{name: round(share, 4) for name, share in shares.items()},
            "kept": len(kept), **dict(zip(("survival", "low", "high"), interval, strict=True)),
            "gained": len(gained), "gained_survival": round(sum(won) / len(won), 4) if won else "",
        }  # fmt: skip
