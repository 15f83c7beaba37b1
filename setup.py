"""Builds the compiled extension thought_kernels._C; everything else about the package is in pyproject.toml.

csrc/cpu/*.cpp is always compiled. csrc/cuda/*.cu and its glue csrc/cuda/*.cpp join when torch is a CUDA build and nvcc
is there, GPU or no GPU. TORCH_CUDA_ARCH_LIST (torch's own variable) chooses the architectures. .ci/cuda_check.py
imports this file for its flags.
"""

import os
import re
import shutil
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        f"thought_kernels: building needs torch, which does not import here ({error}); install torch first, then run "
        "`pip install --no-build-isolation --no-deps -e .`"
    ) from None

CXX_FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]  # beside cpp_extension.COMMON_NVCC_FLAGS
CAPABILITIES = ((8, 0), (9, 0), (10, 0))  # one of each generation since the kernels' oldest


def require_compiler() -> None:
    """Stops with one sentence where torch would fail with a page of output."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"thought_kernels: building needs a C++20 compiler, and {compiler!r} is not on the PATH; "
            "install one, such as g++ 11 or newer, or name it in CXX"
        )


def cuda_architectures() -> str:
    """The GPUs seen here, or one of each generation, with PTX for later ones."""
    devices = range(torch.cuda.device_count())
    seen = {torch.cuda.get_device_capability(index) for index in devices} or set(CAPABILITIES)
    return ";".join(f"{major}.{minor}" for major, minor in sorted(seen)) + "+PTX"


def embedded_code() -> str:
    """What the extension will hold, such as "sm_80,sm_90,compute_90", so that it can be held against a GPU later."""
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    return ",".join(re.findall(r"code=(\w+)", flags))


def extension() -> CppExtension:
    """The C++ extension, with its CUDA half where it can be compiled."""
    sources = ["csrc/library.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    settings = {
        "extra_compile_args": {"cxx": CXX_FLAGS},
        "extra_link_args": ["-fopenmp"],
        "include_dirs": [os.path.abspath("csrc")],
    }
    settings["depends"] = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
    nvcc = CUDA_HOME is not None and os.access(os.path.join(CUDA_HOME, "bin", "nvcc"), os.X_OK)
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    if torch.version.cuda is None or not nvcc or not cuda_sources:
        return CppExtension("thought_kernels._C", sources, **settings)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
    settings["extra_compile_args"]["nvcc"] = NVCC_FLAGS
    settings["define_macros"] = [("THOUGHT_KERNELS_CUDA", embedded_code())]
    return CUDAExtension("thought_kernels._C", sources + cuda_sources + sorted(glob("csrc/cuda/*.cpp")), **settings)


if __name__ == "__main__":
    require_compiler()
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
