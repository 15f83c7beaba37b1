"""What mkdocs needs to know of links that lead out of docs/: the site takes along what they lead to, under source/.

Sources become plain text, which every browser shows; Markdown becomes a page; a folder becomes a list of its files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<target>[^)\s#]+)")
SHOWN = {".png", ".svg"}  # by the browser as they are
UNREAD = {".safetensors", ".so"}


def address(target: str) -> str:
    """Where a path of the repository lies in the site's sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    path = ROOT / target
    place = "source/" + target.lstrip(".")  # hosts of static pages leave out names with a dot
    if path.is_dir():
        return f"{place}/files.md"
    return place if path.suffix in {".md", *SHOWN} else f"{place}.txt"


def listing(folder: str) -> str:
    """A folder as a page."""
    names = sorted(
        path.name + "/" * path.is_dir()
        for path in (ROOT / folder).iterdir()
        if not path.name.startswith((".", "__pycache__")) and path.suffix not in UNREAD
    )
    return "\n".join([f"# {folder}/", "", *(f"- [{name.replace('_', chr(92) + '_')}]({name})" for name in names)])


def text(path: str) -> str:
    """What a path of the repository is as a page, with its links as they are written there; nothing if it is none."""
    if (ROOT / path).is_dir():
        return listing(path)
    return (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else ""


def targets(path: str) -> list[str]:
    """The paths of the repository that a page links to."""
    return [resolve(path, match["target"]) for match in LINK.finditer(text(path))]


def resolve(path: str, target: str) -> str:
    """A link of a page, as a path of the repository."""
    folder = path if (ROOT / path).is_dir() else posixpath.dirname(path)
    return posixpath.normpath(posixpath.join(folder, target))


def on_files(files: Files, config: Any) -> Files:
    """Adds what is linked to, and what that links to; a link that leads nowhere is left for mkdocs to find."""
    waiting = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    seen = set(waiting)
    while waiting:
        for target in targets(waiting.pop()):
            if target in seen or target.startswith("docs/") or not (ROOT / target).exists():
                continue
            seen.add(target)
            waiting.append(target)
            place, level = address(target), InclusionLevel.NOT_IN_NAV
            if page := text(target):
                file = File.generated(config, place, content=page, inclusion=level)
            else:
                file = File.generated(config, place, abs_src_path=str(ROOT / target), inclusion=level)
            file.origin = target
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to the repository's files into links to what stands for them in the site."""
    origin = getattr(page.file, "origin", f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = resolve(origin, match["target"])
        exists = (ROOT / target).exists()
        return posixpath.relpath(address(target), here or ".") if exists else match["target"]

    return LINK.sub(moved, markdown)
