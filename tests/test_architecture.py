"""The layout's rules: which way imports point, one stem in every room, short files, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import thought_kernels  # noqa: F401  declares every operator
from thought_kernels.ops import library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "thought_kernels"

# What each room may import from the others; arrows point one way, the first rooms know least. `spectral` reads a
# model's weights through its description, and takes any object that hands out matrices as a patch.
MAY_IMPORT = {
    "version": set(),
    "__main__": {"cli"},
    "reference": set(),
    "triton": set(),
    "ops": {"reference", "triton"},
    "models": {"ops"},
    "prompts": set(),
    "generation": {"ops", "models", "prompts"},
    "patches": {"ops", "models"},
    "estimation": {"ops", "patches", "version"},
    "pairing": {"ops", "models", "prompts", "patches", "estimation"},
    "fitting": {"ops", "models", "prompts", "generation", "patches", "estimation", "pairing", "version"},
    "spectral": {"ops", "models"},
    "evaluation/records": set(),
    "evaluation/measures": {"models", "prompts", "generation", "patches", "pairing"},
    "evaluation/figures": {"evaluation/measures"},
    "evaluation/rivals": {
        "models", "prompts", "generation", "patches", "estimation", "pairing", "fitting", "evaluation/measures",
    },
    "evaluation/sections": {
        "models", "prompts", "generation", "patches", "estimation", "pairing", "fitting", "spectral",
        "evaluation/measures", "evaluation/figures", "evaluation/rivals",
    },
    "evaluation/budget": {
        "prompts", "generation", "patches", "pairing", "fitting", "spectral", "evaluation/measures",
        "evaluation/rivals", "evaluation/sections",
    },
    "evaluation/pages": {"evaluation/figures"},
    "evaluation/experiments": {
        "ops", "models", "prompts", "generation", "patches", "fitting", "version", "evaluation/records",
        "evaluation/measures", "evaluation/rivals",
    },
    "evaluation/pictures": {"evaluation/records", "evaluation/rivals", "evaluation/experiments", "evaluation/pages"},
    "evaluation": {
        "ops", "models", "prompts", "patches", "fitting", "version", "evaluation/records", "evaluation/measures",
        "evaluation/figures", "evaluation/rivals", "evaluation/sections", "evaluation/budget", "evaluation/pages",
    },
    "demo": {
        "models", "prompts", "pairing", "fitting", "evaluation/measures", "evaluation/rivals",
        "evaluation/experiments", "evaluation/pages", "evaluation/pictures",
    },
    "cli": {
        "models", "prompts", "patches", "pairing", "fitting", "spectral", "demo", "version", "evaluation",
        "evaluation/records", "evaluation/measures", "evaluation/figures", "evaluation/pages",
        "evaluation/experiments", "evaluation/pictures",
    },
}  # fmt: skip
# ops/library.py imports these by an operator's stem, when a backend is first chosen; no import statement shows it.
CHOSEN_AT_RUN_TIME = {"ops": {"reference", "triton"}}
# Third-party packages that only some parts may import, at whatever depth of the file.
IMPORTED_ONLY_BY = {
    "transformers": {"models", "demo", "cli"},
    "triton": {"triton", "ops"},
    "typer": {"demo", "cli"},
    "rich": {"demo", "cli"},
    "matplotlib": {"demo", "cli", "evaluation/pages", "evaluation/pictures", "spectral"},
}


def tracked(*suffixes: str) -> list[Path]:
    """The project's text files: those git tracks, and in a source archive everything there."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        files = [path for path in ROOT.rglob("*") if not {".venv", "build", "dist"} & set(path.parts)]
    return [path for path in files if path.suffix in suffixes and path.is_file()]


def part(path: Path) -> str:
    """The room that a file is in."""
    return room(path.relative_to(PACKAGE).with_suffix("").parts)


def room(parts: Sequence[str]) -> str:
    """The innermost room of a path or module below the package: rooms within rooms have rows of their own."""
    inner = "/".join(parts[:2])
    return inner if inner in MAY_IMPORT else parts[0]


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """What a file imports, anywhere in it, as absolute names with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ("thought_kernels", *path.relative_to(PACKAGE).parts[: -node.level])
                module = ".".join(filter(None, (*package, module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and "." in str(a.value)]
    return found


PARTS = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    owner = part(path)
    assert owner in MAY_IMPORT, f"{owner} is not a part of the layout; add it to MAY_IMPORT and to docs/map.md"
    wrong = []
    for line, module in imported_modules(path):
        top, *rest = module.split(".")
        if top == "thought_kernels" and rest and room(rest) not in {"_C", owner, *MAY_IMPORT[owner]}:
            wrong.append(f"line {line}: {owner} imports {module}")
        elif owner not in IMPORTED_ONLY_BY.get(top, {owner}):
            wrong.append(f"line {line}: {owner} imports {top}")
    assert not wrong, wrong


def test_no_allowed_arrow_is_unused() -> None:
    used: dict[str, set[str]] = {owner: set(CHOSEN_AT_RUN_TIME.get(owner, ())) for owner in MAY_IMPORT}
    for path in PARTS:
        for _, module in imported_modules(path):
            top, *rest = module.split(".")
            if top == "thought_kernels" and rest:
                used[part(path)].add(room(rest))
    unused = {owner: sorted(allowed - used[owner]) for owner, allowed in MAY_IMPORT.items() if allowed - used[owner]}
    assert not unused, f"MAY_IMPORT and docs/map.md must name arrows that exist, got {unused}; take these out"


def test_the_import_rule_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    source = "import thought_kernels.cli\nfrom thought_kernels import models\nfrom ..evaluation import report\n"
    path = tmp_path / "reference" / "accumulate.py"
    path.parent.mkdir()
    path.write_text(source + "def late():\n    from transformers.models import gemma3\n")
    assert [module for _, module in imported_modules(path)] == [
        "thought_kernels.cli",
        "thought_kernels.models",
        "thought_kernels.evaluation.report",
        "transformers.models.gemma3",
    ]


def test_a_room_within_a_room_is_one_of_its_own() -> None:
    path = PACKAGE / "evaluation" / "pages" / "page.py"
    assert part(path) == "evaluation/pages" and part(PACKAGE / "evaluation" / "evaluate.py") == "evaluation"
    assert room(("evaluation", "sections", "subject")) not in MAY_IMPORT["evaluation/pages"]


def imported_files(path: Path) -> set[Path]:
    """The package's files that a file imports, anywhere in it; its own __init__, the public door, is left out."""
    found = {defining_file(name) for _, name in imported_modules(path)}
    return {file for file in found if file not in (None, path, PACKAGE / "__init__.py")}


def defining_file(name: str) -> Path | None:
    """The file of a module, or that a name is imported from."""
    top, *rest = name.split(".")
    if top != PACKAGE.name:
        return None
    found = PACKAGE / "__init__.py"
    for stop in range(1, len(rest) + 1):
        place = PACKAGE.joinpath(*rest[:stop])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                found = file
    return found


def circle(files: list[Path]) -> list[str]:
    """Files that import each other in a circle, from one back to itself; none if there is no circle."""
    try:
        TopologicalSorter({path: imported_files(path) & set(files) for path in files}).prepare()
    except CycleError as error:
        return [str(path.relative_to(PACKAGE)) for path in error.args[1]]
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(PARTS) == []


def test_the_circle_rule_sees_late_imports_and_those_for_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "thought_kernels"
    monkeypatch.setattr(f"{__name__}.PACKAGE", package)
    room = package / "room"
    room.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (room / "__init__.py").write_text("from thought_kernels.room.a import A\n")
    (room / "a.py").write_text("from thought_kernels.room import b\nfrom thought_kernels import b as public\n")
    (room / "b.py").write_text("def late():\n    from thought_kernels.room.c import f\n")
    (room / "c.py").write_text("from typing import TYPE_CHECKING\n")
    files = sorted(room.glob("*.py"))
    assert circle(files) == []
    for line in (
        "if TYPE_CHECKING:\n    from thought_kernels.room.a import A\n",
        "import_module('thought_kernels.room.a')",
    ):
        (room / "c.py").write_text(f"from typing import TYPE_CHECKING\n{line}")
        assert set(circle(files)) == {"room/a.py", "room/b.py", "room/c.py"}


def hidden_modules(package: Path) -> set[str]:
    """The direct children of a package that share a name with something else that its __init__ binds or offers.

    The import system binds a child to its parent's attribute of that name, the __init__ the other thing, and
    `import package.name as n` gives whichever came last.
    """
    children = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    names = set()
    for node in ast.walk(ast.parse((package / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            whole = f"{PACKAGE.name}.{'.'.join(package.relative_to(PACKAGE).parts)}".rstrip(".")
            # `from package import child` binds the child itself.
            names |= {alias.asname or alias.name for alias in node.names if node.module != whole}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:  # __all__, and lazy names
            names |= {inner.value for inner in ast.walk(node.value) if isinstance(inner, ast.Constant)}
    return children & names


PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_module_shares_its_name_with_what_its_package_exports(package: Path) -> None:
    found = sorted(hidden_modules(package))
    assert not found, f"modules of {package.name}/ must have names that it does not export, got {found}; rename them"


def test_the_name_rule_sees_every_form_of_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "thought_kernels")
    room = tmp_path / "thought_kernels" / "room"
    (room / "inner").mkdir(parents=True)
    for name in ("imported.py", "lazy.py", "defined.py", "plain.py", "inner/__init__.py"):
        (room / name).touch()
    (room / "__init__.py").write_text(
        "from thought_kernels.room.imported import imported\nfrom thought_kernels.room.lazy import x as inner\n"
        "from thought_kernels.room import plain\n__all__ = ['lazy']\ndef defined():\n    pass\n"
    )
    assert hidden_modules(room) == {"imported", "inner", "lazy", "defined"}


def stems() -> list[str]:
    return sorted({operator.stem for operator in library.OPERATORS.values()})


KERNELS = ("thought_kernels/triton/{}.py", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu")


@pytest.mark.parametrize("stem", stems())
@pytest.mark.parametrize("room", ["thought_kernels/reference/{}.py", "thought_kernels/ops/{}.py", "tests/test_{}.py"])
def test_an_operator_has_its_stem_in_every_room(stem: str, room: str) -> None:
    assert (ROOT / room.format(stem)).is_file()


@pytest.mark.parametrize("stem", stems())
def test_a_kernel_has_a_benchmark(stem: str) -> None:
    kernels = [kernel.format(stem) for kernel in KERNELS if (ROOT / kernel.format(stem)).is_file()]
    benchmark = f"benchmarks/measure/bench_{stem}.py"
    assert not kernels or (ROOT / benchmark).is_file(), f"{kernels} must be measured by {benchmark}, got no such file"


# What several operators of a folder share, named after what it holds. What one operator alone needs is named
# <stem>_<what it holds> and lies beside the operator's own file, so that `git ls-files '*accumulate*'` is its map.
SHARED = {
    "thought_kernels/reference": set(),
    "thought_kernels/triton": {"attention_plan", "online_softmax"},
    "csrc/cpu": {"attention", "attention_tile", "instructions", "per_instruction_set", "tasks"},
    "csrc/cuda": {"bindings", "dtype", "to_float"},
}


def strangers(folder: Path, shared: set[str]) -> list[str]:
    """The sources of a kernel folder that are neither an operator's, nor a piece of one, nor shared."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    operators = {path.stem for path in files} & set(stems())
    known = {"__init__", *operators, *shared}
    return [
        path.name
        for path in files
        if path.stem not in known and not any(path.stem.startswith(f"{stem}_") for stem in operators)
    ]


@pytest.mark.parametrize("folder", SHARED)
def test_kernel_folders_hold_only_operators(folder: str) -> None:
    found = strangers(ROOT / folder, SHARED[folder])
    assert not found, f"{found} in {folder} belong to no operator; a reader looks for {stems()} and {SHARED[folder]}"
    missing = [name for name in SHARED[folder] if not list((ROOT / folder).glob(f"{name}.*"))]
    assert not missing, f"{missing} must be in {folder}, got no such file"


def test_the_folder_rule_sees_strangers(tmp_path: Path) -> None:
    for name in ("accumulate.py", "accumulate_plan.py", "paired_attention_plan.py", "helpers.cuh", "shared.h"):
        (tmp_path / name).touch()
    assert strangers(tmp_path, {"shared"}) == ["helpers.cuh", "paired_attention_plan.py"]


# What the scripts of each folder of benchmarks/ may import from the other folders and from tests/.
BENCHMARKS_MAY_IMPORT = {
    "peers": set(),
    "measure": {"peers", "tests"},
    "real": {"measure", "peers"},
    "tables": set(),
}


@pytest.mark.parametrize("folder", BENCHMARKS_MAY_IMPORT)
def test_benchmarks_measure_or_draw_or_are_peers(folder: str) -> None:
    benchmarks = ROOT / "benchmarks"
    owners: dict[str, str] = {}
    for name in (*BENCHMARKS_MAY_IMPORT, "tests"):
        for path in (ROOT / name if name == "tests" else benchmarks / name).glob("*.py"):
            # Scripts import by file name, so that two files of one name would hide each other.
            assert path.stem not in owners, (
                f"{name}/{path.name} must have a name of its own, got one of {owners[path.stem]}/"
            )
            owners[path.stem] = name
    wrong = []
    for path in sorted((benchmarks / folder).glob("*.py")):
        for line, module in imported_modules(path):
            owner = owners.get(module.partition(".")[0], folder)
            if owner not in {folder, *BENCHMARKS_MAY_IMPORT[folder]}:
                wrong.append(f"{path.name}, line {line}: {folder}/ imports {module} of {owner}/")
    assert not wrong, wrong


def test_benchmarks_readme_names_every_script() -> None:
    benchmarks = ROOT / "benchmarks"
    links = set(re.findall(r"\]\(([^)#]+)\)", (benchmarks / "README.md").read_text()))
    scripts = {str(path.relative_to(benchmarks)) for path in benchmarks.rglob("*.py")}
    lost = sorted(name for name in scripts if name not in links and not name.startswith("real/"))
    assert scripts and not lost, f"benchmarks/README.md must name every script, got none for {lost}"
    missing = sorted(link for link in links if not (benchmarks / link).exists())
    assert not missing, f"benchmarks/README.md names files that are not there: {missing}"


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh", ".md")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"files must have at most 500 lines, got {long}"


# The brackets keep the patterns from matching themselves.
@pytest.mark.parametrize("pattern", [r"\bTO[D]O\b", r"\bFIX[M]E\b", r"/ho[m]e/", r"/ro[o]t/", r"/wor[k]/", r"/op[t]/"])
def test_no_leftovers_and_no_machine_paths(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".json", ".csv", "")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{pattern} must not occur, got {found}"
