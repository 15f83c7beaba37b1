"""Every Python example of the README and of the docstrings runs as printed, and tables show the committed results."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/prompts.md")


def python_blocks(document: str) -> list[tuple[int, str]]:
    """The fenced python blocks of a document, each with the line its code starts on."""
    text = (ROOT / document).read_text()
    return [
        (text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "thought_kernels").rglob("*.py"))
        if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)
    ]


def test_the_readme_has_an_example_of_about_fifteen_lines() -> None:
    lengths = [len([line for line in code.splitlines() if line.strip()]) for _, code in python_blocks("README.md")]
    assert lengths and max(lengths) <= 18, f"the library example must have about 15 lines, got {lengths}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may save a patch
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for line, code in python_blocks(document):
        exec(compile("\n" * (line - 1) + code, document, "exec"), namespace)  # a failure shows the document's own line


def test_docstring_examples_run() -> None:
    names = modules_with_examples()
    assert names, "no docstring has an example"
    for name in names:
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert results.attempted > 0, name
        assert results.failed == 0, name


def named_files(document: str) -> set[str]:
    """Paths a document names: in backticks under one of the project's folders, or as the target of a link."""
    text = (ROOT / document).read_text()
    quoted = re.findall(r"`((?:thought_kernels|csrc|tests|benchmarks|\.ci)/[\w./-]*)`", text)
    return {*quoted, *(link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    missing = sorted(name for name in named_files(document) if not (ROOT / name).exists())
    assert not missing, f"{document} names files that are not there: {missing}"


def test_every_module_is_on_the_map() -> None:
    named = named_files("README.md")
    files = [p.relative_to(ROOT) for p in (ROOT / "thought_kernels").rglob("*.py") if p.name != "__init__.py"]
    lost = sorted(str(f) for f in files if not named & {str(f), *(f"{parent}/" for parent in f.parents)})
    assert files and not lost, f"the README's map must name every module or its folder, got none for {lost}"


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for document in DOCUMENTS for t in re.findall(r"\bmake ([a-z-]+)", (ROOT / document).read_text())}
    assert named and named <= targets, f"no such targets: {sorted(named - targets)}"


def test_tables_show_the_committed_results() -> None:
    script = "benchmarks/tables/write_tables.py"
    command = [sys.executable, str(ROOT / script), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, f"python {script} must change nothing, got\n{run.stdout}{run.stderr}"
