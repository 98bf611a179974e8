"""Builds the C++ kernels: CPU libraries (portable, AVX2, AVX-512) and, where nvcc and a CUDA torch are, one for CUDA.

They use torch's stable ABI and no Python symbol, so one abi3 wheel serves every Python and later torch. fastprob picks
the CPU library when it is imported. Without a C++ compiler the package installs all the same and runs on its reference.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

if "CUDA_HOME" not in os.environ and (nvcc := shutil.which("nvcc")):  # torch takes a wrapper's folder for the toolkit's
    plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if found := re.search(r"_HERE_=(.+)/bin", plan):
        os.environ["CUDA_HOME"] = found[1]

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
from torch.version import cuda as TORCH_CUDA

ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX_FLAGS = [*ABI, "-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # no -ffast-math: NaN must survive
CXX_FLAGS += ["-fschedule-insns"]  # interleaves the long loops' chains of polynomials: probvlm_loss in 17 % less time
VARIANTS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-march=x86-64-v3"]
    VARIANTS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob(pattern))


def extensions() -> list:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("fastprob: no C++ compiler (c++ or $CXX); installing without C++ kernels")
        return []
    common = {"py_limited_api": True}
    built = [
        CppExtension(f"fastprob._cpu_{name}", sources("cpu", "*.cpp"), extra_compile_args=CXX_FLAGS + flags, **common)
        for name, flags in VARIANTS.items()
    ]
    if CUDA_HOME and TORCH_CUDA and shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        flags = {"cxx": CXX_FLAGS, "nvcc": [*ABI, "-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]}
        built.append(CUDAExtension("fastprob._cuda", sources("cuda", "*.cu"), extra_compile_args=flags, **common))
    else:
        print("fastprob: no nvcc or a torch without CUDA; Triton serves CUDA devices")
    return [extension for extension in built if extension.sources]


class Build(BuildExtension):
    """Keeps objects, by extension: what has not changed is not compiled again, for a wheel after an install either."""

    def build_extension(self, extension):
        self.build_temp = str(Path(self.get_finalized_command("build").build_base, "objects", extension.name))
        super().build_extension(extension)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
