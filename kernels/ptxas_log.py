"""The output of nvcc and ptxas about an object: the resources of every kernel, and the faults."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel and its resources.

    Args:
        name: The mangled name.
        architecture: The architecture, such as ``sm_90a``.
        registers: The registers per thread.
        shared: The static shared memory per block in bytes.
        stack: The stack frame per thread in bytes.
        spills: The bytes of spill stores and spill loads together.
    """

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def read_kernels(log: str) -> list[Kernel]:
    """Return the kernels of a ``-Xptxas -v`` log, in its order.

    Args:
        log: The text of the log.
    """
    kernels: list[Kernel] = []
    entry: tuple[str, str] | None = None
    stack = spills = 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack, spills = (match[1], match[2]), 0, 0
        elif match := _STACK.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := _USED.search(line)) and entry is not None:
            kernels.append(Kernel(*entry, int(match[1]), int(match[2] or 0), stack, spills))
            entry = None
    return kernels


def find_faults(log: str, sources: Path) -> list[str]:
    """Return spills, serialized wgmma, any ptxas warning, and any compiler warning about a file under ``sources``.

    Args:
        log: The text of the log.
        sources: The folder of our sources.
    """
    faults = [
        f"{k.architecture} {demangle([k.name])[k.name]} spills {k.spills} bytes" for k in read_kernels(log) if k.spills
    ]
    for line in log.splitlines():
        ours = str(sources) in line and re.search(r"\bwarning\b", line)
        if "(C7510)" in line or re.search(r"ptxas.*\bwarning\b", line) or ours:
            faults.append(line.strip())
    return faults


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Return the readable names of kernels, without arguments and namespaces; names stay if c++filt is missing.

    Args:
        names: The mangled names.
    """
    names = sorted(set(names))
    program = shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    # CUTLASS's names nest deeper than c++filt follows by default.
    done = subprocess.run([program, "-r"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _shorten(text) for name, text in zip(names, done.stdout.splitlines())}


def _shorten(text: str) -> str:
    """Return a demangled name without return type, arguments and namespaces."""
    text = re.sub(r"^void ", "", text).replace("(anonymous namespace)::", "").replace("dvdq::", "")
    if text.startswith("cutlass::"):
        # The name of a CUTLASS kernel is its whole type, thousands of characters long.
        outermost, schedule = text.partition("<")[0], re.search(r"KernelTmaWarpSpecialized\w*", text)
        return f"{outermost} {schedule[0]}" if schedule else outermost
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text
