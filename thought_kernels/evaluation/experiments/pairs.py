"""Questions with right answers (sentence pairs, facts) from a jsonl file, a Hugging Face dataset, or a list."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thought_kernels.models import describe
from thought_kernels.ops.caller import warn
from thought_kernels.prompts.prompt import Instruction, encode

# Column names that are recognised without being told, in this order.
COLUMNS = (
    ("prompt", "completion"), ("question", "answer"), ("source", "target"), ("en", "fr"), ("english", "french"),
)  # fmt: skip


class Pair(NamedTuple):
    """A user's text and the right answer to it."""

    question: str
    answer: str


class Split(NamedTuple):
    """Pairs to fit on, to choose hyper-parameters on, and to measure on; none is in two of them."""

    fit: list[Pair]
    validation: list[Pair]
    fresh: list[Pair]


def read_pairs(
    data: str | os.PathLike[str] | Iterable[Any], *, source: str | None = None, target: str | None = None,
    split: str = "train", limit: int | None = None,
) -> list[Pair]:  # fmt: skip
    """Reads pairs in any accepted form.

    Args:
        data: a jsonl path, the id of a Hugging Face dataset (needs the `datasets` package), or an iterable of rows. A
            row is a dict, or two texts in a list.
        source, target: columns of the question and the answer, "translation.en" for one inside another; None for the
            first of COLUMNS that the first row has, at its top or inside "translation".
        split: of a dataset on the hub.
        limit: rows to read at most, None for all.

    Returns:
        The pairs, in order.

    Raises:
        ValueError: no such file or dataset, no rows, or a row without two texts; names its line or index. Empty rows of
            a dataset on the hub are passed over.
    """
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        rows, subject = (_jsonl(path), f"{path}, line") if path.is_file() else (_hub(str(data), split), f"{data}, row")
    else:
        rows, subject = enumerate(data), "data, row"
    pairs: list[Pair] = []
    columns: tuple[str, str] | None = None
    leave_out_empty = isinstance(data, str) and not Path(data).is_file()  # a dataset that nobody here can mend
    for number, row in rows:
        if limit is not None and len(pairs) >= limit:
            break
        where = f"experiment: {subject} {number},"
        if leave_out_empty and isinstance(row, Mapping) and columns is not None and _is_empty(row, columns):
            continue
        if isinstance(row, Mapping) and columns is None:
            columns = _columns(row, source, target, where)
        pairs.append(_pair(row, columns, where))
    if not pairs:
        raise ValueError(f"experiment: data must hold at least one pair, got none in {str(data)!r:.80}")
    return pairs


def split_pairs(pairs: Sequence[Pair], *, steps: int, inputs: int, seed: int) -> Split:
    """Shuffles the distinct pairs and splits them: `inputs` to measure on and as many to choose on, the rest to fit on.

    Of few pairs a quarter is measured on and a quarter chosen on.

    Raises:
        ValueError: fewer than three distinct questions.
    """
    distinct = list({pair.question: pair for pair in pairs}.values())
    if len(distinct) < 3:
        raise ValueError(
            f"experiment: data must hold at least 3 different questions, got {len(distinct)}; one is fitted on, one "
            "chosen on and one measured on"
        )
    random.Random(seed).shuffle(distinct)
    count = min(inputs, max(1, len(distinct) // 4))
    fresh, validation, fit = distinct[:count], distinct[count : 2 * count], distinct[2 * count :]
    return Split(fit[:steps], validation, fresh)


def check_context(
    model: Any, tokenizer: Any, instruction: Instruction, pairs: Iterable[Pair], format: str | None = None
) -> None:
    """Raises ValueError if a pair with the instruction is longer than the model's context, or does not align."""
    limit = getattr(describe(model).config, "max_position_embeddings", None)
    for pair in pairs:
        row = encode(tokenizer, instruction, {"prompt": pair.question, "completion": pair.answer}, format=format)
        if limit is not None and row.length > limit:
            raise ValueError(
                f"experiment: data must fit the model's context of {limit} tokens, got {row.length} with the "
                f"instruction for {pair.question[:60]!r}; drop it or shorten it"
            )


def usable(model: Any, tokenizer: Any, instruction: Instruction, pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs that check_context takes, with a warning that counts the others and says what is wrong with one.

    For datasets that nobody here can mend.
    """
    kept, refused = [], []
    for pair in pairs:
        try:
            check_context(model, tokenizer, instruction, [pair])
        except ValueError as error:
            refused.append(str(error))
        else:
            kept.append(pair)
    if refused:
        warn(f"experiment: {len(refused)} pairs left out; {refused[0]}")
    return kept


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"experiment: {path} must be text in UTF-8, got other bytes; {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"experiment: {path}, line {number}, must be one JSON value, got {line[:60]!r}; {error}"
            ) from None


def _hub(name: str, split: str) -> Iterable[tuple[int, Any]]:
    if name.endswith((".jsonl", ".json")) or name.startswith((".", "/")):
        raise ValueError(
            f"experiment: data must be a jsonl file or the id of a dataset, got {name!r}, where no file is"
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"experiment: data must be a jsonl file, got {name!r}, where no file is; for a dataset of that id on the "
            "hub, pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub and its formats raise types of their own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"experiment: data must be a dataset with split {split!r}, got {name!r}; {reason}") from error
    return enumerate(rows)


def _columns(row: Mapping[str, Any], source: str | None, target: str | None, where: str) -> tuple[str, str]:
    if source is not None and target is not None:
        return source, target
    inner = row.get("translation")
    places = [("", row), ("translation.", inner if isinstance(inner, Mapping) else {})]
    for prefix, columns in places:
        for first, second in COLUMNS:
            if first in columns and second in columns:
                return source or prefix + first, target or prefix + second
    raise ValueError(
        f"{where} must have a question and an answer, got the columns {', '.join(map(str, row))}; name them with "
        "source and target"
    )


def _pair(row: Any, columns: tuple[str, str] | None, where: str) -> Pair:
    if isinstance(row, Pair):
        return row
    if isinstance(row, (list, tuple)) and len(row) == 2:
        texts = list(row)
    elif isinstance(row, Mapping) and columns is not None:
        texts = [_inside(row, column, where) for column in columns]
    else:
        raise ValueError(f"{where} must be a dict or two texts, got {type(row).__name__}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} must hold two texts, got {text!r:.60}")
    return Pair(texts[0].strip(), texts[1].strip())


def _is_empty(row: Mapping[str, Any], columns: tuple[str, str]) -> bool:
    texts = [_inside(row, column, "experiment: data,") for column in columns]
    return any(text is None or (isinstance(text, str) and not text.strip()) for text in texts)


def _inside(row: Mapping[str, Any], column: str, where: str) -> Any:
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"{where} must have the column {column!r}, got {', '.join(map(str, row))}")
        value = value[name]
    return value
