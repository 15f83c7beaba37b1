"""What `import thought_kernels` promises: public names in any import order, and with optional packages missing."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thought_kernels as tk

PUBLIC = {
    "accumulate",
    "accumulate_pair",
    "paired_attention",
    "shared_prefix_attention",
    "rms_norm_pair",
    "gathered_low_rank",
    "available_backends",
    "transmute",
    "write_chats",
    "align",
    "load",
    "paper_recipe",
    "replay",
    "evaluate",
    "MixedPatches",
    "Recipe",
    "ThoughtPatch",
    "ThoughtAccumulator",
}
OPERATORS = (
    "accumulate",
    "accumulate_pair",
    "paired_attention",
    "shared_prefix_attention",
    "rms_norm_pair",
    "gathered_low_rank",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def check_python(code: str) -> str:
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names() -> None:
    assert set(tk.__all__) == PUBLIC
    assert set(dir(tk)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(tk, name)
    documentation = inspect.getdoc(value)
    assert documentation and documentation.splitlines()[0].strip()
    assert callable(value)
    assert inspect.signature(value).parameters


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="thought_kernels.*transmuted"):
        tk.transmuted  # noqa: B018


@pytest.mark.parametrize("name", OPERATORS)
def test_importing_registers_the_operators(name: str) -> None:
    schema = getattr(torch.ops.thought_kernels, name).default._schema
    assert schema.arguments[-1].name == "backend"
    assert set(tk.available_backends(name, "cpu")) == {"reference", "cpp", "triton", "cuda"}


@pytest.mark.parametrize("name", ["evaluate", "transmute"])
def test_a_public_function_is_a_plain_function(name: str) -> None:
    # Also where a submodule was imported first: no module of the package may hide a function of it.
    check_python(f"""
import inspect
import thought_kernels.evaluation.evaluate, thought_kernels.fitting.transmute
import thought_kernels as tk
from thought_kernels import {name}
assert inspect.isfunction({name}) and tk.{name} is {name}
""")
    assert not list(Path(tk.__file__).parent.glob(f"{name}*"))


def test_help_on_transmute_describes_the_call() -> None:
    text = pydoc.render_doc(tk.transmute, renderer=pydoc.plaintext)
    assert "transmute(model" in text and "Args:" in text


# None in sys.modules is how Python itself marks a module that cannot be imported; find_spec honours it too.
WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
"""


def test_works_without_extension_triton_and_transformers() -> None:
    output = check_python(
        WITHOUT.format(absent=["thought_kernels._C", "triton", "transformers", "tokenizers", "matplotlib", "typer"])
        + """
import torch
import thought_kernels as tk

cross = torch.zeros(3, 2)
tk.accumulate(cross, torch.ones(4, 3), torch.ones(4, 2))
assert bool((cross == 4).all()), cross
reasons = tk.available_backends("accumulate", "cpu")
assert reasons["reference"] is None
assert "_C" in reasons["cpp"] and "triton" in reasons["triton"].lower() and reasons["cuda"], reasons
without, delta = tk.paired_attention(*[torch.randn(1, 1, 3, 4)] * 3, (torch.randn(1, 2, 4), torch.randn(1, 2, 4)))
assert without.shape == delta.shape == (1, 1, 3, 4)
try:
    tk.accumulate(cross, torch.ones(4, 3), torch.ones(4, 2), backend="cpp")
except ValueError as error:
    print(error)
from thought_kernels.patches.patch import ThoughtPatch
tk.ThoughtAccumulator
"""
    )
    assert "accumulate: backend must" in output and "_C" in output


def test_importing_does_not_load_what_it_does_not_need() -> None:
    names = ("transformers", "tokenizers", "triton", "typer", "rich", "matplotlib")
    output = check_python(f"import sys, thought_kernels\nprint([name for name in {names} if name in sys.modules])")
    assert output.strip() == "[]"


def test_without_torch_the_error_is_one_sentence() -> None:
    result = run_python(WITHOUT.format(absent=["torch"]) + "import thought_kernels")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: thought_kernels: torch must be installed, got none;")


def test_the_typing_marker_is_shipped() -> None:
    assert (Path(tk.__file__).parent / "py.typed").is_file()
