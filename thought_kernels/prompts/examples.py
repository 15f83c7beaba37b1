"""Examples in the forms people hold them, brought to one: a chat whose last turn is the user's, and its completion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.example_files import Row, read_rows

ROLES = ("system", "user", "assistant")
_KEYS = ({"prompt"}, {"prompt", "completion"}, {"messages"})


class Example(NamedTuple):
    """One example.

    Attributes:
        messages: {"role", "content"} turns with plain text, the last one the user's.
        completion: the assistant's answer to it, or None where the model is to write it.
    """

    messages: tuple[dict[str, str], ...]
    completion: str | None


def load_examples(examples: Iterable[Any] | str | os.PathLike[str]) -> list[Example]:
    """Reads examples in any accepted form.

    Args:
        examples: an iterable (a list, a datasets.Dataset) of
            str: a user's text;
            {"prompt": str, "completion": str}, the completion may be missing or None; both may be message lists;
            a message list, or {"messages": message list}: a trailing assistant message is the completion, earlier
            turns belong to the example; a system message comes first if at all;
            or a path: of a jsonl file, these forms again, a line each; of a json file, a list of them; of a csv file,
            with the columns prompt and completion, or prompts alone; of a txt file, a user's text a line. A Path
            inside the list is read the same way.

    Returns:
        The examples, in order.

    Raises:
        ValueError, TypeError: if there is no example, or one has another form; names its index or line.
    """
    return [example for _, example in read_examples(examples, BadExamples())]


class Placed(NamedTuple):
    """An example, and where it stands: "examples[3]", or "FILE, line 4"."""

    place: str
    example: Example


def read_examples(examples: Iterable[Any] | str | os.PathLike[str], bad: BadExamples) -> list[Placed]:
    """What load_examples reads, each with its place, but for what cannot be read where `bad` leaves it out."""
    if isinstance(examples, (str, os.PathLike)):
        loaded = _read_file(Path(examples), bad)
    else:
        loaded = _read_list(examples, bad)
    if not loaded and not bad.left_out:
        raise ValueError("load_examples: examples must hold at least one example, got none")
    return loaded


def _read_list(examples: Any, bad: BadExamples) -> list[Placed]:
    if isinstance(examples, Mapping):
        hint = "choose one of its splits" if type(examples).__name__.endswith("DatasetDict") else "put it in a list"
        raise TypeError(f"load_examples: examples must be a list of examples, got a {type(examples).__name__}; {hint}")
    if not isinstance(examples, Iterable):
        raise TypeError(f"load_examples: examples must be a list or a path, got {type(examples).__name__}")
    loaded: list[Placed] = []
    for index, example in enumerate(examples):
        if isinstance(example, os.PathLike):
            loaded += _read_file(Path(example), bad)
            continue
        place = f"examples[{index}]"
        found = bad.read(place, read_example, example, f"load_examples: {place}")
        loaded += [] if found is None else [Placed(place, found)]
    return loaded


def read_example(example: Any, subject: str) -> Example:
    """One example from any form that load_examples takes; `subject` opens the error sentences."""
    if isinstance(example, Example):
        return example
    if isinstance(example, str):
        return _asked(({"role": "user", "content": check_text(example, subject)},), None, subject)
    if isinstance(example, Mapping):
        return _from_mapping(example, subject)
    if isinstance(example, (list, tuple)):
        return _from_messages(example, subject)
    raise TypeError(
        f"{subject} must be a str, a dict with prompt and completion, or a message list, got {type(example).__name__}"
    )


def read_messages(messages: Iterable[Any], subject: str) -> tuple[dict[str, str], ...]:
    """Checked {"role", "content"} messages with their text parts joined; `subject` opens the error sentences."""
    read = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            actual = f"keys {sorted(map(str, message))}" if isinstance(message, Mapping) else type(message).__name__
            hint = '; a text and its answer are {"prompt": ..., "completion": ...}' if isinstance(message, str) else ""
            raise ValueError(f"{subject} must hold messages with keys role and content, got {actual} at {index}{hint}")
        if message["role"] not in ROLES:
            raise ValueError(f"{subject} must have roles among {', '.join(ROLES)}, got {message['role']!r} at {index}")
        if message["role"] == "system" and index > 0:
            raise ValueError(f"{subject} must have its system message first, got it at {index}")
        read.append({"role": message["role"], "content": _text(message["content"], f"{subject}, message {index},")})
    return tuple(read)


def _read_file(path: Path, bad: BadExamples) -> list[Placed]:
    found = [(row.where, bad.read(row.where, _read_row, row)) for row in read_rows(path)]
    return [Placed(place, example) for place, example in found if example is not None]


def _read_row(row: Row) -> Example:
    if row.error is not None:
        raise row.error
    return read_example(row.value, f"load_examples: {row.where},")


def _from_mapping(example: Mapping[str, Any], subject: str) -> Example:
    if set(example) not in _KEYS:
        chat = {"role", "content"} <= set(example)
        hint = "a chat is a list of its messages" if chat else "rename or drop the others"
        raise ValueError(
            f"{subject} must have the keys prompt and completion, or messages, got {sorted(map(str, example))}; {hint}"
        )
    inside = subject.removesuffix(",")  # that of a line in a file has a comma
    if "messages" in example:
        return _from_messages(_listed(example["messages"], f"{inside}, messages,"), subject)
    prompt, completion = example["prompt"], example.get("completion")
    if isinstance(prompt, str):
        messages = read_example(prompt, subject).messages
    else:
        messages, answer = _from_messages(_listed(prompt, f"{inside}, prompt,"), f"{inside}, prompt,")
        if answer is not None:
            raise ValueError(f"{inside}, prompt, must end with a user message, got an assistant's")
    if isinstance(completion, str):
        check_text(completion, f"{inside}, completion,")
    elif completion is not None:
        turns = read_messages(_listed(completion, f"{inside}, completion,"), f"{inside}, completion,")
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise ValueError(f"{inside}, completion, must be one assistant message, got {len(turns)} messages")
        completion = turns[0]["content"]
    return _asked(messages, completion, subject)


def _from_messages(messages: Iterable[Any], subject: str) -> Example:
    turns = read_messages(messages, subject)
    completion = None
    if turns and turns[-1]["role"] == "assistant":
        turns, completion = turns[:-1], turns[-1]["content"]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"{subject} must end with a user message, or one and its answer, got {len(turns)} other turns")
    return _asked(turns, completion, subject)


def _asked(messages: tuple[dict[str, str], ...], completion: str | None, subject: str) -> Example:
    """The example, which asks something: a blank one has nothing that a patch could act on."""
    if not messages[-1]["content"].strip():
        raise ValueError(f"{subject} must have a user text, got a blank one, {messages[-1]['content']!r:.60}; drop it")
    return Example(messages, completion)


def check_text(text: str, subject: str) -> str:
    """The text, if it can be written in UTF-8: half a surrogate pair, as JSON may hold, stands for no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{subject} must be text, got the lone surrogate {text[error.start]!r} at character {error.start}; "
            "mend or drop it"
        ) from None
    return text


def _listed(value: Any, subject: str) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError(f"{subject} must be a str or a message list, got {type(value).__name__}")


def _text(content: Any, subject: str) -> str:
    if isinstance(content, str):
        return check_text(content, subject)
    if isinstance(content, (list, tuple)):
        for part in content:
            if (
                not isinstance(part, Mapping)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(f"{subject} must hold text parts only, got {part!r:.60}; images cannot be transmuted")
        return check_text("".join(part["text"] for part in content), subject)
    raise TypeError(f"{subject} must have text as its content, got {type(content).__name__}")
