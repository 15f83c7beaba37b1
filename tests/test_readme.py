"""Examples of documents and docstrings run as printed, links lead somewhere, tables show the committed results."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import MAY_IMPORT
from typer.core import TyperGroup
from typer.main import get_command

from thought_kernels.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES)


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a document in a language, each with the line its code starts on."""
    text = (ROOT / document).read_text()
    return [
        (text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


PYTHON = [document for document in DOCUMENTS if blocks(document, "python")]
SHELL = [document for document in DOCUMENTS if blocks(document, "sh")]


def modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "thought_kernels").rglob("*.py"))
        if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize(("language", "lines"), [("python", 10), ("sh", 5)])
def test_the_readme_is_short(language: str, lines: int) -> None:
    found = [len([line for line in code.splitlines() if line.strip()]) for _, code in blocks("README.md", language)]
    assert found == [lines], f"the README must have one example of {lines} lines in {language}, got {found}"


@pytest.mark.parametrize("document", PYTHON)
def test_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may save a patch
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for line, code in blocks(document, "python"):
        exec(compile("\n" * (line - 1) + code, document, "exec"), namespace)  # a failure shows the document's own line


@pytest.mark.slow
@pytest.mark.parametrize("document", SHELL)
def test_shell_examples_run(document: str, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "thought-kernels"  # of the package under test, whatever is installed
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c 'from thought_kernels.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for _, code in blocks(document, "sh"):
        run = subprocess.run(
            ["sh", "-e", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **paths}
        )
        assert run.returncode == 0, f"{document}:\n{code}{run.stdout}{run.stderr}"


def named_commands(document: str) -> list[list[str]]:
    """The words of every `thought-kernels ...` that a document names, in a block or within a sentence."""
    text = (ROOT / document).read_text()
    lines = re.findall(r"`(thought-kernels [^`]+)`|^(?: {4})?(thought-kernels .+)$", text, re.MULTILINE)
    return [shlex.split(" ".join((quoted or line).split()), comments=True) for quoted, line in lines]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_commands_exist(document: str) -> None:
    for words in named_commands(document):
        command = get_command(app)
        names = iter(words[1:])
        while isinstance(command, TyperGroup) and (name := next(names, None)) is not None:
            assert name in command.commands, f"{document}: there is no command {name!r} in {words}"
            command = command.commands[name]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word for word in words if word.startswith("-")} - {*known, "--help"}
        assert not unknown, f"{document}: {words} has options that the command does not know: {sorted(unknown)}"


def test_docstring_examples_run() -> None:
    names = modules_with_examples()
    assert names, "no docstring has an example"
    for name in names:
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert results.attempted > 0, name
        assert results.failed == 0, name


def anchors(path: Path) -> set[str]:
    """What a link may name after #: a document's headings, as code hosts write them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: str) -> list[tuple[Path, str]]:
    """The files that a document links to, each with the heading that is meant."""
    text = (ROOT / document).read_text()
    found = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    here = (ROOT / document).parent
    return [((here / name).resolve() if name else ROOT / document, anchor) for name, _, anchor in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    quoted = re.findall(r"`((?:thought_kernels|csrc|tests|benchmarks|\.ci)/[\w./-]*)`", (ROOT / document).read_text())
    missing = sorted(name for name in quoted if not (ROOT / name).exists())
    for path, anchor in links(document):
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(f"{path.relative_to(ROOT)}#{anchor}")
    assert not missing, f"{document} names what is not there: {missing}"


def test_the_index_has_every_page() -> None:
    linked = {path for path, _ in links("docs/index.md")}
    lost = [page for page in PAGES if page != "docs/index.md" and ROOT / page not in linked]
    assert PAGES and not lost, f"docs/index.md must link to every page, got none for {lost}"
    named = {path for path, _ in links("README.md")}
    assert {ROOT / "docs/index.md", ROOT / "docs/map.md"} <= named, "README.md must link to the index and to the map"


def test_every_module_is_on_the_map() -> None:
    named = {path for path, _ in links("docs/map.md")}
    sources = [p for p in (ROOT / "thought_kernels").rglob("*.py") if p.name != "__init__.py"]
    sources += [p for room in ("csrc", "examples", ".ci") for p in (ROOT / room).rglob("*") if p.is_file()]
    rooms = {ROOT / "thought_kernels", ROOT / "csrc"}  # too large to name a file by
    lost = [p for p in sources if not (named - rooms) & {p, *p.parents}]
    names = sorted(str(p.relative_to(ROOT)) for p in lost)
    assert sources and not lost, f"docs/map.md must name every source or its folder, got none for {names}"


def test_the_map_shows_what_each_room_may_import() -> None:
    text = (ROOT / "docs/map.md").read_text()
    shown = {
        room.replace("\\", ""): set(re.findall(r"`([\w/]+)`", arrows))
        for room, arrows in re.findall(r"^## (\S+)\n\n[^|#]*?\bImports ([^.]*)\.$", text, re.MULTILINE)
    }
    assert shown == MAY_IMPORT


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [(ROOT / document).read_text() for document in DOCUMENTS]
    named = {t for text in texts for t in re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)}
    assert named and named <= targets, f"no such targets: {sorted(named - targets)}"


def test_tables_show_the_committed_results() -> None:
    script = "benchmarks/tables/write_tables.py"
    command = [sys.executable, str(ROOT / script), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, f"python {script} must change nothing, got\n{run.stdout}{run.stderr}"
