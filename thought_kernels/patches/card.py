"""A patch's model card: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thought_kernels.patches.data import PatchData
from thought_kernels.patches.summary import blocks

CARD_FILE = "README.md"
_SEAL = "<!-- written by thought_kernels: {} -->\n"  # a card that nobody has changed since may be replaced
_MADE = (
    "pairing", "estimator", "normalization", "scale", "ridge", "text_weight", "header_weight", "factor", "rank",
    "tokens", "examples", "generated_completions", "format", "without", "separator",
)  # fmt: skip
_LONGEST_TITLE = 60
_SHOWN = ("accuracy", "recovered", "unrelated KL")  # of an evaluation's figures


def model_card(patch: PatchData, evaluation: Mapping[str, Any] | None = None) -> str:
    """The card's text.

    Args:
        patch: the patch, whose provenance it tells.
        evaluation: what ``tk.evaluate(...).to_dict()`` gives, or evaluation.json holds; None for none.

    Raises:
        ValueError: an evaluation of another form.
    """
    made = patch.provenance
    measured = _evaluated(evaluation) if evaluation is not None else _not_evaluated()
    lines = [*_front(made), f"# {_title(made)}", "", *_what(patch), *_use(made), *_how(patch), *measured]
    text = "\n".join(lines) + "\n"
    return text + _seal(text)


def is_ours(path: Path) -> bool:
    """Whether there is no card, or one that this package wrote and nobody has changed, so that it may be written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    return is_sealed(text)


def is_sealed(text: str) -> bool:
    """Whether this package wrote a card, and nobody has changed it."""
    body = text[: -len(_seal(""))]
    return text == body + _seal(body)


def _seal(body: str) -> str:
    return _SEAL.format(hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()[:16])


def base_name(provenance: Mapping[str, Any]) -> str | None:
    """The base model as others may know it: a hub id, or of a folder or file here its name alone."""
    base = provenance.get("model")
    if not isinstance(base, str):
        return None
    return base if _is_hub_id(base) else Path(base).name


def shareable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without the paths of somebody's disk, in the parts of a sum too."""
    found = {**provenance, "model": base_name(provenance)} if "model" in provenance else dict(provenance)
    if isinstance(found.get("parts"), list):
        found["parts"] = [shareable(part) for part in found["parts"]]
    return found


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not name.endswith(".gguf")


def _front(made: Mapping[str, Any]) -> Iterator[str]:
    yield from ("---", "library_name: thought_kernels")
    base = base_name(made)
    if base is not None and _is_hub_id(base):  # on the hub it must be a model there
        yield from (f"base_model: {base}", "base_model_relation: adapter")
    yield from ("tags:", "- thought-patch", "---", "")


def _title(made: Mapping[str, Any]) -> str:
    told = _told(made).strip()
    if not told:
        return f"Thought patch of {made['control_vector']}" if "control_vector" in made else "Thought patch"
    first = " ".join(told.splitlines()[0].split())
    return first if len(first) <= _LONGEST_TITLE else first[:_LONGEST_TITLE].rstrip() + "…"


def _told(made: Mapping[str, Any]) -> str:
    """The instruction as text; of turns, a line of JSON each."""
    told = made.get("instruction") or ""
    return told if isinstance(told, str) else "\n".join(json.dumps(turn, ensure_ascii=False) for turn in told)


def _what(patch: PatchData) -> Iterator[str]:
    base = base_name(patch.provenance)
    yield f"A change to the weights of {base or 'a model'} that stands in for an instruction in its prompt. It was made"
    yield "without training, from what the instruction does to the model's own activations."
    yield ""
    if told := _told(patch.provenance):
        yield from ("The instruction:", "", *_fenced(told, "text"))


def _fenced(text: str, language: str) -> Iterator[str]:
    """A block with a fence longer than any in it."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", text))]))
    yield from (f"{fence}{language}", text, fence, "")


def _use(made: Mapping[str, Any]) -> Iterator[str]:
    code = (
        "import thought_kernels as tk\n\n"
        f"model, tokenizer = tk.load({base_name(made) or 'THE MODEL'!r})\n"
        'patch = tk.ThoughtPatch.from_pretrained("THIS FOLDER OR REPOSITORY", model=model, tokenizer=tokenizer)\n'
        "with patch.applied(model):\n    ...  # model.generate as ever, without the instruction"
    )
    yield from ("## Use", "", *_fenced(code, "python"))


def _how(patch: PatchData) -> Iterator[str]:
    made = patch.provenance
    yield from ("## How it was made", "", "| | |", "| --- | --- |")
    rows: dict[str, Any] = {"model": base_name(made), "sites": ", ".join(patch.sites), "blocks": blocks(patch.layers)}
    rows |= {name.replace("_", " "): made.get(name) for name in _MADE}
    if isinstance(made.get("written_inputs"), list):
        rows["inputs that the model wrote"] = len(made["written_inputs"])
    for version in ("version", "torch", "date"):
        rows[version] = made.get(version)
    for name, value in rows.items():
        if value is not None and not (name.endswith(" weight") and value == 0):
            yield f"| {name} | {_cell(value)} |"
    if "parts" in made:
        yield f"| a sum of | {len(made['parts'])} patches |"
    yield ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{text}`".replace("|", "\\|").replace("\n", "\\n") if text else "–"


def _not_evaluated() -> Iterator[str]:
    yield from (
        "## Evaluation",
        "",
        "Not evaluated: `thought-kernels evaluate` measures whether it can be trusted.",
        "",
    )
    yield from _LIMITS


def _evaluated(evaluation: Mapping[str, Any]) -> list[str]:
    try:
        lines = ["## Evaluation", "", "| question | | |", "| --- | --- | --- |"]
        for line in evaluation["verdict"]:
            lines.append(f"| {line['question']} | {line['status']} | {line['answer']} |".replace("\n", " "))
        lines += [
            "",
            "| section | of | what | value | 95 % interval | inputs |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, section in evaluation["sections"].items():
            lines += [_row(name, figure) for figure in section["figures"] if _is_shown(figure)]
        lines += ["", *(f"- {sentence}" for sentence in evaluation.get("warnings", [])), *_LIMITS]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "model_card: evaluation must be what evaluate(...).to_dict() gives, got something else: "
            f"{type(error).__name__} {error}"
        ) from error
    return lines


def _is_shown(figure: Mapping[str, Any]) -> bool:
    return figure["x"] is None and figure["quantity"] in _SHOWN and figure["value"] is not None


def _row(section: str, figure: Mapping[str, Any]) -> str:
    low, high = figure["low"], figure["high"]
    interval = "–" if low is None or high is None else f"{low:.3g} to {high:.3g}"
    return (
        f"| {section.replace('_', ' ')} | {figure['subject']} | {figure['quantity']} | {figure['value']:.3g} | "
        f"{interval} | {figure['inputs'] or '–'} |"
    )


_LIMITS = (
    "A patch is no gentle edit. Told another instruction, the patched model may follow the patch instead; on inputs",
    "unlike those that the patch was made of it may fail.",
)
