"""The operator library: one torch.library namespace, four backends, and the choice between them.

Every operator is declared by its file ``ops/<stem>.py``::

    library.declare("name(Tensor x, *, str? backend=None) -> Tensor", implementation=run, fake=fake)
    library.declare_kernel("name_cpp(Tensor x) -> Tensor")        # implemented by csrc/cpu/name.cpp, if it is built
    library.choose("name", backend, device, unsupported=why_not)  # -> "cpp"

Schemas live in Python only, so they exist without the compiled extension; C++ adds TORCH_LIBRARY_IMPL blocks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

LIBRARY = torch.library.Library("thought_kernels", "DEF")
BACKENDS = ("reference", "cpp", "triton", "cuda")

# Fastest first. Triton on a CPU is the interpreter: it runs when named, and is never picked.
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class Operator:
    """Where the backends of one operator live.

    Attributes:
        stem: file name shared by reference/, triton/, csrc/, tests/ and benchmarks/measure/.
        preference: per device type, the backends to try in turn, fastest first.
    """

    stem: str
    preference: dict[str, tuple[str, ...]]


OPERATORS: dict[str, Operator] = {}


def declare(
    schema: str,
    *,
    implementation: Callable,
    fake: Callable,
    stem: str | None = None,
    preference: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Registers a public operator: its schema, its Python dispatch and its fake kernel.

    Args:
        schema: ``"name(...) -> ..."``, whose last argument is ``str? backend=None``.
        implementation: runs the operator on real tensors of any device; must not be differentiated through.
        fake: shapes and dtypes only.
        stem: file stem of the kernels, the operator's name unless several operators share one file.
        preference: overrides the order in which backends are tried, per device type.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    # No operator is differentiable. Without this, outputs claim a gradient, and backward silently leaves it out.
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    OPERATORS[name] = Operator(stem or name, {**_PREFERENCE, **(preference or {})})


def declare_kernel(schema: str) -> None:
    """Defines the schema of an internal operator, ``<stem>_cpp`` or ``<stem>_cuda``, which the extension implements."""
    LIBRARY.define(schema)


@functools.cache
def extension() -> ModuleType | str:
    """The compiled extension ``thought_kernels._C``, or a sentence saying why it is missing."""
    try:
        return importlib.import_module("thought_kernels._C")
    except ModuleNotFoundError:
        return "the extension thought_kernels._C is not built (pip install --no-build-isolation --no-deps -e .)"
    except ImportError as error:  # built against another torch, or a missing shared library
        return f"the extension thought_kernels._C does not load: {error}"


def kernel(name: str) -> Callable:
    """The internal operator ``name``, such as ``"accumulate_cpp"``; choose() must have allowed its backend."""
    extension()
    return getattr(torch.ops.thought_kernels, name).default


@functools.cache
def launcher(name: str, backend: str) -> Callable:
    """The function ``launch`` of the ``reference`` or ``triton`` module that serves operator ``name``."""
    launch = importlib.import_module(f"thought_kernels.{backend}.{OPERATORS[name].stem}").launch

    def without_autocast(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not torch.is_autocast_enabled(tensor.device.type):
            return launch(tensor, *arguments, **keywords)
        # Otherwise torch's own products would be in the lower precision, and so would what is returned.
        with torch.autocast(tensor.device.type, enabled=False):
            return launch(tensor, *arguments, **keywords)

    return without_autocast


def _compiled(stem: str, backend: str, device: torch.device) -> str | None:
    module, key = extension(), device.type.upper()
    if isinstance(module, str):
        return module
    if backend == "cuda":
        if not module.cuda_code:
            return "the extension was built without CUDA"
        capability = torch.cuda.get_device_capability(device)
        if not any(_runs_on(code, capability) for code in module.cuda_code.split(",")):
            number = "{}.{}".format(*capability)
            return (
                f"the extension was built for {module.cuda_code}, and this device has compute capability {number} "
                f"(rebuild with TORCH_CUDA_ARCH_LIST={number})"
            )
    kernel_name = f"{LIBRARY.ns}::{stem}_{backend}"
    # The second question raises for an operator without a schema.
    has_kernel = torch._C._dispatch_has_kernel
    if not has_kernel(kernel_name) or not torch._C._dispatch_has_kernel_for_dispatch_key(kernel_name, key):
        return f"the extension has no {backend} kernel for it"
    return None


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs embedded code: machine code such as sm_80 or sm_90a, or PTX such as compute_90."""
    kind, _, number = code.partition("_")
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):  # for this one architecture
        return capability == built
    if kind == "sm" or number.endswith("f"):  # for later ones of the generation
        return capability[0] == built[0] and capability >= built
    return capability >= built


def _triton(stem: str, device: torch.device) -> str | None:
    try:
        installed = importlib.util.find_spec("triton") is not None
    except ImportError:  # kept from being imported
        installed = False
    if not installed:
        return "triton is not installed"
    if importlib.util.find_spec(f"thought_kernels.triton.{stem}") is None:
        return "it has no Triton kernel"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "Triton runs on a CPU only with TRITON_INTERPRET=1 set before it is imported"
    capability = torch.cuda.get_device_capability(device)
    if interpreted or capability >= (8, 0):
        return None
    return f"it needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"


def interpreter_unsupported(*tensors: torch.Tensor | None) -> str | None:
    """Why Triton, where it interprets kernels, cannot take tensors of these dtypes, or None."""
    narrow = any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors)
    if not narrow or os.environ.get("TRITON_INTERPRET") != "1":
        return None
    return None if _interprets_bfloat16() else "Triton's interpreter computes wrongly in bfloat16"


@functools.cache
def _interprets_bfloat16() -> bool:
    """Whether a product is right: as Triton ships it, its interpreter multiplies the bits as if they were integers."""
    cross, rows = torch.zeros(1, 1), torch.full((1, 1), 2.0, dtype=torch.bfloat16)
    sums = dict.fromkeys(("weights", "gram", "delta_sum", "activation_sum", "moments"))
    launch = launcher("accumulate", "triton")
    launch(cross, rows, rows, pair=False, normalization="none", coefficient=1.0, **sums)
    return cross.item() == 4


@functools.cache
def unavailable(name: str, backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run operator ``name`` on ``device``, or None where it can."""
    if backend == "reference":
        return None
    stem = OPERATORS[name].stem
    if backend == "cpp":
        return (
            f"it runs on CPU tensors, not {device.type}" if device.type != "cpu" else _compiled(stem, backend, device)
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend == "triton":
        if device.type not in ("cpu", "cuda"):
            return f"it runs on CUDA tensors, not {device.type}"
        return _triton(stem, device)
    return f"it runs on CUDA tensors, not {device.type}" if device.type != "cuda" else _compiled(stem, backend, device)


def available_backends(op_name: str, device: str | torch.device) -> dict[str, str | None]:
    """Which backends can run an operator on a device.

    Args:
        op_name: such as ``"accumulate"``.
        device: such as ``"cpu"`` or ``torch.device("cuda", 0)``.

    Returns:
        All four backends, each with None where it is available and otherwise a sentence saying why it is not.

    Raises:
        ValueError: for an operator this package does not have, or a device that torch does not know.
    """
    _load()
    if not isinstance(op_name, str) or op_name not in OPERATORS:
        known = ", ".join(sorted(OPERATORS))
        raise ValueError(message("available_backends", "op_name", f"be one of {known}", repr(op_name)))
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(message("available_backends", "device", "be a torch device", repr(device))) from None
    return {backend: unavailable(op_name, backend, device) for backend in BACKENDS}


def _load() -> None:
    """Imports every operator file, since one that nobody has used yet is not declared."""
    folder = os.path.dirname(__file__)
    for file in sorted(os.listdir(folder)):
        stem, extension_ = os.path.splitext(file)
        if extension_ == ".py" and not stem.startswith("_"):
            importlib.import_module(f"{__package__}.{stem}")


def choose(
    name: str,
    backend: str | None,
    device: torch.device,
    unsupported: Callable[[str], str | None] | None = None,
) -> str:
    """The backend that runs this call: the named one or an error, else the fastest that supports the call.

    Args:
        name: the operator, which also stands first in the error.
        backend: one of BACKENDS, or None.
        device: of the tensors.
        unsupported: given an available backend, says why it cannot take this call's dtypes or shapes, or None.

    Raises:
        ValueError: if ``backend`` is unknown, unavailable, or does not support the call.
    """
    if backend is None:
        for candidate in OPERATORS[name].preference.get(device.type, ("reference",)):
            if unavailable(name, candidate, device) is None and not (unsupported and unsupported(candidate)):
                return candidate
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(message(name, "backend", f"be None or one of {', '.join(BACKENDS)}", repr(backend)))
    reason = unavailable(name, backend, device) or (unsupported(backend) if unsupported else None)
    if reason is not None:
        raise ValueError(message(name, "backend", f"support this call on {device.type}", repr(backend), reason))
    return backend


def message(function: str, argument: str, rule: str, actual: object, context: str = "") -> str:
    """The project's error sentence: ``{function}: {argument} must {rule}, got {actual}; {context}``."""
    return f"{function}: {argument} must {rule}, got {actual}" + (f"; {context}" if context else "")


def dispatched(*arguments: object) -> bool:
    """Whether a call must go through torch.ops, since one of its tensors may not be read where it lies.

    It may have no data (torch.compile, fake, meta, vmap), be of a class that takes calls itself, or be the negative of
    what lies in memory, which torch.ops resolves.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if any(tensor.is_nested for tensor in tensors):
        return False  # the checks say why not, torch.ops would not
    return any(
        tensor.is_meta or tensor.is_neg() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        for tensor in tensors
    )
