"""Finished sections on disk, so that a report that was stopped, or in part failed, is taken up where it was left."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thought_kernels.evaluation.budget.plan import Plan
from thought_kernels.evaluation.figures.report import FORMAT
from thought_kernels.evaluation.figures.section import Section
from thought_kernels.evaluation.records.digests import tensors_hash
from thought_kernels.evaluation.records.files import write_json
from thought_kernels.evaluation.sections.cost import Making
from thought_kernels.evaluation.sections.subject import Subject
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.version import __version__

log = logging.getLogger(__name__)


class Progress:
    """The sections of one evaluation in a folder; with None nothing is kept.

    Args:
        folder: the report's.
        key: what the kept sections must have been made from.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder, self._key = folder, key

    def load(self, name: str, subject: Subject) -> Section | None:
        """A section that was finished before from the same model, data and settings; None otherwise.

        With "patch" the patch itself is read too, so that it need not be fitted again.
        """
        if self._folder is None:
            return None
        path = self._path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != self._key:
                return None
            section = Section.from_dict(content["section"])
            if name == "patch" and subject.given_patch is None:
                subject.given_patch = ThoughtPatch.from_pretrained(self._folder / "patch")
                subject.making = Making.read(section, "patched", subject.decoder.device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path.exists():
                log.warning("section %s in %s is measured again: %s", name, path, error)
            return None
        return section

    def save(self, section: Section, subject: Subject) -> None:
        """Keeps a section. One that failed is kept to be read, and measured again next time."""
        if self._folder is None:
            return
        path = self._path(section.name)
        path.parent.mkdir(exist_ok=True)
        if section.name == "patch" and section.error is None:
            subject.patch.save_pretrained(self._folder / "patch")
        key = self._key if section.error is None else "failed"
        write_json({"key": key, "section": section.to_dict()}, path)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / "sections" / f"{name}.json"


def save_plan(folder: Path | None, key: str, names: Sequence[str], minutes: float | None, plan: Plan) -> None:
    """Keeps a plan, so that a run that is taken up again has the amounts of the first."""
    if folder is not None:
        content = {"key": key, "sections": list(names), "minutes": minutes, "plan": plan.to_dict()}
        write_json(content, folder / "plan.json")


def load_plan(folder: Path | None, key: str, names: Sequence[str], minutes: float | None) -> Plan | None:
    """The plan that was kept for the same model, data, settings, sections and minutes; None where there is none."""
    if folder is None:
        return None
    try:
        content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if (content["key"], content["sections"], content["minutes"]) != (key, list(names), minutes):
            return None
        return Plan.from_dict(content["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(subject: Subject, settings: Mapping[str, Any]) -> str:
    """A digest of the model's weights, the patch, the data and the settings: what a figure depends on."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\0")

    feed([FORMAT, __version__, {name: value for name, value in settings.items() if name != "date"}])
    feed([subject.examples, subject.pool, subject.held_out.questions, subject.held_out.answers, subject.unrelated])
    feed([subject.paraphrases, repr(subject.others), repr(subject.outside), repr(subject.longer)])
    feed(tensors_hash(subject.model.named_parameters()))
    if subject.given_patch is not None:
        for key, entry in subject.given_patch.entries.items():
            feed([key, tensors_hash(entry.tensors().items())])
    return digest.hexdigest()
