"""Which kernels serve which operator: C++ libraries, Triton modules, the reference.

The dispatcher is the one table: C++ kernels register themselves when their library is loaded; Triton kernels and,
inside `backend(...)`, any other choice are laid over them from here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import warnings
from collections.abc import Callable

import torch

from fastprob._op import OPS, scale_

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEVICES = {"CPU": "cpu", "CUDA": "cuda"}  # dispatch key -> the backend whose kernels are C++ there

_reasons: dict[str, str] = {}  # backend -> which library serves it, or why there is none
_native: set[tuple[str, str]] = set()  # (torch operator, dispatch key) with a C++ kernel
_overrides: torch.library.Library | None = None
_active: str | None = None


def load() -> None:
    """Loads the C++ libraries that this build and this machine have, and sets the default choices."""
    capability = torch.backends.cpu.get_cpu_capability()  # honours ATEN_CPU_CAPABILITY
    variants = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}
    _reasons["cpu"] = _load_first("_cpu_", variants.get(capability, ("portable",)))
    _reasons["cuda"] = _load_first("_", ("cuda",)) if torch.version.cuda else "torch is built without CUDA"
    _reasons["triton"] = "installed" if _found("triton") else "triton is not installed"
    for name in _raw_names():
        for key in DEVICES:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprob::{name}", key):
                _native.add((name, key))
    _use(None)


def _load_first(prefix: str, variants: tuple[str, ...]) -> str:
    folder = pathlib.Path(__file__).parent
    for variant in variants:
        for path in folder.glob(f"{prefix}{variant}.*so"):
            torch.ops.load_library(path)
            return path.name
    return "not built"


def _raw_names() -> list[str]:
    return [name for op in OPS.values() for name in op.raw] + ["_scale_"]


def _references() -> dict[str, Callable]:
    return {name: function for op in OPS.values() for name, function in op.raw.items()} | {"_scale_": scale_}


def _triton_kernel(name: str) -> Callable | None:
    """The launcher of a torch operator, imported on its first call; of its derivatives the reference where the module
    has none.
    """
    op = next((op for op in OPS.values() if name in op.raw), None)
    module = f"fastprob.kernels.{op.name if op else name.strip('_')}"
    if not all(map(_found, ("triton", "fastprob.kernels", module))):
        return None
    defaults: dict = op.options if op else {}
    instead = [op.raw[name]] if op and name != op.name else []

    def launch(*args, **kwargs):
        return getattr(importlib.import_module(module), name, *instead)(*args, **{**defaults, **kwargs})

    return launch


def _found(module: str) -> bool:
    """Whether a module is installed; one in a package that is not would raise."""
    return importlib.util.find_spec(module) is not None


def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _chosen(name: str, key: str, choice: str | None) -> str:
    """The backend that serves a torch operator on a device under a choice (None: the default)."""
    native = DEVICES[key] if (name, key) in _native else None
    triton = "triton" if _triton_kernel(name) and (key == "CUDA" or (choice == "triton" and _interpreting())) else None
    if choice == "reference":
        return "reference"
    if choice == "triton":
        return triton or native or "reference"
    if choice == DEVICES[key]:
        return native or "reference"
    return native or (triton if key == "CUDA" else None) or "reference"


def _use(choice: str | None) -> None:
    """Lays the kernels of a choice over the C++ ones."""
    global _overrides, _active
    if _overrides is not None:
        _overrides._destroy()
    _overrides, _active = torch.library.Library("fastprob", "IMPL"), choice
    references = _references()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding a kernel is what this is for
        for name in _raw_names():
            for key, native in DEVICES.items():
                served = _chosen(name, key, choice)
                if served != native and (served != "reference" or (name, key) in _native):
                    kernel = _triton_kernel(name) if served == "triton" else references[name]
                    _overrides.impl(name, kernel, key, allow_override=True)


@contextlib.contextmanager
def backend(name: str):
    """Serves every operator from one backend inside the block, for tests and benchmarks; not for threads.

    Args:
        name: "reference", "cpu" (C++), "triton" (on the CPU too under TRITON_INTERPRET=1) or "cuda" (C++). A device
            or an operator that it does not serve keeps what it has.

    Raises:
        ValueError: for another name, or a backend that this installation lacks.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if _reasons.get(name, "").endswith(("not built", "not installed", "without CUDA")):
        raise ValueError(f"backend: {name!r} must be available, got: {_reasons[name]}")
    previous = _active
    _use(name)
    try:
        yield
    finally:
        _use(previous)


def info() -> str:
    """Which backend serves which operator on which device, and why, as text."""
    lines = [f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"]
    lines += [f"{what}: {_reasons[k]}" for k, what in zip(BACKENDS[1:], ("C++ for the CPU", "Triton", "C++ for CUDA"))]
    if torch.cuda.is_available():
        lines.append(f"GPU: {torch.cuda.get_device_name()}")
    else:
        lines.append("GPU: none that torch can use")
    width = max(len(name) for name in OPS)
    lines += ["", f"{'operator':{width}}  CPU        CUDA       other devices"]
    for op in OPS.values():
        served = [_chosen(op.name, key, _active) for key in DEVICES]
        lines.append(f"{op.name:{width}}  {served[0]:9}  {served[1]:9}  reference")
    return "\n".join(lines)
