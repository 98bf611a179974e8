"""Instructions that the CUDA kernels take for an element, read off the library's machine code for one architecture.

    python tests/instructions.py    # rewrites instructions.json, after a change that is meant to change them

What is counted of a kernel is its loop over the elements: the code between the target of its widest conditional branch
backwards and that branch (all of it where it has no loop), over how many elements, of the kernel's first type argument,
the widest load in there brings. It is a measure of the code, not of a run: a loop inside counts once, and so does every
side of a branch.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess

ARCHITECTURE = "sm_90"
TABLE = pathlib.Path(__file__).with_suffix(".json")
BITS = {"double": 64, "float": 32, "BFloat16": 16, "Half": 16}
LOADS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}  # bits that a load says it brings; else 32
TOOLS = ("cuobjdump", "nvcc", "c++filt")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy of it that Triton brings."""
    triton = importlib.util.find_spec("triton")
    candidates = [shutil.which(name)]
    if triton and triton.origin:
        candidates.append(str(pathlib.Path(triton.origin).parent / "backends/nvidia/bin" / name))
    return next((path for path in candidates if path and pathlib.Path(path).exists()), None)


def compiler() -> str:
    """The release of nvcc: another one's machine code is another."""
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", version)[1]


def count(library: pathlib.Path) -> dict[str, float]:
    """Kernel -> instructions per element."""
    command = [tool("cuobjdump"), "--dump-sass", "--gpu-architecture", ARCHITECTURE, library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, codes = [], []
    for part in text.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        names.append(name)
        codes.append(re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?) ;", code, re.MULTILINE))
    counts: dict[str, float] = {}
    for name, code in zip(_readable(names), codes, strict=True):
        counts[name] = max(counts.get(name, 0), _per_element(name, code))
    return dict(sorted(counts.items()))


def _readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters: elements_kernel<float, NllValue<true, float>>."""
    text = subprocess.run([tool("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|fastprob::|c10::|^void ", "", text, flags=re.MULTILINE)
    return [line[: line.index(">(") + 1] if ">(" in line else line for line in text.replace("> >", ">>").splitlines()]


def _per_element(name: str, code: list[tuple[str, str]]) -> float:
    loop = _widest_loop([(int(address, 16), text) for address, text in code])
    loads = [load.split(".") for text in loop for load in re.findall(r"LDG\.(\S+)", text)]
    widest = max((next((LOADS[part] for part in load if part in LOADS), 32) for load in loads), default=32)
    element = BITS[re.search(r"<(\w+)", name)[1]]
    return round(len(loop) / max(widest // element, 1), 1)


def _widest_loop(code: list[tuple[int, str]]) -> list[str]:
    branches = ((at, re.match(r"@!?U?P\d BRA.* (0x[0-9a-f]+)$", text)) for at, text in code)
    loops = [(int(branch[1], 16), at) for at, branch in branches if branch and int(branch[1], 16) < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, code[-1][0]))
    return [text for at, text in code if first <= at <= last]


if __name__ == "__main__":
    import fastprob

    library = next(pathlib.Path(fastprob.__file__).parent.glob("_cuda.*so"))
    table = {"nvcc": compiler(), "architecture": ARCHITECTURE, "instructions per element": count(library)}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
