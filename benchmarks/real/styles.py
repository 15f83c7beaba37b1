"""Whether an answer is in the style that an instruction asks for, by the words that give it away; without a judge."""

from __future__ import annotations

import re

FRENCH = (
    "le la les un une des du de et est sont dans pour que qui ne pas vous je il elle nous avec sur ce cette plus ou au "
    "aux votre peut être avoir fait comme mais aussi en"
)
ENGLISH = (
    "the a an of and is are in to for that which not you i he she we with on this it or your can be have has do as but "
    "also by from at"
)
PIRATE = "arr arrr arrrr ahoy aye matey mateys ye yer yo avast treasure booty seas sail ship"
SHORT = 25  # words


def styles(text: str) -> set[str]:
    """Those of "French", "pirate" and "short" that a text has."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    french, english, pirate = (sum(word in known.split() for word in words) for known in (FRENCH, ENGLISH, PIRATE))
    found = set()
    if french > english:
        found.add("French")
    if pirate >= 2:
        found.add("pirate")
    if 0 < len(words) <= SHORT and text.rstrip().endswith((".", "!", "?")):
        found.add("short")
    return found


def same_style(text: str, answer: str, question: str) -> bool:
    """The text has every style that the right answer has, which is the prompted model's where nobody wrote one."""
    return styles(answer) <= styles(text)
