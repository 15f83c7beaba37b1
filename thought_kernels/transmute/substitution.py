"""Copies of the examples with strange words in place of theirs, so that a patch learns the instruction, not the words.

A few examples hold a few symbols or words, and a patch fitted to them answers to these: on inputs of other words its
matrices meet directions of activation space in which nothing told them what to do. Here the model itself fills them in.
In every copy of an example each token that varies between examples is read as a strange word, the same wherever it
occurs in the copy, in the completion too; tokens that all examples share, the chat's turns and the answer's form, stay.
The prompted model reads the copy, and its activations with and without the instruction are rows like any others. No
label is needed, and it does not matter that a copy's answer may be wrong: what is fitted is the change that the
instruction makes, not the answer.

The strange words are vectors of embedding space, random but for a trace of the word that they replace, unless words of
the vocabulary are asked for: these have directions in common and are attended to as words, not as numbers are
(docs/recipes.md has both).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from thought_kernels.transmute.prompt import EncodedExample, RandomVectors, text_tokenizer

WORDS = "words"
# Many examples are diverse by themselves: all copies together are not many more than MOST_COPIES.
SUBSTITUTIONS, MOST_COPIES = 8, 512
# What all copies of an example weigh together, the example itself weighing 1.
COPIES_SHARE = 4.0
# A random vector keeps up to this share of its squared length in the direction of the word that it replaces, so that a
# model which tells numbers from words attends to it a little as it did to the word.
MOST_LIKENESS = 0.2
# Characters as tokens come with a few words too, such as the turns' names, but copies made of those are all alike.
_SHORTEST_WORD, _FEWEST_WORDS = 3, 32


def copies_described() -> dict[str, float]:
    """What a patch's provenance says of its copies beside their number: the constants that they were made with."""
    return {"share": COPIES_SHARE, "most_likeness": MOST_LIKENESS}


def usual_copies(examples: int) -> int:
    """Copies of each of so many examples that the recommended recipe makes."""
    return max(1, min(SUBSTITUTIONS, MOST_COPIES // examples))


def word_tokens(tokenizer: Any) -> list[int]:
    """Ids of tokens that are words or long pieces of words: three or more letters, perhaps after a space.

    Every id but the special ones where the tokenizer has only a few such tokens.

    Args:
        tokenizer: a fast transformers tokenizer, or a processor that holds one.
    """
    tokenizer = text_tokenizer(tokenizer)
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in special]
    found = list(zip(ids, _texts(tokenizer, ids), strict=True))
    words = [index for index, text in found if text.isalpha() and len(text) >= _SHORTEST_WORD]
    return words if len(words) >= _FEWEST_WORDS else ids


def without_words_of(tokenizer: Any, ids: Iterable[int], texts: Iterable[str]) -> list[int]:
    """The ids but those of the texts' tokens, and of the same words with or without a space before them.

    So that a patch whose copies are made of the others can be judged on words that it has never met.
    """
    tokenizer, ids = text_tokenizer(tokenizer), list(ids)
    met = {index for text in texts for index in tokenizer(text, add_special_tokens=False)["input_ids"]}
    words = set(_texts(tokenizer, sorted(met)))
    return [index for index, word in zip(ids, _texts(tokenizer, ids), strict=True) if word not in words]


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode([[index] for index in ids])] if ids else []


def with_substitutions(
    examples: Sequence[EncodedExample], copies: int, substitutes: Sequence[int] | None, seed: int
) -> list[EncodedExample]:
    """The examples, followed by copies of each with random vectors or other tokens for those that vary between them.

    The draw for a copy depends on the seed, the example's own tokens, which of them vary and the copy's number only, so
    that neither the order of the examples nor the batch size matters. Examples that do not differ have no copies:
    nothing varies. A token that varies and that the instruction names too is replaced in the example alone.

    Args:
        examples: aligned examples.
        copies: of each example; 0 for none.
        substitutes: None for random vectors, which the copies' `random` describes, or token ids to draw from; those
            that all examples share, or that a header holds ("user"), are not drawn. Two tokens of a copy get the same
            substitute only where there are fewer of them than of its tokens.
        seed: of the draw.

    Returns:
        EncodedExamples. The originals keep their share; the copies of one share COPIES_SHARE times its own.
    """
    shared = set.intersection(*(set(example.tokens) for example in examples))
    pool = None if substitutes is None else sorted(set(substitutes) - shared)
    opening = set().union(*(example.header for example in examples))
    found = list(examples)
    for example in examples:
        # H opens a turn: in examples of several turns its tokens are the chat's, though other examples lack them.
        varying = sorted(set(example.tokens) - shared - set(example.header))
        for number in range(copies if varying else 0):
            rng = random.Random(f"{seed} {number} {example.tokens}")
            copy = example._replace(share=example.share * COPIES_SHARE / copies)
            if pool is None:
                words = RandomVectors(tuple(varying), rng.getrandbits(63), rng.uniform(0.0, MOST_LIKENESS))
                found.append(copy._replace(random=words))
            elif drawn := _drawn(rng, len(varying), pool, opening):
                new = dict(zip(varying, drawn, strict=True))
                found.append(copy._replace(tokens=[new.get(token, token) for token in example.tokens]))
    return found


def has_copies(examples: Sequence[EncodedExample], substitutes: Sequence[int] | None) -> bool:
    """Whether anything in the examples varies that the substitutes can replace."""
    return len(with_substitutions(examples, 1, substitutes, 0)) > len(examples)


def _drawn(rng: random.Random, count: int, pool: list[int], opening: set[int]) -> list[int]:
    """So many tokens of the pool, none of them an opening one; none at all where the pool has no other."""
    allowed = [token for token in pool if token not in opening]
    if not allowed:
        return []
    drawn = rng.sample(pool, count) if count <= len(pool) else rng.choices(pool, k=count)
    for index, token in enumerate(drawn):
        if token in opening:  # drawn anew by itself, which leaves the other draws as they are
            drawn[index] = rng.choice([other for other in allowed if other not in drawn] or allowed)
    return drawn


def resolved_substitutes(
    substitutes: Iterable[int] | str | None, tokenizer: Any, vocabulary: int
) -> tuple[int, ...] | None:
    """What with_substitutions takes, of what transmute was given: None, "words" or token ids below `vocabulary`.

    Raises:
        ValueError: an id that the model does not have, no id at all, or another text.
        TypeError: anything else.
    """
    if substitutes is None:
        return None
    if isinstance(substitutes, str):
        if substitutes != WORDS:
            raise ValueError(f"transmute: substitutes must be token ids, {WORDS!r} or None, got {substitutes!r}")
        return tuple(index for index in word_tokens(tokenizer) if index < vocabulary)
    try:
        given: list[Any] = substitutes.tolist() if isinstance(substitutes, Tensor) else list(substitutes)
        ids = tuple(operator.index(index) for index in given)
        if isinstance(substitutes, (bytes, bytearray, memoryview)):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"transmute: substitutes must be token ids, {WORDS!r} or None, got {substitutes!r:.120}"
        ) from None
    if not ids:
        raise ValueError(
            "transmute: substitutes must hold a token id or more, got none; substitutions=0 makes no copies"
        )
    if any(isinstance(index, bool) for index in given):
        raise TypeError("transmute: substitutes must be token ids, got a bool; give the ids where a mask is true")
    if not all(0 <= index < vocabulary for index in ids):
        outside = next(index for index in ids if not 0 <= index < vocabulary)
        raise ValueError(f"transmute: substitutes must be ids below {vocabulary}, got {outside}")
    return ids
